"""Updates on disk: the smallest form within the stated error, read back as what was meant; damage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from secondnature.errors import BadDelta, NotFound
from secondnature.weights.updates import UPDATE_FILE, Part, read_update, stored_update, write_update


def some_updates() -> dict[str, Tensor]:
    """As lessons make them: of few tokens, of many, of rows of an embedding, of a norm, with outliers, none."""
    torch.manual_seed(0)
    low = torch.randn(256, 5) @ torch.randn(5, 320) * 1e-5
    rows = torch.zeros(1000, 64)
    rows[[3, 7, 999]] = torch.randn(3, 64) * 1e-4
    spiked = torch.randn(100, 129) * 1e-6
    spiked.view(-1)[::64] = 1.0
    spiked.view(-1)[1::64] = torch.randn(len(spiked.view(-1)[1::64])) * 1e-2
    return {
        "low": low,
        "full": torch.randn(64, 65) * 1e-6,
        "rows": rows,
        "norm": torch.randn(33) * 1e-5,
        "scalar": torch.tensor(3e-5),
        "conv": torch.randn(16, 1, 4) * 1e-5,
        "spiked": spiked,
        "nothing": torch.zeros(4, 4),
    }


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("tolerance", [0.05, 0.01, 0.002, 1e-9])
def test_what_is_read_is_what_was_meant_within_the_stated_error(tmp_path: Path, tolerance: float) -> None:
    sums = some_updates()
    stored = write_update(tmp_path / UPDATE_FILE, sums, tolerance=tolerance)
    assert stored.parts.keys() == sums.keys() - {"nothing"}
    found = dict(read_update(tmp_path))
    assert list(found) == list(stored.parts)
    for name, part in stored.parts.items():
        assert (found[name].shape, found[name].dtype) == (sums[name].shape, torch.float32)
        error = relative(found[name], sums[name])
        assert error <= tolerance
        assert error == pytest.approx(part.error, rel=1e-3, abs=1e-9)
        assert part.norm == pytest.approx(float(sums[name].norm()), rel=1e-5)
    assert not found["rows"][torch.arange(1000) % 10 == 4].any()
    again = stored_update(tmp_path)
    assert (again.parts, again.tolerance, again.nbytes) == (stored.parts, tolerance, stored.nbytes)
    assert stored.nbytes == (tmp_path / UPDATE_FILE).stat().st_size
    kinds = {name: part.kind for name, part in stored.parts.items()}
    if tolerance == 0.01:
        assert kinds["low"] == "factors"
        assert kinds["full"] == kinds["norm"] == "int8"
        assert stored.parts["rows"].rows
        assert stored.nbytes < 0.2 * 4 * sum(t.numel() for t in sums.values())
    if tolerance == 1e-9:
        assert {kinds[name] for name in found if name != "scalar"} == {"fp32"}
        assert all(torch.equal(found[name], sums[name]) for name in found if name != "scalar")


def test_what_eight_bits_cannot_hold_takes_more(tmp_path: Path) -> None:
    stored = write_update(tmp_path / UPDATE_FILE, {"w": some_updates()["full"]}, tolerance=0.002)
    assert stored.parts["w"].kind == "bf16"


def test_any_reader_of_the_format_can_open_it(tmp_path: Path) -> None:
    write_update(tmp_path / UPDATE_FILE, some_updates())
    with safe_open(tmp_path / UPDATE_FILE, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  (not a mapping)
            assert file.get_tensor(name).numel()
        assert file.metadata()["format"] == "secondnature-update/1"


def test_a_lesson_without_an_update_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="has no update: trained on a GPU"):
        list(read_update(tmp_path))
    path = tmp_path / UPDATE_FILE
    write_update(path, some_updates())
    data = path.read_bytes()
    for bad in (b"", data[:100], data[:-1], data.replace(b"update/1", b"update/9")):
        path.write_bytes(bad)
        with pytest.raises(BadDelta):
            list(read_update(tmp_path))
    length = int.from_bytes(data[:8], "little")
    about = json.loads(data[8 : 8 + length])
    for change in ({"kind": "int4"}, {"shape": [999, 999]}, {"shape": "x"}, {"more": 1}, {"rows": True}):
        parts = json.loads(about["__metadata__"]["parts"])
        parts["full"].update(change)
        text = json.dumps(
            {**about, "__metadata__": {**about["__metadata__"], "parts": json.dumps(parts)}}
        ).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        with pytest.raises(BadDelta):
            list(read_update(tmp_path))


def test_nothing_moved_is_an_update_too(tmp_path: Path) -> None:
    assert write_update(tmp_path / UPDATE_FILE, {}).parts == {}
    assert list(read_update(tmp_path)) == []
    (part,) = write_update(tmp_path / UPDATE_FILE, {"w": torch.ones(3)}).parts.values()
    assert part == Part("int8", (3,), part.norm, 0.0)
    assert part.norm == pytest.approx(3**0.5)
