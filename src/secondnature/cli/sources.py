"""What `learn` reads, all of it before anything is sent: corrections, probes, replay, settings (process D).

A directory is a complete lesson: corrections.jsonl and, where they exist, probes.jsonl, development.jsonl,
replay.jsonl, replay_prompts.jsonl and lesson.toml. Flags win over lesson.toml; an unknown key there is an error.
"""

from __future__ import annotations

import shlex
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, Field, ValidationError

from secondnature.errors import BadInput, BadRecord
from secondnature.evidence.lint import Finding, lint
from secondnature.importers import sight
from secondnature.records import (
    Correction,
    GateSettings,
    GuardPack,
    Name,
    OptimizerSettings,
    Probe,
    Prompt,
    Record,
    describe,
    line_numbers,
    read_jsonl,
)
from secondnature.wire import NamedPack, Objective, ReplayMatch, SdftSettings, TrainRequest

R = TypeVar("R", bound=BaseModel)
SETTINGS_FILE = "lesson.toml"


class ReplayShare(Record):
    """`[replay]` of lesson.toml; the examples lie in replay.jsonl, the prompts in replay_prompts.jsonl."""

    share: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] | None = None
    """Share of replayed examples in a batch."""
    match: ReplayMatch | None = None
    """`answer` or `distribution`."""
    weight: float | None = None
    """Of the KL, with `distribution`."""
    temperature: float | None = None
    """Of the model's own answers to replay_prompts.jsonl."""
    lessons: bool | None = None
    """Also replay the corrections of earlier kept lessons."""


class LessonFile(Record):
    """`lesson.toml`: the settings of one lesson, named as in `POST /v1/train`. Absent: the server's default."""

    behaviour: Name | None = None
    """Which probes must improve."""
    note: str | None = None
    objective: Objective | None = None
    sdft: SdftSettings | None = None
    epochs: int | None = None
    batch_size: int | None = None
    max_steps: int | None = None
    until_margin: float | None = None
    until_passed: float | None = None
    learned_loss: float | None = None
    look_every: int | None = None
    seed: int | None = None
    optimizer: OptimizerSettings | None = None
    replay: ReplayShare | None = None
    gate: GateSettings | None = None
    guards: list[NamedPack] | None = None
    """Shipped packs (`pack:facts`). Default: facts, arithmetic, instructions, where probes.jsonl has no guards."""


DEFAULT_GUARDS: tuple[GuardPack, ...] = ("facts", "arithmetic", "instructions")


def parse_guards(text: str | None) -> list[GuardPack] | None:
    """`--guards facts,arithmetic`, or `none`. Raises BadInput: no such pack."""
    if text is None:
        return None
    names = [x.strip().removeprefix("pack:") for x in text.split(",") if x.strip()]
    if names == ["none"]:
        return []
    known = get_args(GuardPack)
    unknown = [x for x in names if x not in known]
    if unknown or not names:
        found = f"`{unknown[0]}`" if unknown else "none"
        raise BadInput(f"--guards: {found} is no pack; there are: {', '.join(known)}", "or --guards none")
    return [name for name in known if name in names]


@dataclass(frozen=True)
class LearnFlags:
    """The options of `learn` that say what is taught and how."""

    probes: Path | None = None
    development: Path | None = None
    replay: Path | None = None
    replay_prompts: Path | None = None
    behaviour: str | None = None
    objective: Objective | None = None
    max_steps: int | None = None
    until_margin: float | None = None
    until_passed: float | None = None
    lr: float | None = None
    batch_size: int | None = None
    seed: int | None = None
    keep: bool = False
    dry_run: bool = False
    guards: list[GuardPack] | None = None


@dataclass(frozen=True)
class Sources:
    """Everything that was read, valid; `corrections` is None where the ledger is the source."""

    corrections: list[Correction] | None
    probes: list[Probe] = field(default_factory=list[Probe])
    development: list[Probe] = field(default_factory=list[Probe])
    replay: list[Correction] = field(default_factory=list[Correction])
    replay_prompts: list[Prompt] = field(default_factory=list[Prompt])
    settings: LessonFile = field(default_factory=LessonFile)
    lines: list[int] | None = None
    """Of the corrections in their file."""
    probe_lines: list[int] | None = None

    def findings(self, ledger: Sequence[Correction] | None = None) -> list[Finding]:
        """What may be wrong with corrections and probes. `ledger`: where that is the source, its corrections."""
        taught = self.corrections if self.corrections is not None else list(ledger or [])
        return lint(taught, self.probes, lines=self.lines, probe_lines=self.probe_lines)

    def request(self, flags: LearnFlags, ledger: list[Correction] | None = None) -> TrainRequest:
        """The body of `POST /v1/train`. `ledger`: what the server has recorded, where that is the source.

        Raises:
            BadInput: nothing to learn from, no or several behaviours, or values that do not go together.
        """
        taught = self.corrections if self.corrections is not None else (ledger or [])
        settings = self.settings
        objective = flags.objective or settings.objective
        where = "the ledger" if self.corrections is None else "the corrections"
        if objective == "sdft" and not any(c.feedback or c.chosen for c in taught):
            raise BadInput(
                f"{where}: {len(taught)} records, none says what was wrong (`feedback`)",
                "record one with `/why WHAT WAS WRONG` in `secondnature chat`, or give a file",
            )
        if objective != "sdft" and not any(c.chosen for c in taught):
            told = any(c.feedback for c in taught)
            raise BadInput(
                f"{where}: {len(taught)} records, none with a wanted answer (`chosen`)",
                "--objective sdft learns from what was said about the answers"
                if told
                else "record one with `/no WHAT I WANTED` in `secondnature chat`, or give a file",
            )
        behaviour = flags.behaviour or settings.behaviour or _only_behaviour(taught, self.probes)
        _check_probes(self.probes, behaviour)
        body: dict[str, Any] = settings.model_dump(
            exclude={"behaviour", "note", "replay", "optimizer", "gate", "guards"}, exclude_none=True
        )
        for key in ("objective", "max_steps", "until_margin", "until_passed", "batch_size", "seed"):
            if getattr(flags, key) is not None:
                body[key] = getattr(flags, key)
        body["optimizer"] = settings.optimizer or OptimizerSettings()
        if flags.lr is not None:
            body["optimizer"] = {**body["optimizer"].model_dump(), "lr": flags.lr}
        replay = settings.replay or ReplayShare()
        body["replay"] = {
            **replay.model_dump(exclude_none=True),
            "examples": self.replay,
            "prompts": self.replay_prompts,
        }
        body["gate"] = settings.gate or GateSettings()
        body["lesson"] = {"behaviour": behaviour, "note": settings.note or ""}
        source = {"ledger": True} if self.corrections is None else {"corrections": self.corrections}
        try:
            return TrainRequest.model_validate(
                {
                    **body,
                    **source,
                    "probes": self.probes,
                    "guards": self.guards(flags, behaviour),
                    "development": self.development,
                    "keep": flags.keep,
                    "dry_run": flags.dry_run,
                }
            )
        except ValidationError as e:
            raise BadInput(describe(e), f"check the options and {SETTINGS_FILE}") from None

    def guards(self, flags: LearnFlags, behaviour: str | None) -> Sequence[GuardPack]:
        """The packs that are asked too: those named, else the default ones where there are probes and no guards."""
        if flags.keep:
            return []
        if flags.guards is not None:
            return flags.guards
        if self.settings.guards is not None:
            return self.settings.guards
        unguarded = bool(self.probes) and all(p.behaviour == behaviour for p in self.probes)
        return DEFAULT_GUARDS if unguarded else []


def read_sources(path: Path | None, flags: LearnFlags) -> Sources:
    """Read and check every file of a lesson. `path`: a JSONL file, a directory, or None for the ledger.

    Raises:
        BadRecord: a file is missing or broken; says the file, the line and what is wrong.
        TooLarge: a line or a file over its limit.
    """
    if path is None:
        beside, corrections = None, None
    else:
        if path.is_dir():
            path = path / "corrections.jsonl"
            if not path.exists():
                raise BadRecord(
                    f"{path.parent}: no corrections.jsonl in this folder",
                    "give a folder that has one, or the JSONL file itself",
                )
        beside, corrections = path.parent, _read_corrections(path)
    given = "--probes" if flags.probes is not None else "--guards" if flags.guards else ""
    if flags.keep and given:
        raise BadInput(
            f"found both --keep and {given}", "with probes the gate decides; leave one of them out"
        )

    probes = flags.probes or (beside / "probes.jsonl" if beside is not None else None)

    def read(given: Path | None, name: str, kind: type[R]) -> list[R]:
        if given is not None:
            return read_jsonl(given, kind)
        if beside is not None and (beside / name).exists():
            return read_jsonl(beside / name, kind)
        return []

    return Sources(
        corrections=corrections,
        probes=[] if flags.keep else read(flags.probes, "probes.jsonl", Probe),
        development=read(flags.development, "development.jsonl", Probe),
        replay=read(flags.replay, "replay.jsonl", Correction),
        replay_prompts=_read_lines(flags.replay_prompts)
        if flags.replay_prompts is not None and flags.replay_prompts.suffix == ".txt"
        else read(flags.replay_prompts, "replay_prompts.jsonl", Prompt),
        settings=LessonFile() if beside is None else _read_settings(beside / SETTINGS_FILE),
        lines=None if path is None else line_numbers(path),
        probe_lines=None if flags.keep or probes is None or not probes.exists() else line_numbers(probes),
    )


def _read_corrections(path: Path) -> list[Correction]:
    """Raises BadRecord: what is wrong, and, where the file is of another shape, which, and who reads it."""
    try:
        return read_jsonl(path, Correction)
    except BadRecord as e:
        found = sight(path)
        if found is None:
            raise
        line = shlex.join(["secondnature", "import", str(path), "--out", "corrections.jsonl"])
        let = f"let it be read: {line}" if found.importable else found.to_do
        if found.direct:
            raise BadRecord(f"{e.message}; the file is {found.what}", f"{e.hint}; or {let}") from None
        raise BadRecord(
            f"{path} is {found.what}; `learn` reads a correction on each line, as JSON", let
        ) from None


def _read_lines(path: Path) -> list[Prompt]:
    """A prompt per line of a text file. Raises BadRecord: missing, not UTF-8, or nothing in it."""
    try:
        text = path.read_text(encoding="utf-8")
        found = [Prompt.model_validate(line.strip()) for line in text.split("\n") if line.strip()]
    except ValidationError as e:
        raise BadRecord(f"{path}: {describe(e)}", "a .txt file has one prompt per line") from None
    except (OSError, UnicodeDecodeError) as e:
        raise BadRecord(f"{path}: {e}", "check the path; a .txt file has one prompt per line") from None
    if not found:
        raise BadRecord(f"{path}: no prompts found; expected one per line", "is it the right file?")
    return found


def _read_settings(path: Path) -> LessonFile:
    try:
        return LessonFile.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return LessonFile()
    except ValidationError as e:
        raise BadRecord(f"{path}: {describe(e)}", "see docs/reference/files.md for the keys") from None
    except (OSError, ValueError, RecursionError) as e:  # ValueError: not TOML, or a number of too many digits
        raise BadRecord(f"{path}: {e}", "mend the file, or move it away") from None


def _only_behaviour(corrections: list[Correction], probes: list[Probe]) -> str | None:
    named = sorted({c.behaviour for c in corrections if c.behaviour is not None})
    if len(named) > 1:
        raise BadInput(
            f"the corrections name {len(named)} behaviours: {', '.join(named)}", "choose: --behaviour"
        )
    if not named and probes:
        known = ", ".join(sorted({p.behaviour for p in probes}))
        raise BadInput(
            "no behaviour is named, so the gate cannot know which probes must improve",
            f"--behaviour, one of: {known}",
        )
    return named[0] if named else None


def _check_probes(probes: list[Probe], behaviour: str | None) -> None:
    if probes and not any(p.behaviour == behaviour and p.side == "right" for p in probes):
        known = ", ".join(sorted({p.behaviour for p in probes}))
        raise BadInput(
            f"no probe measures `{behaviour}`; the probes measure: {known}", "--behaviour or --probes"
        )
