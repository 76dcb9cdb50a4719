"""Files -> corrections, in one pass, with all that a person has to see before anything is written (client).

What is read goes line by line into a spool (a temporary file), so that nothing is sent or written while it is
still unknown whether all of it will be, and so that a long file costs no memory.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from secondnature.errors import BadInput, BadRecord
from secondnature.importers.containers import Part, find_parts
from secondnature.importers.rows import Context, Draft, Options, Place, Refused, Row
from secondnature.importers.shapes import BY_NAME, OWN_FIELDS, SHAPES, Shape, not_taught
from secondnature.importers.turns import as_object, num_thoughts
from secondnature.records import Contradictions, Correction, describe, doubts, kind_of_doubt, nothing_asked

__all__ = ["Plan", "Sight", "Source", "read_into", "recognise", "sight"]

SAMPLE = 50
"""So many rows say what a file is."""
MAX_REASONS = 1000
"""So many reasons are kept word for word; all are counted."""
NUM_EXAMPLES = 3
NEEDED_FIRST = frozenset({"chatgpt-feedback", "langfuse-scores", "langsmith-feedback"})
"""Shapes of files that say something about the rows of others."""
DIRECT = frozenset({"corrections", "messages", "preference", "completion", "sheet"})
"""Shapes of which `learn` reads the plainest rows itself."""


@dataclass(frozen=True)
class Source:
    """A file, or a file in an archive, and the shape that it has."""

    part: Part
    shape: Shape
    seen: str
    """`a JSON array of conversations (messages)`."""


@dataclass
class Plan:
    """What an import would add, and what it leaves out."""

    sources: list[Source]
    num_rows: int = 0
    num_records: int = 0
    num_candidates: int = 0
    num_duplicates: int = 0
    kinds: Counter[str] = field(default_factory=Counter[str])
    """What the records say: a wanted answer, a pair, a comment, ..."""
    num_bad: int = 0
    reasons: list[tuple[Place, str]] = field(default_factory=list[tuple[Place, str]])
    """Of rows that cannot be taken, the first `MAX_REASONS`."""
    examples: list[Correction] = field(default_factory=list[Correction])
    unused: dict[str, int] = field(default_factory=dict[str, int])
    passed_over: dict[str, int] = field(default_factory=dict[str, int])
    doubts: Counter[str] = field(default_factory=Counter[str])
    """What records may be meant otherwise than they are taken."""
    skipped: list[str] = field(default_factory=list[str])
    """Files inside archives and folders of which nothing is known."""

    def read_bytes(self) -> tuple[int, int]:
        """(read, in all), of the files as they lie on the disk."""
        meters = [s.part.meter for s in self.sources]
        return sum(m.done for m in meters), sum(m.total for m in meters)

    def refuse(self, place: Place, why: str) -> None:
        """Note a row that is not taken."""
        self.num_bad += 1
        if len(self.reasons) < MAX_REASONS:
            self.reasons.append((place, why))


def recognise(paths: Iterable[Path], options: Options, form: str | None = None) -> Plan:
    """Which shape each file has; those that others need (votes) first.

    Args:
        form: the name of a shape, of --format: nothing is looked at.

    Raises:
        BadInput: no such shape, one that nobody knows, or several that fit equally well.
        BadRecord: a file is missing or of no kind that is read.
    """
    if form is not None and form not in BY_NAME:
        raise BadInput(f"no format {form[:40]!r}", f"one of: {', '.join(BY_NAME)}")
    found, skipped = list[Source](), list[str]()
    for path in paths:
        parts = find_parts(path)
        for part in parts:
            try:
                shape = BY_NAME[form] if form is not None else _shape_of(part, options)
            except BadRecord:
                if len(parts) == 1:
                    raise
                skipped.append(part.name)
                continue
            found.append(Source(part, shape, f"{part.container}: {shape.title}"))
    if not found:
        raise BadRecord(f"none of {len(skipped)} files holds corrections", "see docs/importing.md")
    found.sort(key=lambda s: s.shape.name not in NEEDED_FIRST)
    return Plan(found, skipped=skipped)


def _sample(part: Part) -> list[Any]:
    return [row.value for row in itertools.islice(part.rows(), SAMPLE) if not row.problem]


def _fitting(values: list[Any]) -> list[Shape]:
    """The shapes that most rows have."""
    counts: Counter[str] = Counter()
    for value in values:
        for shape in SHAPES[:-1]:
            if isinstance(value, str) if shape.name == "aider" else isinstance(value, dict):
                counts[shape.name] += shape.sees(value)
    most = max(counts.values(), default=0)
    if not most:
        return [SHAPES[-1]] if any(SHAPES[-1].sees(as_object(v)) for v in values) else []
    return [BY_NAME[name] for name, n in counts.items() if n == most]


def _shape_of(part: Part, options: Options) -> Shape:
    """Raises BadRecord: not known, or not to be decided."""
    if options.columns:
        return SHAPES[-1]
    values = _sample(part)
    fitting = _fitting(values)
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = ", ".join(f"{s.name} ({s.title})" for s in fitting)
        raise BadRecord(
            f"{part.name}: {part.container} that fits several shapes: {names}", "choose: --format NAME"
        )
    what, to_do = _unknown(part, values)
    raise BadRecord(f"{part.name}: {what}", to_do)


def _unknown(part: Part, values: list[Any]) -> tuple[str, str]:
    """(What a part is that no shape fits, what to do)."""
    known = next((found for v in values if (found := not_taught(v)) is not None), None)
    if known is not None:
        return f"{part.container} of {known[0]}", known[1]
    see = "see docs/importing.md; of a table: --map COLUMN=FIELD"
    if not values:
        row = next((row for row in part.rows() if row.problem), None)
        why = f": {row.place.unit} {row.place.number}: {row.problem}" if row is not None else ""
        return f"{part.container} without a row that can be read{why}", "mend the file"
    if isinstance(values[0], dict):
        return f"{part.container} of objects with {_keys(values[0])}: no shape that is known", see
    return f"{part.container} of {_kind(values[0])}; expected objects with fields", see


def _kind(value: Any) -> str:
    if isinstance(value, str | list):
        return "texts" if isinstance(value, str) else "lists"
    return "plain values"


def _keys(row: Any) -> str:
    names = [str(k)[:40] for k in as_object(row)]
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return (", ".join(f"`{n}`" for n in names[:6]) or "no fields") + more


@dataclass(frozen=True)
class Sight:
    """What a file is, for the errors of commands that read JSONL of corrections only."""

    what: str
    """`a JSON array of 3 rows with ...: ShareGPT`."""
    importable: bool
    to_do: str
    """Where it is not importable."""
    direct: bool
    """Lines of a shape that such commands read too: what is wrong is in a row."""


def sight(path: Path) -> Sight | None:
    """What a file is, at a glance; None: not known."""
    try:
        parts = find_parts(path)
        values = _sample(parts[0])
    except BadRecord:
        return None
    part, fitting = parts[0], _fitting(values)
    if not values:
        return None
    if not fitting:
        what, to_do = _unknown(part, values)
        known = any(not_taught(v) is not None for v in values)
        return Sight(what, importable=False, to_do=to_do, direct=not known and part.container == "JSONL")
    number = f"{len(values)}{'+' if len(values) == SAMPLE else ''} row{'s'[: len(values) != 1]}"
    fields = f" with {_keys(values[0])}" if isinstance(values[0], dict) else ""
    what = f"{part.container} of {number}{fields}: {' or '.join(s.title for s in fitting)}"
    direct = part.container == "JSONL" and any(s.name in DIRECT for s in fitting)
    return Sight(what, importable=True, to_do="", direct=direct)


def read_into(spool: IO[bytes], plan: Plan, context: Context) -> None:
    """Read every row into the spool, a correction a line, and into the plan what is to be told.

    Raises:
        BadRecord, TooLarge: a file cannot be read on.
    """
    known: set[str] = set()
    contradictions = Contradictions()
    for source in plan.sources:
        source.part.meter.done = 0
    for source in plan.sources:
        for place, found in _drafts(source, context, plan):
            try:
                correction = _correction(found, place, source.shape)
            except ValidationError as e:
                plan.refuse(place, describe(e, found.whole))
                continue
            why = nothing_asked(correction)
            if why is not None:
                plan.refuse(place, why)
                continue
            identity = correction.identity()
            if identity in known:
                plan.num_duplicates += 1
                continue
            known.add(identity)
            _count(plan, correction)
            plan.doubts.update(map(kind_of_doubt, doubts(correction)))
            plan.doubts[Contradictions.KIND] += contradictions.take(correction, plan.num_records) is not None
            spool.write(correction.model_dump_json(exclude_none=True).encode() + b"\n")
    plan.unused, plan.passed_over = context.unused, context.passed_over
    if context.votes and not context.num_votes_used:
        plan.passed_over["thumbs whose conversations are not in these files"] = len(context.votes)
    if context.judgements and not context.num_judged:
        plan.passed_over["judgements whose traces are not in these files"] = len(context.judgements)


def _drafts(source: Source, context: Context, plan: Plan) -> Iterator[tuple[Place, Draft]]:
    def rows() -> Iterator[Row]:
        for row in source.part.rows():
            plan.num_rows += 1
            yield row

    shape = source.shape
    if shape.whole is not None:
        for one in shape.whole(rows(), context):
            if isinstance(one, Row):
                plan.refuse(one.place, one.problem)
            elif one.place is not None:
                yield one.place, one
        return
    assert shape.row is not None, "a shape has a reader"
    for row in rows():
        value = as_object(row.value)
        if row.problem or not value:
            plan.refuse(row.place, row.problem or "not an object with fields, or an empty one")
            continue
        if shape.used:
            for key in value.keys() - shape.used:
                if shape.name != "corrections" or value[key] is not None:
                    context.unused[key] = context.unused.get(key, 0) + 1
        if shape.kind == "written":
            context.pass_over("thoughts beside an answer, which are not taught", num_thoughts(value))
        try:
            for draft in shape.row(value, context):
                if shape.used and draft.whole is None:
                    draft.options = value.get("chat_template_kwargs")
                yield row.place, draft
        except Refused as e:
            plan.refuse(row.place, str(e))
        except (
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
            IndexError,
            OverflowError,
            RecursionError,
        ) as e:
            what = f"missing {e}" if isinstance(e, KeyError) else f"a value that it does not have there ({e})"
            plan.refuse(row.place, f"not {shape.title}: {what}"[:300])


def _correction(draft: Draft, place: Place, shape: Shape) -> Correction:
    """Raises ValidationError."""
    origin = {
        "kind": shape.kind,
        "source": place.source[-1000:],
        "line": place.number,
        "foreign_id": draft.foreign_id[:1000] if draft.foreign_id else None,
    }
    if draft.whole is not None:
        data = {k: v for k, v in draft.whole.items() if k in OWN_FIELDS}
        return Correction.model_validate({**data, "provenance": data.get("provenance") or origin})
    data: dict[str, Any] = {"prompt": draft.prompt, "provenance": origin}
    for key in ("said", "chosen", "rejected", "feedback", "rating"):
        value = getattr(draft, key)
        if value is not None:
            data[key] = value
    if draft.candidate:
        data["state"] = "candidate"
    if draft.options:
        data["chat_template_kwargs"] = draft.options
    return Correction.model_validate(data)


def _count(plan: Plan, correction: Correction) -> None:
    plan.num_records += 1
    plan.num_candidates += correction.state == "candidate"
    if correction.is_praise:
        kind = "praised answers"
    elif correction.chosen is not None:
        kind = "pairs of a wanted and a worse answer" if correction.rejected is not None else "wanted answers"
    elif correction.feedback is not None:
        kind = "comments on an answer"
    else:
        kind = "answers rated down"
    new = kind not in plan.kinds
    plan.kinds[kind] += 1
    if len(plan.examples) < NUM_EXAMPLES:
        plan.examples.append(correction)
    elif new and len(plan.kinds) <= NUM_EXAMPLES:  # one of each kind says more than three of one
        plan.examples[len(plan.kinds) - 1] = correction
