"""`secondnature learn`: the main job, from the corrections to the verdict (process D).

Read and check everything, find or start a server, hand it one `POST /v1/train` with the probes, follow the lesson
to its end, and say what came of it: a before/after table, one sentence, the report, the line that undoes.
"""

from __future__ import annotations

import json
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from secondnature.cli import FAILED, INCONCLUSIVE, INTERRUPTED
from secondnature.cli.connect import Server, Where, open_server
from secondnature.cli.follow import Interrupted, Interrupts, follow, why_stopped
from secondnature.cli.output import Output
from secondnature.cli.planned import show
from secondnature.cli.progress import waiting
from secondnature.cli.sources import LearnFlags, Sources, read_sources
from secondnature.errors import BadInput, SecondnatureError, StorageError, TrainingError, Unreachable
from secondnature.evidence.lint import Finding
from secondnature.records import Correction, LookMetric, kinds_of_doubt, to_jsonl
from secondnature.wire import Client, JobStatus, LessonDetail, TrainReply, TrainRequest

TRIAL_RATES = (1e-5, 1e-4, 1e-3)
"""Learning rates that `--calibrate` tries, smallest first."""
TRIAL_STEPS = 30
"""Steps of a trial run where no `max_steps` is given."""


def learn(
    source: Path | None, flags: LearnFlags, where: Where, report: Path, out: Output, *, calibrate: bool
) -> int:
    """Teach one lesson; the exit code: 0 kept, 1 undone, 2 no verdict, 130 ctrl-C.

    Raises:
        SecondnatureError: bad input (before anything was sent), no server, or what the server said.
    """
    with waiting(out, "reading the files"):
        sources = read_sources(source, flags)
    if not flags.dry_run:
        check_report_path(report)
    if flags.dry_run and calibrate:
        raise BadInput("--calibrate trains, and --dry-run does not", "leave one of them out")
    if sources.corrections is not None:
        sources.request(flags)  # what can be refused without a server is refused before one starts
    aims = (x for given in (flags, sources.settings) for x in (given.until_margin, given.until_passed))
    if calibrate and all(x is None for x in aims):
        raise BadInput(
            "--calibrate without a margin or a share to reach",
            "add --until-margin, e.g. --until-margin 2, or --until-passed 0.8 with --development",
        )
    if sources.corrections is not None:
        tell(sources.findings(), out)
    with open_server(where, out) as server, Interrupts() as interrupts:
        with waiting(out, "reading the ledger"):
            ledger = _ledger(server, out) if sources.corrections is None else None
        if ledger is not None:
            tell(sources.findings(ledger), out)
        request = sources.request(flags, ledger)
        if not flags.dry_run:
            _check_end(request, server)
        out.note(_announce(sources, request, len(ledger or []), server))
        if not flags.dry_run:  # which says them one by one
            _say_doubts(ledger or sources.corrections or [], out)
        try:
            if calibrate:
                request = _with_lr(request, _calibrated(server, request, out, interrupts))
            return teach(server, request, report, out, interrupts)
        except Interrupted as e:
            return interrupted(server, e.status, out)
        except KeyboardInterrupt:
            out.note("left at once; the lesson is undone when its lease ends or the server next starts")
            raise


def tell(findings: Sequence[Finding], out: Output) -> None:
    """What the lint found, a line each; it refuses nothing."""
    for finding in findings:
        out.note(f"lint: {finding}", style="yellow")


def teach(
    server: Server, request: TrainRequest, report: Path | None, out: Output, interrupts: Interrupts
) -> int:
    """Send one training request, follow it to its end and say how it ended; the exit code."""
    reply = submit(server.client, request, out)
    if reply.lesson is None:
        show(reply.plan or {}, out)
        out.result(reply)
        return 0
    judged = bool(request.probes or request.guards) or request.keep
    status = follow(server.client, reply.job, out, interrupts, judged=judged)
    detail = server.client.lesson(reply.lesson)
    if report is not None:
        try:
            write_report(detail, report, server.where)
        except SecondnatureError as e:  # the lesson has ended, and how it ended must be said
            out.note(f"no report: {e.type}: {e}", style="bold red")
            report = None
    return conclude(server, status, detail, report, out)


def submit(client: Client, request: TrainRequest, out: Output) -> TrainReply:
    """Hand in one training request. Where no answer comes it is sent once more, with the same idempotency key:
    there is one lesson, whether the first one had arrived or not.

    Raises:
        Unreachable: no answer again.
        SecondnatureError: what the server said.
    """
    if request.idempotency_key is None:
        request = request.model_copy(update={"idempotency_key": uuid.uuid4().hex})
    num = len(request.corrections or request.examples or [])
    with waiting(out, "planning the lesson" + (f" ({num:,} corrections)" if num else "")):
        try:
            return client.train(request)
        except Unreachable as e:
            out.note(f"{e.message}: asking once more (it cannot become two lessons)")
            try:
                return client.train(request)
            except Unreachable as e:
                raise Unreachable(
                    e.message, f"{e.hint}; `secondnature lessons log` says whether it was accepted"
                ) from None


def conclude(
    server: Server, status: JobStatus, detail: LessonDetail, report: Path | None, out: Output
) -> int:
    """Print how a lesson ended; the exit code."""
    lesson, evidence = detail.lesson, detail.evidence
    if evidence is not None:
        from secondnature.report.table import before_after_table
        from secondnature.report.words import losses, prompted

        out.say(before_after_table(evidence))
        if evidence.prompted is not None:
            out.say(prompted(evidence))
        for line in (line for c in evidence.comparisons for line in losses(c)):
            out.say(line, style="yellow")
    if lesson.kl:
        from secondnature.report.words import kl

        out.say(f"moved:  {kl(lesson.kl)}")
    found = [LookMetric.from_disk(m) for m in detail.metrics if m.get("kind") == "look"]
    if found:
        from secondnature.report.words import looks

        for line in looks(found):
            out.say(f"looks:  {line}")
    if evidence is not None:
        from secondnature.report.words import style

        for line in style(evidence.comparisons):
            out.say(f"style:  {line}")
    if lesson.stopped_by:
        steps = f"{lesson.steps:,} step{'s'[: lesson.steps != 1]}"
        out.say(f"trained: {steps}, then {why_stopped(lesson.stopped_by)}")
    if lesson.error is not None:
        out.say(f"{lesson.state}: {lesson.error.type}: {lesson.error.message}", style="bold red")
        if lesson.error.hint:
            out.say(f"  {lesson.error.hint}")
    else:
        said = evidence.sentence if evidence is not None else lesson.reason
        out.say(
            f"{lesson.id} {lesson.state.replace('_', ' ')}: {said or 'no probes were asked'}", style="bold"
        )
    revert = server.command("lessons", "revert", lesson.id)
    if lesson.state == "kept":
        out.say(f"undo:   {revert}")
    elif lesson.state == "on_trial":
        until = f" until {lesson.trial_until:%Y-%m-%d %H:%M:%S %Z}" if lesson.trial_until else ""
        out.say(f"on trial{until}, then undone")
        out.say(f"keep:   {server.command('lessons', 'keep', lesson.id)}")
        out.say(f"undo:   {revert}")
    else:
        out.say(f"the weights are as before (version {status.weights_version})")
    if report is not None:
        out.say(f"report: {report}")
    out.result(
        {
            "lesson": lesson.model_dump(mode="json"),
            "evidence": evidence.model_dump(mode="json") if evidence is not None else None,
            "weights_version": status.weights_version,
            "report": str(report) if report is not None else None,
            "undo": revert if lesson.state in ("kept", "on_trial") else None,
        }
    )
    return verdict_code(detail)


def verdict_code(detail: LessonDetail) -> int:
    """0 kept, 1 undone, failed or cancelled, 2 inconclusive or still on trial."""
    if detail.lesson.state == "kept":
        return 0
    if detail.lesson.verdict == "inconclusive" or detail.lesson.state == "on_trial":
        return INCONCLUSIVE
    return FAILED


def interrupted(server: Server, status: JobStatus, out: Output) -> int:
    """Say how a job stands after ctrl-C; the exit code."""
    if status.state == "kept":
        out.note(f"it had been kept already; undo it: {server.command('lessons', 'revert', status.lesson)}")
    else:
        out.note(f"undone; the weights are as before (version {status.weights_version})")
    out.result(status)
    return INTERRUPTED


def check_report_path(report: Path) -> None:
    """Refuse a place where no report can be written, before anything is trained.

    Raises:
        BadInput: it is a folder, or its folder does not exist.
    """
    if report.is_dir():
        raise BadInput(f"--report {report}: is a folder", "name a file, e.g. report.html")
    if not report.absolute().parent.is_dir():
        raise BadInput(
            f"--report {report}: no folder {report.parent}", "make it first, or choose another path"
        )


def write_report(detail: LessonDetail, report: Path, where: Where) -> None:
    """Draw the report of one lesson from what the server says of it; its commands lead to that server.

    Raises:
        StorageError: the report could not be written. The lesson's end is not touched by that.
    """
    from secondnature.report import write

    with tempfile.TemporaryDirectory(prefix="secondnature-") as name:
        try:
            write(write_run(detail, Path(name)), report, where.flags())
        except OSError as e:
            raise StorageError(
                f"{report}: {e.strerror or e}",
                "is there room, and may you write there?",
            ) from None


def write_run(detail: LessonDetail, folder: Path) -> Path:
    """What a server says of a lesson as a run directory, which is all that a report reads; the folder."""
    _put(folder / "lesson.json", detail.lesson.model_dump_json())
    if detail.evidence is not None:
        _put(folder / "evidence.json", detail.evidence.model_dump_json())
    _put(folder / "corrections.jsonl", to_jsonl(detail.corrections))
    _put(folder / "metrics.jsonl", _lines(detail.metrics))
    _put(folder / "answers.jsonl", _lines(detail.answers))
    return folder


def _put(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _announce(sources: Sources, request: TrainRequest, num_ledger: int, server: Server) -> str:
    count = num_ledger if sources.corrections is None else len(sources.corrections)
    where = "from the ledger" if sources.corrections is None else ""
    parts = [f"{request.lesson.behaviour or 'lesson'}: {count} corrections {where}".rstrip()]
    parts += [f"{len(sources.probes)} probes"] if sources.probes else ["no probes"]
    parts += [f"guards: {', '.join(f'pack:{name}' for name in request.guards)}"] if request.guards else []
    parts += [f"{len(sources.development)} development probes"] if sources.development else []
    parts += [f"{len(sources.replay)} replay examples"] if sources.replay else []
    parts += [f"{len(sources.replay_prompts)} replay prompts"] if sources.replay_prompts else []
    return ", ".join(parts) + f"; weights {server.health.weights_version}"


def _say_doubts(corrections: list[Correction], out: Output) -> None:
    """What may be meant otherwise than it is taken, by its kind."""
    for kind, number in kinds_of_doubt(corrections).items():
        out.note(f"{number:,} of {len(corrections):,}: {kind} (--dry-run shows it)", style="yellow")


def _ledger(server: Server, out: Output) -> list[Correction]:
    """What the server has recorded; what it cannot read is said. Raises BadInput: it can read nothing."""
    found = server.client.ledger()
    if found.unreadable:
        first = found.unreadable[0]
        many = f"{len(found.unreadable)} lines" if len(found.unreadable) > 1 else "1 line"
        text = f"{many} of the ledger cannot be read (line {first.line}: {first.reason})"
        if not found.corrections:
            raise BadInput(
                f"{text}, and it has no others", "upgrade the server, or mend ledger.jsonl in its home"
            )
        out.note(f"{text}: left out", style="yellow")
    return found.corrections


def _check_end(request: TrainRequest, server: Server) -> None:
    """A lesson without probes waits for somebody's word; a server that ends with the command cannot wait."""
    if server.started and not (request.probes or request.guards) and not request.keep:
        raise BadInput(
            "no probes: the lesson would end with the server that this command started",
            "give --probes or --guards facts, or --keep to keep it unjudged, or run `secondnature serve` first",
        )


def _with_lr(request: TrainRequest, lr: float) -> TrainRequest:
    optimizer = request.optimizer.model_copy(update={"lr": lr})
    return request.model_copy(update={"optimizer": optimizer})


def _calibrated(server: Server, request: TrainRequest, out: Output, interrupts: Interrupts) -> float:
    """The smallest of `TRIAL_RATES` that reaches what was asked for in a short lesson; every one of them is undone.

    Raises:
        TrainingError: none of them does.
    """
    steps = request.max_steps or TRIAL_STEPS
    what = " and ".join(
        name
        for name, asked in (("margin", request.until_margin), ("share", request.until_passed))
        if asked is not None
    )
    for lr in TRIAL_RATES:
        lesson = request.lesson.model_copy(update={"note": f"trial run at lr {lr:g}"})
        changes: dict[str, Any] = {
            "probes": [],
            "guards": [],
            "keep": False,
            "max_steps": steps,
            "lesson": lesson,
        }
        reply = submit(server.client, _with_lr(request, lr).model_copy(update=changes), out)
        assert reply.lesson is not None
        status = follow(server.client, reply.job, out, interrupts, judged=False)
        detail = server.client.lesson(reply.lesson)
        if status.state == "on_trial":
            server.client.revert(reply.lesson)
        reached = status.state == "on_trial" and detail.lesson.stopped_by.startswith("until_")
        out.note(
            f"trial run: lr {lr:g}, {detail.lesson.steps} steps, {what} {'' if reached else 'not '}reached; undone"
        )
        if reached:
            return lr
    raise TrainingError(
        f"no learning rate of {', '.join(f'{lr:g}' for lr in TRIAL_RATES)} reached the {what} in {steps} steps; "
        "the weights are as before",
        "raise --max-steps, lower --until-margin or --until-passed, or set --lr yourself",
    )
