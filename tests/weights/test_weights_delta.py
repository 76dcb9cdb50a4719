"""Deltas: the lesson and its undo to the bit, written and read in a stream; files of the formats before; damage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from safetensors.numpy import load_file
from safetensors.numpy import save as to_safetensors
from test_weights_xor import packed_xor

from secondnature.errors import BadDelta, StorageError, WeightsError
from secondnature.weights import delta
from secondnature.weights.arena import Arena
from secondnature.weights.content import BLOCK_BYTES, blocks, content_id, root_id, tensor_digest

Tensors = dict[str, torch.Tensor]
ELEMENTS = BLOCK_BYTES // 2
FIRST_KIND = "w" + "0" * 16


def some_weights(seed: int = 0) -> Tensors:
    torch.manual_seed(seed)
    return {
        "a.weight": torch.randn(7, 5).to(torch.bfloat16),
        "b.weight": torch.randn(3, 1, 4).to(torch.bfloat16),
        "c": torch.randn(11),
        "empty": torch.zeros(0, 5, dtype=torch.bfloat16),
        "exact": torch.randn(ELEMENTS).to(torch.bfloat16),
        "wide": torch.randn(2, ELEMENTS + 3).to(torch.bfloat16),
    }


def copies(weights: Mapping[str, torch.Tensor]) -> Tensors:
    return {n: t.clone() for n, t in weights.items()}


def ordered(weights: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """As a checkpoint gives them: one after the other, each the caller's own."""
    for name in sorted(weights):
        yield name, weights[name].clone()


def lesson_on(weights: Tensors, seed: int) -> Tensors:
    """A little noise on some weights; bits that floats do not tell apart."""
    generator = torch.Generator().manual_seed(seed)
    after = copies(weights)
    for name in ("a.weight", "wide"):
        bits = after[name].view(torch.int16)
        bits ^= (torch.rand(bits.shape, generator=generator) < 0.3).to(torch.int16)
    after["a.weight"][0, 0] = float("nan")
    after["c"][:2] = torch.tensor([0.0, -0.0])
    after["wide"][1, -1] = -0.0
    return after


def applied(stored: delta.StoredDelta, weights: Tensors, *, back: bool = False) -> Tensors:
    stored.check(weights)
    return {n: t for n, t in copies(weights).items() if stored.apply_(n, t, back=back) in (True, False)}


def write_as_the_first_homes(path: Path, before: Tensors, after: Tensors) -> tuple[str, str, str]:
    """The file, and (base, result, sha256), that version 0.1 wrote: format 1, flat ids."""
    compressor = zstandard.ZstdCompressor(level=3)
    xor = {}
    for name, old in before.items():
        now = after[name]
        difference = np.bitwise_xor(*(t.view(-1).view(torch.uint8).numpy() for t in (old, now)))
        if difference.any():
            xor[name] = difference
    packed = {
        name: np.frombuffer(
            compressor.compress(x.reshape(-1, 2).T.tobytes() if x.size % 2 == 0 else x.tobytes()), np.uint8
        )
        for name, x in xor.items()
    }
    base, result = (content_id(w, like=FIRST_KIND) for w in (before, after))
    sizes = {f"bytes:{name}": str(x.size) for name, x in xor.items()}
    metadata = {"format": "secondnature-delta/1", "base": base, "result": result, **sizes}
    data = to_safetensors(packed or {"nothing": np.zeros(0, np.uint8)}, metadata=metadata)
    path.write_bytes(data)
    return base, result, hashlib.sha256(data).hexdigest()


def write_as_format_2(path: Path, before: Tensors, after: Tensors) -> tuple[str, str, str]:
    """What version 0.2 wrote: XOR, blocks, tree ids."""
    packed: dict[str, np.ndarray] = {}
    for name, old in before.items():
        if not torch.equal(old.view(torch.uint8), after[name].view(torch.uint8)):
            pairs = zip(blocks(old), blocks(after[name]), strict=True)
            parts = [packed_xor(was, is_) for was, is_ in pairs]
            data = b"".join(len(part).to_bytes(4, "little") + part for part in parts)
            packed[name] = np.frombuffer(data, np.uint8)
    base, result = content_id(before), content_id(after)
    sizes = {f"bytes:{name}": str(before[name].nbytes) for name in packed}
    metadata = {"format": "secondnature-delta/2", "base": base, "result": result, **sizes}
    data = to_safetensors(packed, metadata=metadata)
    path.write_bytes(data)
    return base, result, hashlib.sha256(data).hexdigest()


def written(path: Path, kind: int, before: Tensors, after: Tensors) -> tuple[str, str, str]:
    """A file of this format."""
    if kind == 3:
        return delta.write(path, ordered(before), after)
    return (write_as_the_first_homes if kind == 1 else write_as_format_2)(path, before, after)


def test_a_delta_is_the_lesson_and_its_undo(tmp_path: Path) -> None:
    before = some_weights()
    after = lesson_on(before, 1)
    path = tmp_path / "d.safetensors"
    written = delta.write(path, ordered(before), after)
    assert written == (content_id(before), content_id(after), hashlib.sha256(path.read_bytes()).hexdigest())
    stored = delta.open_(path, written.sha256)
    assert (stored.base, stored.result) == (written.base, written.result)
    assert set(stored.sizes) == {"a.weight", "c", "wide"}
    assert content_id(applied(stored, before)) == written.result
    assert content_id(applied(stored, after, back=True)) == written.base
    assert set(load_file(path)) == set(stored.sizes)  # any reader of the format can list it
    assert path.stat().st_size < sum(t.nbytes for t in before.values()) / 4
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_blocks_that_did_not_change_cost_four_bytes(tmp_path: Path) -> None:
    before = {"wide": torch.zeros(8 * ELEMENTS, dtype=torch.bfloat16)}
    after = copies(before)
    after["wide"][5 * ELEMENTS] = 1.0
    delta.write(tmp_path / "d", ordered(before), after)
    assert (tmp_path / "d").stat().st_size < 2_000
    assert content_id(applied(delta.open_(tmp_path / "d"), before)) == content_id(after)


def test_an_empty_delta_is_a_delta(tmp_path: Path) -> None:
    weights = some_weights()
    written = delta.write(tmp_path / "d", ordered(weights), weights)
    stored = delta.open_(tmp_path / "d", written.sha256)
    assert (stored.sizes, stored.base) == ({}, stored.result)
    write_as_the_first_homes(tmp_path / "old", weights, weights)
    assert delta.open_(tmp_path / "old").sizes == {}


@pytest.mark.parametrize("kind", [1, 2])
def test_the_deltas_of_the_formats_before_are_read(tmp_path: Path, kind: int) -> None:
    before = some_weights()
    after = lesson_on(before, 1)
    base, result, sha256 = written(tmp_path / "old", kind, before, after)
    stored = delta.open_(tmp_path / "old", sha256)
    assert (stored.base, stored.result) == (base, result)
    found = applied(stored, before)
    assert content_id(found, like=base) == result
    assert content_id(found) == content_id(after)
    assert content_id(applied(stored, found, back=True)) == content_id(before)


def test_weights_that_a_delta_is_not_of_are_refused_by_the_name_of_the_tensor(tmp_path: Path) -> None:
    """Before a byte is written: alone, in the wrong direction, and in a chain."""
    weights, (one, two) = a_chain(tmp_path)
    other = copies(weights)
    other["wide"][0, 5] = 3.0
    was = content_id(other)
    with pytest.raises(BadDelta, match=r"tensor wide has the content [0-9a-f]{16}; expected") as refused:
        one.delta.apply_("wide", other["wide"])
    assert "nothing was written" in refused.value.hint
    with pytest.raises(BadDelta, match="tensor wide has the content"):
        one.delta.apply_("wide", other["wide"], back=True)
    assert content_id(other) == was
    with pytest.raises(BadDelta, match="tensor wide has the content"):
        replay(other, one, two)
    for back in (False, True):
        with pytest.raises(BadDelta, match="tensor wide has the content"):
            two.delta.apply_("wide", weights["wide"].clone(), back=back)


def test_each_part_of_a_delta_says_what_it_leads_from_and_to(tmp_path: Path) -> None:
    """So that a tensor can be sent, and checked, alone; together they are the versions."""
    weights, (one, _) = a_chain(tmp_path)
    after = lesson_on(weights, 1)
    assert set(one.delta.heads) == {"a.weight", "c", "wide"}
    same = {name: tensor_digest(name, t) for name, t in weights.items()}
    for name, head in one.delta.heads.items():
        assert (head.base, head.result) == (
            tensor_digest(name, weights[name]),
            tensor_digest(name, after[name]),
        )
        assert (head.nbytes, head.dtype) == (weights[name].nbytes, str(weights[name].dtype)[6:])
    assert root_id(same | {n: h.result for n, h in one.delta.heads.items()}) == one.after


@pytest.mark.parametrize("num_threads", [1, 3])
def test_threads_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_threads: int) -> None:
    monkeypatch.setattr(delta, "MAX_THREADS", num_threads)
    before = {"w": torch.randn(5 * ELEMENTS + 7).to(torch.bfloat16)}
    after = {"w": (before["w"].float() * (1 + 1e-3)).to(torch.bfloat16)}
    stored = delta.open_(tmp_path / "d", delta.write(tmp_path / "d", ordered(before), after).sha256)
    assert content_id(applied(stored, before)) == stored.result
    assert content_id(applied(stored, after, back=True)) == stored.base


def test_a_home_of_the_first_kind_goes_on_with_new_ids(tmp_path: Path) -> None:
    """Its chain: an old delta, then new ones whose base is named as the old one's result; and a revert of each."""
    states = [some_weights()]
    for seed in (1, 2, 3):
        states.append(lesson_on(states[-1], seed))
    first, second, _ = write_as_the_first_homes(tmp_path / "1", states[0], states[1])
    ids = [first, second]
    for i in (1, 2):
        written = delta.write(tmp_path / f"{i + 1}", ordered(states[i]), states[i + 1], like=ids[-1])
        assert written.base == ids[-1]
        ids.append(written.result)
    assert [x[:3] == "w2-" for x in ids] == [False, False, True, True]
    links = [
        delta.Link(delta.open_(tmp_path / f"{i + 1}"), ids[i], ids[i + 1], f"lesson {i + 1}")
        for i in range(3)
    ]
    assert content_id(delta.replayed(ordered(states[0]), links, source_id=first)) == content_id(states[3])
    back = [delta.Link(x.delta, x.after, x.before, f"revert {x}") for x in reversed(links)]
    found = delta.replayed(ordered(states[0]), links + back)
    assert content_id(found, like=first) == first
    names = [name for name, _ in delta.replayed(ordered(states[0]), [])]
    assert names == sorted(states[0])


def a_chain(directory: Path) -> tuple[Tensors, list[delta.Link]]:
    weights = some_weights()
    states = [weights, lesson_on(weights, 1)]
    states.append(lesson_on(states[1], 2))
    links = []
    for i in (0, 1):
        w = delta.write(directory / f"{i}", ordered(states[i]), states[i + 1])
        links.append(delta.Link(delta.open_(directory / f"{i}", w.sha256), w.base, w.result, f"lesson {i}"))
    return weights, links


def replay(weights: Tensors, *links: delta.Link, **options: str) -> None:
    for _ in delta.replayed(ordered(weights), links, **options):  # pyright: ignore[reportArgumentType]
        pass


def test_a_chain_that_does_not_fit_is_refused_before_the_first_tensor(tmp_path: Path) -> None:
    weights, (one, two) = a_chain(tmp_path)
    with pytest.raises(BadDelta, match=r"lesson 0 starts from .*; what is before it ends at"):
        delta.replayed(iter([]), [two, one])
    with pytest.raises(BadDelta, match="lesson 0 starts from"):
        delta.replayed(iter([]), [one], source_id=two.before)
    with pytest.raises(BadDelta, match="lesson 0: its delta leads from"):
        delta.replayed(iter([]), [delta.Link(one.delta, two.before, two.after, "lesson 0")])
    replay(weights, one, two)


def test_weights_that_are_not_what_the_chain_says_are_refused_by_link(tmp_path: Path) -> None:
    weights, (one, two) = a_chain(tmp_path)
    changed = copies(weights)
    changed["exact"][-1] += 1
    with pytest.raises(BadDelta, match=f"the chain starts from .*; expected {one.before}"):
        replay(changed, one, two)
    with pytest.raises(BadDelta, match="the chain starts from"):
        replay(changed, source_id=one.before)
    last = lesson_on(lesson_on(weights, 1), 2)
    other = lesson_on(last, 4)
    written = delta.write(tmp_path / "x", ordered(last), other)
    data = bytearray((tmp_path / "x").read_bytes())
    start = data.index(written.result.encode())
    data[start + 5] = ord("0") if data[start + 5] != ord("0") else ord("1")
    (tmp_path / "x").write_bytes(data)  # a writer that named its result wrongly
    stored = delta.open_(tmp_path / "x")
    bad = delta.Link(stored, stored.base, stored.result, "lesson x")
    with pytest.raises(BadDelta, match=f"lesson x ends at {written.result}; expected {stored.result}"):
        replay(weights, one, two, bad)
    for bare in ("c", "a.weight"):
        fewer = {n: t for n, t in weights.items() if n != bare}
        with pytest.raises(BadDelta, match=f"lesson 0: its tensor {bare}"):
            replay(fewer, one)
    with pytest.raises(BadDelta, match=r"a\.weight came after b\.weight"):
        list(delta.replayed([("b.weight", weights["b.weight"]), ("a.weight", weights["a.weight"])]))


def test_tensors_that_do_not_fit_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    weights, (one, _) = a_chain(tmp_path)
    for wrong in ({**weights, "c": torch.zeros(12)}, {n: t for n, t in weights.items() if n != "c"}):
        with pytest.raises(BadDelta, match="tensor c does not fit"):
            one.delta.check(wrong)
    short = torch.zeros(10)
    with pytest.raises(
        BadDelta, match="tensor c does not fit these weights: 44 bytes of float32; expected 40 of"
    ):
        one.delta.apply_("c", short)
    assert not short.any()
    assert not one.delta.apply_("b.weight", weights["b.weight"])


def test_two_states_of_different_models_have_no_delta(tmp_path: Path) -> None:
    weights = some_weights()
    path = tmp_path / "d"
    wrong: list[tuple[Iterator[tuple[str, torch.Tensor]], str]] = [
        (ordered({n: t for n, t in weights.items() if n != "c"}), "tensor empty where those after have c"),
        (ordered({n: t for n, t in weights.items() if n != "wide"}), "have no tensor wide"),
        (ordered({**weights, "z": torch.zeros(1)}), "tensor z where those after have no more"),
        (ordered({**weights, "c": torch.zeros(11, 1)}), "tensor c"),
        (ordered({**weights, "c": torch.zeros(11, dtype=torch.bfloat16)}), "tensor c"),
        (reversed(list(ordered(weights))), "tensor wide where"),
    ]
    for before, message in wrong:
        with pytest.raises(BadDelta, match=message):
            delta.write(path, before, weights)
    with pytest.raises(WeightsError, match="no content id"):
        delta.write(path, ordered(weights), weights, like="w1")
    with pytest.raises(StorageError, match="none"):
        delta.write(tmp_path / "none" / "d", ordered(weights), weights)
    assert list(tmp_path.iterdir()) == []


def _rewritten(path: Path, change: Callable[[dict[str, dict[str, object]]], object]) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    about = json.loads(data[8 : 8 + length])
    change(about)
    text = json.dumps(about).encode().ljust(length)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize("kind", [1, 2, 3])
def test_damage_anywhere_is_refused_by_the_checksum(tmp_path: Path, kind: int) -> None:
    before = some_weights()
    after = lesson_on(before, 1)
    path = tmp_path / "d"
    sha256 = written(path, kind, before, after)[2]
    data = path.read_bytes()
    for i in (0, 7, 8, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:i] + bytes([data[i] ^ 0x10]) + data[i + 1 :])
        with pytest.raises(BadDelta, match="checksum"):
            delta.open_(path, sha256)
    for cut in (0, 7, 50, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(BadDelta):
            delta.open_(path)
    path.unlink()
    with pytest.raises(BadDelta, match="No such file"):
        delta.open_(path, sha256)


@pytest.mark.parametrize("kind", [1, 2, 3])
def test_damage_is_refused_without_a_checksum_too(tmp_path: Path, kind: int) -> None:
    """What somebody else made: each part of the file is what it has to be, or nothing else is read."""
    before = some_weights()
    after = lesson_on(before, 1)
    path = tmp_path / "d"
    written(path, kind, before, after)
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    refused = 0
    for i in (*range(start, start + 24), len(data) - 1, len(data) - 5):
        path.write_bytes(data[:i] + bytes([data[i] ^ 0x40]) + data[i + 1 :])
        try:
            found = applied(delta.open_(path), before)
        except BadDelta:
            refused += 1
        else:  # a packed byte that stands for another one
            assert content_id(found) != content_id(after)
    assert refused > 6
    path.write_bytes(data)
    changes: list[Callable[[dict[str, dict[str, object]]], object]] = [
        lambda about: about["__metadata__"].update({"format": "secondnature-delta/9"}),
        lambda about: about["__metadata__"].pop("base"),
        lambda about: about["c"].update({"dtype": "I8"}),
    ]
    if kind < 3:
        for size in ("45", "-4"):
            changes.append(lambda about, size=size: about["__metadata__"].update({"bytes:c": size}))
    for change in changes:
        _rewritten(path, change)
        with pytest.raises(BadDelta):
            applied(delta.open_(path), before)
        path.write_bytes(data)


def test_a_frame_of_the_first_format_that_unpacks_to_more_is_refused(tmp_path: Path) -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(50_000_000))
    small = zstandard.ZstdCompressor().compress(bytes(40))
    liar = small[: zstandard.frame_header_size(small)] + bomb[zstandard.frame_header_size(bomb) :]
    metadata = {"format": "secondnature-delta/1", "base": FIRST_KIND, "result": FIRST_KIND, "bytes:c": "40"}
    for frame, message in ((bomb, "announces 50,000,000 bytes; expected 40"), (liar, "tensor c")):
        data = to_safetensors({"c": np.frombuffer(frame, np.uint8)}, metadata=metadata)
        (tmp_path / "d").write_bytes(data)
        with pytest.raises(BadDelta, match=message):
            delta.open_(tmp_path / "d").apply_("c", torch.zeros(10))


def test_a_file_that_changes_after_its_check_is_refused(tmp_path: Path) -> None:
    weights, (one, _) = a_chain(tmp_path)
    data = one.delta.path.read_bytes()
    one.delta.path.unlink()
    one.delta.path.write_bytes(data)
    with pytest.raises(BadDelta, match="was changed since"):
        one.delta.apply_("c", weights["c"])


def test_a_chain_is_written_into_the_arena_and_its_failure_closes_the_bracket(tmp_path: Path) -> None:
    weights, links = a_chain(tmp_path)
    arena = Arena.create(weights)
    arena.write(delta.replayed(ordered(weights), links))
    assert (content_id(arena.tensors), arena.writes) == (links[-1].after, (1, 1))
    changed = copies(weights)
    changed["exact"][-1] += 1
    with pytest.raises(BadDelta, match="the chain starts from"):
        arena.write(delta.replayed(ordered(changed), links))
    assert arena.writes == (2, 2)
    with pytest.raises(WeightsError, match="tensor z does not fit"):
        arena.write([("a.weight", weights["a.weight"]), ("z", weights["c"])])
    assert arena.writes == (3, 3)
    assert torch.equal(arena.tensors["a.weight"], weights["a.weight"])
    arena.write(ordered(weights))
    assert content_id(arena.tensors) == links[0].before
