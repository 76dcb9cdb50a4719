"""Files of every shape, packed and spoilt at random: reasons and no crash, and nothing is wanted that was not.

In the files of `import_files` what is wanted is one of `WANTED`, and what the model said wrongly is `BAD`: whatever
happens to such a file on its way (noise beside the rows, packings in packings, encodings, an end cut off), nothing
else may come out as wanted.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from importers.import_files import BAD, FILES, GOOD, WHY
from importers.test_importers_containers import JSON, mutated, zipped
from importers.test_importers_shapes import imported, told

from secondnature.errors import SecondnatureError
from secondnature.importers.shapes import BY_NAME

WANTED = {GOOD, "Hello."}
RUN = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
NOISE = st.dictionaries(st.sampled_from(["zz", "zy", "notes_of_mine", "x-y"]), JSON, max_size=3)
ENCODINGS = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
PACKINGS = {
    "plain": lambda data: data,
    "gzip": gzip.compress,
    "gzip twice": lambda data: gzip.compress(gzip.compress(data)),
    "zip": lambda data: zipped({"readme.txt": b"hello", "d/data": data}),
    "zip in zip": lambda data: zipped({"a.zip": zipped({"data": data})}),
    "gzip in zip": lambda data: zipped({"a.gz": gzip.compress(data)}),
}


def written(draw: st.DrawFn, rows: Any, shape: str) -> str:
    """The rows of a file as one of the texts that programs make of them; a log has its lines."""
    if isinstance(rows, str):
        return rows
    indent = draw(st.sampled_from([None, 1, 4]))
    if isinstance(rows, dict):
        return json.dumps(rows, indent=indent)
    wrapped = [] if BY_NAME[shape].whole is not None else ["data", "viewer"]
    how = draw(st.sampled_from(["lines", "array", "one after another", *wrapped]))
    if how == "lines":
        return draw(st.sampled_from(["", "\n"])) + "".join(json.dumps(r) + "\n" for r in rows)
    if how == "array":
        return json.dumps(rows, indent=indent)
    if how == "data":
        return json.dumps({"data": rows, "next": None}, indent=indent)
    if how == "viewer":
        return json.dumps({"features": [{"name": "x"}], "rows": [{"row_idx": 0, "row": r} for r in rows]})
    return "\n".join(json.dumps(r, indent=indent) for r in rows)


@st.composite
def packed(draw: st.DrawFn) -> tuple[bytes, list[dict[str, Any]], str]:
    """(a file, the records that it means, its shape)."""
    _, shape, rows, records = draw(st.sampled_from(FILES))
    if isinstance(rows, list):
        noise = [draw(NOISE) for _ in rows]
        rows = [{**x, **r} if draw(st.booleans()) else {**r, **x} for r, x in zip(rows, noise, strict=True)]
    data = written(draw, rows, shape).encode(draw(ENCODINGS))
    return PACKINGS[draw(st.sampled_from(sorted(PACKINGS)))](data), records, shape


@RUN
@given(packed())
def test_whatever_lies_around_the_rows_they_mean_the_same(
    tmp_path: Path, file: tuple[bytes, list[dict[str, Any]], str]
) -> None:
    data, records, shape = file
    (tmp_path / "f").write_bytes(data)
    plan, found = imported([tmp_path / "f"])
    assert [s.shape.name for s in plan.sources] == [shape]
    assert plan.reasons == []
    assert [told(c) for c in found] == records


@RUN
@given(packed(), st.data())
def test_of_a_file_that_was_cut_nothing_is_wanted_that_was_not(
    tmp_path: Path, file: tuple[bytes, list[dict[str, Any]], str], data: st.DataObject
) -> None:
    whole, _, _ = file
    (tmp_path / "f").write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        plan, found = imported([tmp_path / "f"])
    except SecondnatureError:
        return
    assert all(why for _, why in plan.reasons)
    for correction in found:
        assert correction.chosen is None or correction.chosen[0].content in WANTED
        assert correction.rejected is None or correction.rejected[0].content not in WANTED


def texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [t for k, v in value.items() if k != "type" for t in texts(v)]
    return [t for v in value for t in texts(v)] if isinstance(value, list) else []


JUDGED_DOWN = frozenset({"messages kto", "messages commented", "alpaca kto", "helicone", "otel", "phoenix", "codex",
                         "claude", "claude code", "codex of before", "librechat"})  # fmt: skip
"""Files in which nothing is wanted."""


@st.composite
def spoilt(draw: st.DrawFn) -> tuple[Any, bool]:
    """(rows with something in them replaced, whether what was judged is still judged)."""
    name, _, rows, _ = draw(st.sampled_from([f for f in FILES if f[1] != "aider"]))
    changed = mutated(draw, rows)
    for _ in range(draw(st.integers(0, 2))):
        changed = mutated(draw, changed)
    judged = name in JUDGED_DOWN and isinstance(changed, list) and len(changed) == len(rows)
    marks = ("label", "kto_tag", "rating", "feedback", "feedback_rating", "annotations", "events")
    same = judged and all(
        isinstance(c, dict) and all(c.get(m) == r.get(m) for m in marks)
        for c, r in zip(changed, rows, strict=True)
    )
    return changed, same


@RUN
@given(spoilt(), st.booleans())
def test_of_spoilt_rows_nothing_is_wanted_that_is_not_in_them(
    tmp_path: Path, made: tuple[Any, bool], lines: bool
) -> None:
    rows, judged = made
    listed = rows if isinstance(rows, list) else [rows]
    text = "".join(json.dumps(r) + "\n" for r in listed) if lines else json.dumps(rows)
    (tmp_path / "f").write_text(text)
    try:
        plan, found = imported([tmp_path / "f"])
    except SecondnatureError:
        return
    assert all(why for _, why in plan.reasons)
    there = "".join(texts(listed))
    for correction in found:
        if correction.chosen is None:
            continue
        wanted = correction.chosen[0].content
        assert wanted in there or wanted in there.replace('\\"', '"')
        assert not (judged and wanted == BAD), "what was judged down is wanted"
        assert wanted != WHY, "a comment is wanted"
