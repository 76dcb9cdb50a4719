"""Whatever a file is packed in, its rows are the same; garbage gives reasons, never a crash."""

from __future__ import annotations

import functools
import gzip
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from importers.import_files import BAD, CHATGPT, FILES, GOOD, VOTE, WHY, Q
from importers.test_importers_shapes import imported, told

from secondnature.errors import BadRecord, SecondnatureError
from secondnature.importers import Context, Options, read_into, recognise
from secondnature.importers.containers import find_parts
from secondnature.importers.shapes import BY_NAME

ROWS = [{"prompt": f"{Q} {i} – ü \u2028 x", "chosen": GOOD, "rejected": BAD} for i in range(3)]
LINES = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ROWS)


def zipped(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return file.getvalue()


PACKED: dict[str, bytes] = {
    "lines": LINES.encode(),
    "lines of windows": LINES.replace("\n", "\r\n").encode(),
    "blank lines": LINES.replace("\n", "\n\n").encode(),
    "byte order mark": b"\xef\xbb\xbf" + LINES.encode(),
    "utf-16": LINES.encode("utf-16"),
    "utf-16 without a mark": LINES.encode("utf-16-le"),
    "array": json.dumps(ROWS).encode(),
    "pretty array": json.dumps(ROWS, indent=2).encode(),
    "data": json.dumps({"data": ROWS}).encode(),
    "pretty data": json.dumps({"data": ROWS}, indent=2).encode(),
    "rows of a viewer": json.dumps(
        {"features": [{"name": "prompt"}], "rows": [{"row_idx": i, "row": r} for i, r in enumerate(ROWS)]}
    ).encode(),
    "objects one after another": "\n".join(json.dumps(r, indent=1) for r in ROWS).encode(),
    "gzip": gzip.compress(LINES.encode()),
    "gzip of an array": gzip.compress(json.dumps(ROWS).encode()),
    "gzip of gzip": gzip.compress(gzip.compress(LINES.encode())),
    "zip of zip": zipped({"a.zip": zipped({"b.zip": zipped({"c.jsonl": LINES.encode()})}), "x.png": b"1"}),
    "zip of gzip": zipped({"a.jsonl.gz": gzip.compress(LINES.encode())}),
    "zip": zipped({"a/b.jsonl": LINES.encode(), "__MACOSX/x": b"1", "readme.txt": b"hello"}),
    "csv": ("prompt,chosen,rejected\n" + "".join(f'"{r["prompt"]}",{GOOD},{BAD}\n' for r in ROWS)).encode(),
    "tsv": ("prompt\tchosen\trejected\n" + "".join(f"{r['prompt']}\t{GOOD}\t{BAD}\n" for r in ROWS)).encode(
        "utf-16"
    ),
    "semicolons": (
        "prompt;chosen;rejected\n" + "".join(f"{r['prompt']};{GOOD};{BAD}\n" for r in ROWS)
    ).encode("utf-8-sig"),
}


@pytest.mark.parametrize("name", PACKED)
def test_a_packing_is_known_by_its_content(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(PACKED[name])
    plan, found = imported([tmp_path / "file"])
    assert plan.reasons == []
    assert [c.prompt[0].content for c in found] == [r["prompt"] for r in ROWS]
    assert {s.shape.name for s in plan.sources} == {"preference"}
    read, total = plan.read_bytes()
    assert 0 < read <= total


def test_parquet_is_read_row_by_row(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    messages = [
        {"messages": [{"role": "user", "content": Q}, {"role": "assistant", "content": f"{i}"}]}
        for i in range(2500)
    ]
    parquet.write_table(arrow.Table.from_pylist(messages), tmp_path / "f")
    plan, found = imported([tmp_path / "f"])
    assert len(found) == 2500
    assert plan.sources[0].seen == "Parquet: conversations (`messages`)"
    assert found[-1].provenance is not None
    assert found[-1].provenance.line == 2500
    data = (tmp_path / "f").read_bytes()
    (tmp_path / "cut").write_bytes(data[: len(data) // 2])
    with pytest.raises(BadRecord, match="Parquet file that cannot be read"):
        imported([tmp_path / "cut"])


def test_parquet_without_its_library_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f").write_bytes(b"PAR1" + bytes(100))

    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(BadRecord) as e:
        imported([tmp_path / "f"])
    assert "secondnature[import]" in e.value.hint


def test_the_export_of_chatgpt_is_read_as_it_comes(tmp_path: Path) -> None:
    files = {
        "conversations.json": json.dumps([CHATGPT]).encode(),
        "message_feedback.json": json.dumps([VOTE]).encode(),
        "user.json": b'{"id": "x", "email": "y"}',
        "chat.html": b"<html>",
        "dalle/x.webp": b"RIFF",
    }
    (tmp_path / "export").write_bytes(zipped(files))
    plan, (found,) = imported([tmp_path / "export"])
    assert (found.feedback, found.rating, found.state) == (WHY, -1, "candidate")
    assert plan.skipped == [f"{tmp_path / 'export'}:user.json"]


def test_a_folder_is_all_its_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jsonl").write_text(LINES)
    (tmp_path / "y.json").write_text(json.dumps(ROWS))
    (tmp_path / "z.txt").write_text("no")
    plan, found = imported([tmp_path])
    assert (len(plan.sources), len(found), plan.num_duplicates) == (2, 3, 3)


@pytest.mark.parametrize(
    ("data", "reasons"),
    [
        (LINES.encode() + b'{"prompt": "x"\n', ["line 4: not JSON"]),
        (b"{oops\n" + LINES.encode(), ["line 1: not JSON"]),
        (
            LINES.encode() + b'{"prompt": "\xff", "chosen": "a", "rejected": "b"}\n',
            ["line 4: not UTF-8 text"],
        ),
        (
            LINES.encode() + b"[1]\n7\n{}\n",
            ["line 4: not an obj", "line 5: not an obj", "line 6: not an obj"],
        ),
        (
            LINES.encode() + b'{"prompt": {"x": 1}, "chosen": 3, "rejected": []}\n',
            ["line 4: the conversation"],
        ),
        (json.dumps(ROWS)[:-1].encode(), ["line 1: the array does not end"]),
        (json.dumps(ROWS, indent=1)[:-20].encode(), ["line 12: not JSON"]),
        (LINES.encode() + b"[" * 100_000 + b"\n", ["line 4: nested too deeply"]),
        (LINES.encode() + b'{"x": ' + b"7" * 5000 + b"}\n", ["line 4: a whole number of more than"]),
        (b"prompt,chosen,rejected\na,b,c\nd,e,f,g\n", ["line 3: 4 cells"]),
        (
            LINES.encode() + b'{"prompt": "x", "chosen": "a", "chosen": "b", "rejected": "c"}\n',
            ["line 4: the field `chosen` stands there twice"],
        ),
        (
            b'[{"prompt": "x",\n"prompt": "y",\n"chosen": "a"},' + json.dumps(ROWS)[1:].encode(),
            ["line 1: the field `prompt` stands there twice"],
        ),
    ],
)
def test_a_bad_row_is_named_with_its_line_and_the_others_are_read(
    data: bytes, reasons: list[str], tmp_path: Path
) -> None:
    (tmp_path / "f").write_bytes(data)
    plan, found = imported([tmp_path / "f"])
    assert len(found) >= 1
    said = [f"{p.unit} {p.number}: {why}" for p, why in plan.reasons]
    assert len(said) == len(reasons) == plan.num_bad
    for one, start in zip(said, reasons, strict=True):
        assert one.startswith(start)


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "empty"),
        (b"  \n ", "empty"),
        (b"\x00\x01\x02\x03", "binary"),
        (b"- prompt: x\n  chosen: y\n", "no JSON"),
        (b"PK\x03\x04garbage", "zip archive that cannot be read"),
        (b"\x1f\x8bgarbage", "f: "),
        (zipped({"a.txt": b"hello"}), "in this archive"),
        (gzip.compress(zipped({"a.jsonl": b"{}"})), "zip archive in another packing"),
        (gzip.compress(b"a.jsonl".ljust(257, b"\0") + b"ustar".ljust(255, b"\0")), "tar archive"),
        (functools.reduce(lambda data, _: gzip.compress(data), range(9), b"{}"), "gzip in gzip"),
        (functools.reduce(lambda data, _: zipped({"a.zip": data}), range(9), b"{}"), "in this archive"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # gzip's bytes have the second in them
)
def test_what_is_no_data_is_said(data: bytes, word: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(BadRecord, match=word):
        find_parts(tmp_path / "f")


def test_a_cut_gzip_is_said(tmp_path: Path) -> None:
    data = gzip.compress(
        "".join(json.dumps({"prompt": str(i), "completion": "x"}) + "\n" for i in range(50_000)).encode()
    )
    (tmp_path / "f").write_bytes(data[: len(data) // 2])
    with pytest.raises(BadRecord, match="f: "):
        imported([tmp_path / "f"])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
CALM = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)


def mutated(draw: st.DrawFn, value: Any) -> Any:
    """The value with something in it replaced."""
    if draw(st.integers(0, 5)) == 0:
        return draw(JSON)
    if isinstance(value, dict) and value:
        key = draw(st.sampled_from(sorted(value)))
        return {**value, key: mutated(draw, value[key])}
    if isinstance(value, list) and value:
        i = draw(st.integers(0, len(value) - 1))
        return [*value[:i], mutated(draw, value[i]), *value[i + 1 :]]
    return draw(JSON)


@st.composite
def spoilt_rows(draw: st.DrawFn) -> tuple[str, Any]:
    _, shape, rows, _ = draw(st.sampled_from([f for f in FILES if f[1] != "aider"]))
    rows = rows if isinstance(rows, list) else [rows]
    return shape, [mutated(draw, row) for row in rows]


@CALM
@given(spoilt_rows())
def test_spoilt_values_of_any_shape_give_reasons_and_no_crash(
    tmp_path: Path, spoilt: tuple[str, list[Any]]
) -> None:
    shape, rows = spoilt
    (tmp_path / "f").write_text("".join(json.dumps(r) + "\n" for r in rows))
    try:
        plan, found = imported([tmp_path / "f"], form=shape)
    except SecondnatureError:
        return
    assert all(why for _, why in plan.reasons)
    for correction in found:
        told(correction)


@CALM
@given(st.data())
def test_spoilt_bytes_give_reasons_and_no_crash(tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray(data.draw(st.sampled_from(sorted(PACKED.values()))))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    (tmp_path / "f").write_bytes(raw)
    try:
        plan = recognise([tmp_path / "f"], Options())
        read_into(io.BytesIO(), plan, Context())
    except SecondnatureError:
        return
    assert plan.num_bad == len(plan.reasons)


SHEET = f"""question,answer,correction,comment,thumb
"{Q}",{BAD},{GOOD},{WHY},
"{Q} 2",{BAD},,,👎
"{Q} 3",{GOOD},,,👍
"""


def test_a_sheet_is_read_by_the_names_of_its_columns(tmp_path: Path) -> None:
    (tmp_path / "f").write_text(SHEET)
    _, (one, two, three) = imported([tmp_path / "f"])
    corrected = {"said": BAD, "rejected": BAD, "chosen": GOOD, "feedback": WHY}
    assert told(one) == {"prompt": [{"role": "user", "content": Q}], **corrected}
    assert (two.chosen, two.rating, three.rating) == (None, -1, 1)
    assert three.chosen == three.said


def test_columns_of_other_names_are_mapped(tmp_path: Path) -> None:
    (tmp_path / "f").write_text(f'a,b,c\n"{Q}",{BAD},{GOOD}\n')
    with pytest.raises(BadRecord, match="no shape that is known") as e:
        imported([tmp_path / "f"])
    assert "--map" in e.value.hint
    _, (found,) = imported([tmp_path / "f"], Options(columns={"a": "prompt", "b": "rejected", "c": "chosen"}))
    assert told(found) == {"prompt": [{"role": "user", "content": Q}], "chosen": GOOD, "rejected": BAD}
    assert BY_NAME["sheet"].title
