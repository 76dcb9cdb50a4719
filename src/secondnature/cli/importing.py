"""`secondnature import`: people's files into the ledger, or into a JSONL of corrections (process D).

Everything is read, counted and shown before a byte is written or sent. The same file again adds nothing: a
record that is there already is known by what it says.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from secondnature import storage
from secondnature.cli.connect import Start, Where, open_server
from secondnature.cli.output import Output
from secondnature.cli.progress import counting, waiting
from secondnature.errors import BadInput, BadRecord, SecondnatureError, TooLarge
from secondnature.importers import Context, Options, Plan, read_into, recognise
from secondnature.records import Correction, Message, read_jsonl
from secondnature.wire import Client, CorrectionsReply, ImportRequest, PhaseProgress

__all__ = ["Chosen", "import_files", "parse_map", "show_record"]

BATCH_RECORDS = 1000
BATCH_BYTES = 4_000_000
"""Of a request: a quarter of a body's usual limit; a smaller limit is found by halving."""
SHOWN_REASONS = 20
SHOWN_CHARACTERS = 300
"""Of a long text, in an example."""
FIELDS = ("prompt", "said", "chosen", "rejected", "feedback", "rating", "system", "id")


@dataclass(frozen=True)
class Chosen:
    """The options of `import` that say what is read and where it goes."""

    options: Options = field(default_factory=Options)
    form: str | None = None
    yes: bool = False
    skip_bad: bool = False
    out_file: Path | None = None
    start: Start = "known"


def parse_map(text: str | None) -> dict[str, str]:
    """`--map answer=rejected,correction=chosen`: column -> field.

    Raises:
        BadInput: not of this form, or no such field.
    """
    found: dict[str, str] = {}
    for pair in (text or "").split(","):
        column, _, name = (p.strip() for p in pair.partition("="))
        if not pair.strip():
            continue
        if not column or name not in FIELDS:
            raise BadInput(
                f"--map {pair!r}: expected COLUMN=FIELD",
                f"fields: {', '.join(FIELDS)}; several: a=said,b=chosen",
            )
        found[column] = name
    return found


def import_files(paths: list[Path], chosen: Chosen, where: Where, out: Output) -> int:
    """Read files, show what they hold, ask, and add it.

    Raises:
        BadRecord: a file or a row that cannot be taken; nothing was written.
        BadInput: nobody was there to be asked.
    """
    if chosen.out_file is not None and chosen.out_file.resolve() in {p.resolve() for p in paths}:
        raise BadInput(f"--out {chosen.out_file} is one of the files that are read", "give another name")
    plan = recognise(paths, chosen.options, chosen.form)
    with tempfile.TemporaryFile() as spool:
        with waiting(out, "reading", _rate(plan)):
            read_into(spool, plan, Context(chosen.options))
        _show(plan, where, out)
        if plan.num_bad and not chosen.skip_bad:
            place, why = plan.reasons[0]
            raise BadRecord(
                f"{plan.num_bad:,} of {plan.num_rows:,} rows cannot be taken (the first: {place}: {why}); "
                "nothing was written",
                "mend them, or leave them out: --skip-bad",
            )
        if not plan.num_records:
            out.note("nothing to add")
            out.result(_result(plan, added=0, known=0))
            return 0
        _ask(plan, chosen, out)
        spool.seek(0)
        if chosen.out_file is not None:
            added, known = _write(spool, chosen.out_file)
            target = str(chosen.out_file)
        else:
            with open_server(where, out, start=chosen.start) as server:
                added, known = _send(spool, plan.num_records, server.client, out)
                target = "the ledger"
                if plan.num_candidates:
                    out.note(f"look at the candidates: {server.command('review')}")
    again = f"; {known:,} were there already" if known else ""
    out.say(f"{added:,} added to {target}{again}")
    out.result(_result(plan, added=added, known=known))
    return 0


def _rate(plan: Plan) -> Any:
    begun = time.monotonic()

    def ask() -> PhaseProgress:
        done, total = plan.read_bytes()
        took = time.monotonic() - begun
        rate = done / took / 1e6 if done else None
        left = max(0.0, (total - done) / 1e6 / rate) if rate else None
        return PhaseProgress(
            done=done // 1_000_000, total=total // 1_000_000, unit="MB", per_s=rate, eta_s=left
        )

    return ask


# ------------------------------------------------------------------------------------------------- what is shown


def _show(plan: Plan, where: Where, out: Output) -> None:
    for source in plan.sources[:SHOWN_REASONS]:
        out.say(f"{source.part.name}: {source.seen}")
    if len(plan.sources) > SHOWN_REASONS:
        out.say(f"... and {len(plan.sources) - SHOWN_REASONS:,} more files")
    kinds = ", ".join(f"{n:,} {kind}" for kind, n in plan.kinds.most_common())
    out.say(f"{plan.num_rows:,} rows -> {plan.num_records:,} records" + (f": {kinds}" if kinds else ""))
    if plan.num_candidates:
        told = "candidates: not taught before `secondnature review` keeps them"
        out.say(f"{plan.num_candidates:,} of them {where.complete(told)}")
    if plan.num_duplicates:
        out.say(f"{plan.num_duplicates:,} say what another one says, and count once")
    for what, number in plan.passed_over.items():
        out.say(f"passed over: {number:,} {what}")
    for what, number in sorted((+plan.doubts).items()):
        out.say(f"look at these: {number:,} record{'s'[: number != 1]}: {what}", style="yellow")
    if plan.unused:
        names = ", ".join(f"`{name}` ({n:,})" for name, n in sorted(plan.unused.items())[:SHOWN_REASONS])
        out.say(f"columns that are not used: {names}")
    if plan.skipped:
        out.say(f"files of which nothing is known: {', '.join(plan.skipped[:SHOWN_REASONS])}")
    if plan.num_bad:
        out.say(f"{plan.num_bad:,} rows cannot be taken:", style="yellow")
        for place, why in plan.reasons[:SHOWN_REASONS]:
            out.say(f"  {place}: {why}")
        if plan.num_bad > SHOWN_REASONS:
            out.say(f"  ... and {plan.num_bad - SHOWN_REASONS:,} more")
    for number, correction in enumerate(plan.examples, start=1):
        out.say(f"\nexample {number} of {len(plan.examples)}", style="bold")
        show_record(correction, out)


def show_record(correction: Correction, out: Output, *, shown_turns: int = 3, whole: bool = False) -> None:
    """A record for people: the end of the conversation, what was said, wanted, judged worse, commented."""
    earlier = len(correction.prompt) - shown_turns
    if earlier > 0:
        out.say(f"  ({earlier} earlier turns)", style="dim")
    for message in correction.prompt[-shown_turns:]:
        _line(message.role, message.content, out, whole)
    if correction.said is not None:
        _line("said", _text(correction.said), out, whole)
    if correction.chosen is not None:
        _line("wanted", _text(correction.chosen), out, whole)
    if correction.rejected is not None and correction.rejected != correction.said:
        _line("worse", _text(correction.rejected), out, whole)
    if correction.feedback is not None:
        _line("comment", correction.feedback, out, whole)
    if correction.rating is not None:
        _line("rating", f"{correction.rating:+d}", out, whole)
    if correction.provenance is not None and correction.provenance.source:
        line = f", {correction.provenance.line}" if correction.provenance.line else ""
        _line("from", f"{correction.provenance.source}{line}", out, whole)


def _text(answer: list[Message]) -> str:
    return answer[0].content


def _line(name: str, text: str, out: Output, whole: bool) -> None:
    text = text.strip()
    if not whole and len(text) > SHOWN_CHARACTERS:
        text = f"{text[:SHOWN_CHARACTERS]} ... ({len(text):,} characters)"
    out.say(f"  {name:>9}: " + text.replace("\n", "\n" + " " * 13))


def _ask(plan: Plan, chosen: Chosen, out: Output) -> None:
    """Raises BadInput: the answer was no, or nobody is there to give one."""
    if chosen.yes:
        return
    if not (sys.stdin.isatty() and out.err.is_terminal):
        raise BadInput(
            "nothing was written: there is no terminal on which to ask", "--yes says yes beforehand"
        )
    target = chosen.out_file or "the ledger"
    out.note(f"\nadd {plan.num_records:,} records to {target}? [y/N] ", end="")
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise BadInput("nothing was written: the answer was no")


def _result(plan: Plan, *, added: int, known: int) -> dict[str, Any]:
    return {
        "files": [
            {"name": s.part.name, "container": s.part.container, "format": s.shape.name} for s in plan.sources
        ],
        "rows": plan.num_rows,
        "records": plan.num_records,
        "candidates": plan.num_candidates,
        "duplicates": plan.num_duplicates,
        "kinds": dict(plan.kinds),
        "bad": plan.num_bad,
        "reasons": [{"source": p.source, p.unit: p.number, "reason": why} for p, why in plan.reasons],
        "unused": plan.unused,
        "passed_over": plan.passed_over,
        "doubts": dict(+plan.doubts),
        "skipped": plan.skipped,
        "added": added,
        "known": known,
    }


# --------------------------------------------------------------------------------------------- where it goes


def _write(spool: IO[bytes], path: Path) -> tuple[int, int]:
    """Append to a file what it does not hold yet: (added, known).

    Raises:
        BadRecord: the file is there and holds something else.
        StorageError: the disk refused.
    """
    known: set[str] = set()
    before = b""
    if path.exists() and path.stat().st_size:
        known = {c.identity() for c in read_jsonl(path, Correction)}
        before = path.read_bytes().rstrip(b"\n") + b"\n"
    added = again = 0
    with storage.storage_errors(path), storage.writing(path) as file:
        file.write(before)
        for line in spool:
            if known and Correction.model_validate_json(line).identity() in known:
                again += 1
                continue
            added += 1
            file.write(line)
    return added, again


def _send(spool: IO[bytes], total: int, client: Client, out: Output) -> tuple[int, int]:
    """Add to the ledger: (added, known)."""
    outcomes: Counter[str] = Counter()
    sent = 0
    try:
        with counting(out, "sending", total, "records") as tick:
            for batch in _batches(spool):
                outcomes.update(_send_batch(client, batch))
                sent += len(batch)
                for _ in batch:
                    tick()
    except SecondnatureError:
        if sent:
            out.note(
                f"{sent:,} of {total:,} were added; the same command again adds the rest", style="yellow"
            )
        raise
    return total - outcomes["known"], outcomes["known"]


def _batches(spool: IO[bytes]) -> Iterator[list[Correction]]:
    batch, size = list[Correction](), 0
    for line in spool:
        if batch and (len(batch) == BATCH_RECORDS or size + len(line) > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(Correction.model_validate_json(line))
        size += len(line)
    if batch:
        yield batch


def _send_batch(client: Client, batch: list[Correction]) -> list[str]:
    """What became of each. Raises TooLarge: a single record is over the server's limit."""
    try:
        answer = client.request("POST", "/v1/corrections", body=ImportRequest(corrections=batch))
    except TooLarge:
        if len(batch) == 1:
            raise
        half = len(batch) // 2
        return _send_batch(client, batch[:half]) + _send_batch(client, batch[half:])
    return list(CorrectionsReply.model_validate(answer).outcomes or [])
