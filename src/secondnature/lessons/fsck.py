"""Everything in a home, read strictly: what is not as it was written? (its own process; reads only)

A server mends what a crash may leave and passes over what it can do without; here every file is looked at, and what
is wrong with it is said, with what to do. Checksums, content ids, digests and recomputed figures tell of a changed
byte; a file that has none of these (the ledger, settings, metrics, answers) tells only of what it cannot be.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import ValidationError

from secondnature import storage
from secondnature.config import MIN_KEY_CHARACTERS
from secondnature.errors import SecondnatureError
from secondnature.evidence.certificate import verify
from secondnature.lessons.exports import EXPORTS_FILE
from secondnature.lessons.job import Phase
from secondnature.lessons.ledger import read_line
from secondnature.lessons.log import DELTA_FILE, MOVED_FILE, OPTIMIZER_FILE, PROBES_FILE
from secondnature.records import (
    OPEN_STATES,
    Correction,
    Evidence,
    Export,
    Lesson,
    Moved,
    Probe,
    SampleAnswer,
    describe,
    read_jsonl,
)
from secondnature.records.migrations import migrate
from secondnature.weights import checkpoint, delta
from secondnature.weights.content import BLOCK_BYTES, Named, content_id
from secondnature.weights.tensor_file import DTYPES, read_places
from secondnature.weights.updates import UPDATE_FILE, read_update
from secondnature.wire import PhaseProgress

__all__ = ["Found", "OnProgress", "Wrong", "read_home"]

OnProgress = Callable[[str, PhaseProgress | None], None]
BACKUP = "restore it from a backup"
PROBLEMS = (SecondnatureError, OSError, ValueError, LookupError, TypeError, RecursionError)
"""What reading a damaged file may raise."""


@dataclass(frozen=True)
class Wrong:
    """Something that is to be said of a file."""

    file: str
    """Below the home."""
    level: Literal["damaged", "note"]
    """A note asks for nothing: what a crash may leave, and the next start sees to."""
    found: str
    do: str


@dataclass
class Found:
    """What was read, and what was wrong with it."""

    findings: list[Wrong] = field(default_factory=list[Wrong])
    num_files: int = 0
    num_lessons: int = 0
    weights_version: str = ""
    """Of the kept weights, where the disk was seen to give them."""


def read_home(home: Path, on_progress: OnProgress) -> Found:
    """Read all of a home. Nothing is written; whoever calls holds its lock."""
    return _Reader(home, on_progress).read()


class _Reader:
    def __init__(self, home: Path, on_progress: OnProgress) -> None:
        self._home = home
        self._on_progress = on_progress
        self._found = Found()
        self._known: dict[str, Any] = {}
        self._lessons: dict[str, Lesson] = {}
        self._sound: dict[str, delta.StoredDelta] = {}
        """Deltas that have their checksum, by the lesson in whose directory they lie."""

    def read(self) -> Found:
        self._each(
            "reading the home",
            [self._read_home, self._read_keys, self._read_settings, self._read_ledger, self._read_exports],
        )
        lessons = self._home / "lessons"
        directories = sorted(p for p in lessons.iterdir() if p.is_dir()) if lessons.is_dir() else []
        directories = [p for p in directories if not p.name.startswith(".")]
        self._found.num_lessons = len(directories)
        self._each("reading lessons", [lambda d=d: self._read_lesson(d) for d in directories])
        self._check_order()
        self._read_heavy("reading deltas", DELTA_FILE, self._read_delta)
        self._read_heavy("reading optimizer states", OPTIMIZER_FILE, self._read_state)
        self._read_heavy("reading updates", UPDATE_FILE, self._read_update)
        self._read_weights()
        return self._found

    # ------------------------------------------------------------------------------------------ saying it

    def _wrong(self, path: Path, found: object, do: str = BACKUP, *, note: bool = False) -> None:
        text = str(found.message if isinstance(found, SecondnatureError) else found).split("\n")[0]
        text = text.removeprefix(f"{path}: ").removeprefix(f"{path}, ")
        level: Literal["damaged", "note"] = "note" if note else "damaged"
        self._found.findings.append(Wrong(self._name(path), level, text, do))

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self._home)) if path.is_relative_to(self._home) else str(path)

    def _each(self, phase: str, parts: list[Callable[[], None]]) -> None:
        state = Phase(phase, "lessons" if phase == "reading lessons" else "files")
        for done, part in enumerate(parts):
            state = state.counted(done, len(parts))
            self._on_progress(phase, state.progress())
            part()
        self._on_progress(phase, state.counted(len(parts), len(parts)).progress())

    def _json(self, path: Path) -> Any:
        """What a JSON file holds, or None where it is not there or damaged, which was said then."""
        if not path.is_file():
            return None
        self._found.num_files += 1
        try:
            return json.loads(path.read_bytes())
        except PROBLEMS as e:
            self._wrong(path, f"not JSON ({e})")
            return None

    # ------------------------------------------------------------------------------------------ the home's own

    def _read_home(self) -> None:
        path = self._home / "home.json"
        raw = self._json(path)
        if raw is None:
            if not path.is_file():
                self._wrong(path, "missing: which model the home belongs to is not known")
            return
        try:
            self._known = migrate("home", raw, str(path))
        except PROBLEMS as e:
            self._wrong(path, e)
            return
        if self._known.get("engine") not in ("local", "vllm"):
            self._wrong(path, f"engine {self._known.get('engine')!r}; expected local or vllm")
        for name in ("model", "fingerprint", "base_version"):
            if not isinstance(self._known.get(name), str):
                self._wrong(path, f"`{name}` is {self._known.get(name)!r}; expected text")

    def _read_keys(self) -> None:
        for name in ("key", "correction_key"):
            self._read_key(self._home / name)

    def _read_key(self, path: Path) -> None:
        if not path.is_file():
            return
        self._found.num_files += 1
        text, do = path.read_bytes().strip(), "delete it: the next start makes a new one"
        if len(text) < MIN_KEY_CHARACTERS or not all(33 <= byte < 127 for byte in text):
            self._wrong(
                path, f"{len(text)} bytes that are not {MIN_KEY_CHARACTERS} or more printable ones", do
            )

    def _read_settings(self) -> None:
        path = self._home / "settings.json"
        found = self._json(path)
        if found is not None and not isinstance(found, dict):
            self._wrong(path, "not a JSON object", "nothing: the next start writes it anew")

    def _read_ledger(self) -> None:
        path = self._home / "ledger.jsonl"
        if not path.is_file():
            return
        self._found.num_files += 1
        lines = storage.read_lines(path)
        for line in lines.skipped:
            if line.torn:
                text = f"line {line.number}: torn by a crash, and never acknowledged"
                self._wrong(path, text, "nothing: it is cut off before the next correction", note=True)
            else:
                self._wrong(path, f"line {line.number}: {line.reason}", "mend that line, or restore the file")
        for number, raw in lines.values:
            try:
                read_line(raw)
            except ValidationError as e:
                self._wrong(path, f"line {number}: {describe(e)}", "mend that line, or restore the file")
            except SecondnatureError as e:
                self._wrong(path, f"line {number}: {e.message}", e.hint)

    def _read_exports(self) -> None:
        path = self._home / EXPORTS_FILE
        if not path.is_file():
            return
        self._found.num_files += 1
        try:
            lines = storage.read_durable(path)
            for line in lines.skipped:
                text = f"line {line.number}: torn by a crash; what it was to note has no name yet"
                self._wrong(path, text, "nothing: it is cut off before the next export", note=True)
            self._records(path, lines.values, Export)
        except PROBLEMS as e:
            self._wrong(path, e)

    # ------------------------------------------------------------------------------------------ lessons

    def _read_lesson(self, directory: Path) -> None:
        path = directory / "lesson.json"
        if not path.is_file():
            self._wrong(path, "missing: the home is short of a lesson")
        raw = self._json(path)
        lesson = None
        try:
            if raw is not None:
                lesson = Lesson.from_disk(migrate("lesson", raw, str(path)))
        except ValidationError as e:
            self._wrong(path, describe(e))
        except PROBLEMS as e:
            self._wrong(path, e)
        if lesson is not None:
            if lesson.id != directory.name or not lesson.id.startswith(f"{lesson.number:04d}-"):
                self._wrong(path, f"says that it is {lesson.id}, number {lesson.number}")
            self._lessons[directory.name] = lesson
            if lesson.state in OPEN_STATES:
                state = lesson.state.replace("_", " ")
                self._wrong(path, f"still {state}", "nothing: the next start undoes it", note=True)
        self._read_evidence(directory, lesson)
        self._read_probes(directory)
        self._read_corrections(directory, lesson)
        self._read_rest(directory)

    def _read_evidence(self, directory: Path, lesson: Lesson | None) -> None:
        path = directory / "evidence.json"
        raw = self._json(path)
        if raw is None:
            return
        try:
            evidence = Evidence.from_disk(raw)
            verify(evidence)
        except ValidationError as e:
            self._wrong(path, describe(e))
            return
        except PROBLEMS as e:
            self._wrong(path, e)
            return
        if lesson is not None and lesson.verdict is not None:
            mine = (evidence.verdict, evidence.before_version, evidence.after_version)
            entry = (lesson.verdict, lesson.parent, lesson.version)
            if mine != entry:
                self._wrong(path, f"says {mine} (verdict, before, after); the entry says {entry}")

    def _read_corrections(self, directory: Path, lesson: Lesson | None) -> None:
        path = directory / "corrections.jsonl"
        wanted = lesson.cause.corrections if lesson is not None else []
        if not path.is_file():
            if wanted:
                self._wrong(path, "missing: what the lesson taught cannot be replayed")
            return
        self._found.num_files += 1
        try:
            found = [c.digest() for c in read_jsonl(path, Correction, own=True)]
        except PROBLEMS as e:
            self._wrong(path, e)
            return
        if wanted and found != wanted:
            self._wrong(path, "not the corrections whose digests the entry has")

    def _read_probes(self, directory: Path) -> None:
        path = directory / PROBES_FILE
        if path.is_file():
            self._found.num_files += 1
            try:
                read_jsonl(path, Probe, own=True)
            except PROBLEMS as e:
                self._wrong(path, e)

    def _read_rest(self, directory: Path) -> None:
        path = directory / MOVED_FILE
        moved = self._json(path)
        self._records(path, enumerate(cast("list[Any]", moved) if isinstance(moved, list) else []), Moved)
        path = directory / "answers.jsonl"
        if path.is_file():
            self._found.num_files += 1
            try:
                self._records(path, storage.read_durable(path).values, SampleAnswer)
            except PROBLEMS as e:
                self._wrong(path, e)
        path = directory / "metrics.jsonl"
        if path.is_file():
            self._found.num_files += 1
            skipped = storage.read_lines(path).skipped
            if skipped:
                lines = ", ".join(str(line.number) for line in skipped[:5])
                text = f"{len(skipped)} lines cannot be read ({lines}): {skipped[0].reason}"
                self._wrong(path, text, "nothing: they are left out of curves", note=True)

    def _records(
        self, path: Path, values: Iterable[tuple[int, Any]], kind: type[Export | Moved | SampleAnswer]
    ) -> None:
        for number, raw in values:
            try:
                kind.from_disk(raw)
            except ValidationError as e:
                self._wrong(path, f"entry {number}: {describe(e)}")
                return

    def _kept(self) -> list[Lesson]:
        return sorted((x for x in self._lessons.values() if x.state == "kept"), key=lambda x: x.number)

    def _check_order(self) -> None:
        """Each kept entry starts from the weights at which the one before it ended."""
        version = self._known.get("base_version")
        for lesson in self._kept():
            path = self._home / "lessons" / lesson.id / "lesson.json"
            if lesson.version is None or lesson.parent != version:
                self._wrong(path, f"starts from {lesson.parent}; the weights before it are {version}")
            if lesson.kind == "revert" and lesson.reverts not in self._lessons:
                self._wrong(path, f"takes {lesson.reverts} back, which is not there")
            version = lesson.version

    # ------------------------------------------------------------------------------------------ weights

    def _read_heavy(
        self, phase: str, name: str, read: Callable[[Lesson, Path, Callable[[int], None]], None]
    ) -> None:
        """Call `read` for each lesson that has such a file or should have it; counted in MB."""
        paths = [(x, self._home / "lessons" / i / name) for i, x in sorted(self._lessons.items())]
        total = sum(p.stat().st_size for _, p in paths if p.is_file())
        state, done = Phase(phase, "MB"), 0

        def count(nbytes: int) -> None:
            nonlocal state, done
            done += nbytes
            state = state.counted(done // 10**6, max(1, total // 10**6))
            self._on_progress(phase, state.progress())

        for lesson, path in paths:
            self._found.num_files += path.is_file()
            read(lesson, path, count)

    def _read_delta(self, lesson: Lesson, path: Path, count: Callable[[int], None]) -> None:
        if not path.is_file():
            if lesson.kind != "revert" and lesson.state == "kept" and not lesson.delta_pruned:
                self._wrong(path, "missing, and nobody pruned it: the lesson cannot be taken back")
            return
        try:
            stored = delta.open_(path, lesson.delta_sha256)
            if lesson.state == "kept" and (stored.base, stored.result) != (lesson.parent, lesson.version):
                self._wrong(path, f"leads from {stored.base} to {stored.result}, and not as its entry says")
            else:
                self._sound[lesson.id] = stored
        except PROBLEMS as e:
            self._wrong(path, e)
        count(path.stat().st_size)

    def _read_state(self, lesson: Lesson, path: Path, count: Callable[[int], None]) -> None:
        if not path.is_file():
            kept = self._kept()
            if kept and kept[-1].optimizer_after == lesson.id:
                self._wrong(path, "missing: the next lesson has to start from this optimizer state")
            return
        self._compare_file(path, lesson.optimizer_sha256, count, lambda: read_places(path))

    def _read_update(self, lesson: Lesson, path: Path, count: Callable[[int], None]) -> None:
        if path.is_file():
            read = lambda: [name for name, _ in read_update(path.parent)]  # noqa: E731
            self._compare_file(path, lesson.update_sha256, count, read)
        elif lesson.update_sha256 and lesson.state == "kept" and not lesson.delta_pruned:
            self._wrong(path, "missing, and nobody pruned it: the lesson cannot be merged or scaled")

    def _compare_file(
        self, path: Path, wanted: str | None, count: Callable[[int], None], read: Callable[[], object]
    ) -> None:
        """Its checksum, and what `read` finds."""
        hasher = hashlib.sha256()
        try:
            with path.open("rb") as file:
                while block := file.read(BLOCK_BYTES):
                    hasher.update(block)
                    count(len(block))
            if wanted not in (None, hasher.hexdigest()):
                self._wrong(path, f"checksum {hasher.hexdigest()[:12]}; expected {str(wanted)[:12]}")
            read()
        except Exception as e:  # noqa: BLE001  (the library of the format has exceptions of its own)
            self._wrong(path, e)

    def _read_weights(self) -> None:
        """The working copy, and the chain of all that is in force, from the model's own weights on."""
        model, base = Path(str(self._known.get("model", ""))), str(self._known.get("base_version", ""))
        kept = self._kept()
        self._found.weights_version = str(kept[-1].version) if kept else base
        copy = checkpoint.current(self._home / "model")
        held, version = 0, base
        if copy is not None:
            self._found.num_files += sum(p.is_file() for p in copy.iterdir())
            try:
                note = checkpoint.state(copy)
                held, version = int(note["lesson"]), str(note["version"])
                self._compare(copy, "reading the working copy", copy, [], version)
            except PROBLEMS as e:
                self._wrong(copy, e, "restore it; or remove `model/current`, where all deltas are there")
                copy = None
        elif (self._home / "model" / "current").is_symlink():
            self._wrong(self._home / "model" / "current", "leads nowhere")
        whole = self._chain(0)
        inside_vllm = self._known.get("engine") == "vllm" and copy is not None
        if (
            not inside_vllm
            and (model / "config.json").is_file()
            and all(self._owner(x) in self._sound for x in whole)
        ):
            self._replay(model, base, whole)
        elif copy is not None:
            self._replay(copy, version, self._chain(held))
        else:
            self._wrong(model, "the model is not there, and there is no working copy", "bring the model back")
            self._found.weights_version = ""

    def _chain(self, held: int) -> list[Lesson]:
        chain: list[Lesson] = []
        for lesson in self._kept():
            if lesson.number > held:
                if chain and lesson.reverts == chain[-1].id:
                    chain.pop()
                else:
                    chain.append(lesson)
        return chain

    def _owner(self, lesson: Lesson) -> str:
        """The entry in whose directory a delta lies."""
        while lesson.kind == "revert" and lesson.reverts in self._lessons:
            lesson = self._lessons[str(lesson.reverts)]
        return lesson.id

    def _replay(self, source: Path, version: str, chain: list[Lesson]) -> None:
        lessons = self._home / "lessons"
        missing = [x for x in chain if self._owner(x) not in self._sound]
        for lesson in missing:  # why is said already
            path = lessons / lesson.id / "lesson.json"
            self._wrong(
                path, "its delta is damaged or gone: the kept weights cannot be rebuilt from the disk"
            )
        if missing:
            self._found.weights_version = ""
            return
        links = [
            delta.Link(self._sound[self._owner(x)], str(x.parent), str(x.version), f"lesson {x.id}")
            for x in chain
        ]
        try:
            self._compare(source, "replaying the chain", source, links, version)
        except PROBLEMS as e:
            if self._known.get("engine") == "vllm" and source == Path(str(self._known.get("model"))):
                do = "serve the home: vLLM holds some models in other dtypes than their files, and compares itself"
                self._wrong(source, e, do, note=True)
            else:
                self._wrong(lessons if links else source, e)
            self._found.weights_version = ""

    def _compare(self, path: Path, phase: str, source: Path, links: list[delta.Link], version: str) -> None:
        """Read weights through a chain; every content id on the way is computed. Raises: they are others."""
        total = len(checkpoint.specs(source))
        state = Phase(phase, "tensors")

        def counted(weights: Iterator[Named]) -> Iterator[Named]:
            nonlocal state
            for done, pair in enumerate(weights):
                state = state.counted(done, total)
                self._on_progress(phase, state.progress())
                yield pair

        stream = checkpoint.stream(
            source, _stored_dtypes(source) if self._known.get("engine") == "vllm" else None
        )
        wanted = links[-1].after if links else version
        found = content_id(counted(delta.replayed(stream, links, source_id=version)), like=wanted)
        if found != wanted:
            raise ValueError(f"gives the weights {found}; expected {wanted}")
        self._on_progress(phase, state.counted(total, total).progress())


def _stored_dtypes(directory: Path) -> dict[str, Any]:
    """The dtypes of the files: vLLM's arena keeps some that are not bf16, and so does its working copy."""
    known = {name: dtype for dtype, name in DTYPES.items()}
    found: dict[str, Any] = {}
    for name, spec in checkpoint.specs(directory).items():
        place = read_places(spec.file)[0].get(spec.key)
        if place is not None and place.dtype in known:
            found[name] = known[place.dtype]
    return found
