"""What a lesson file does to the weights: no server, no trainer; entries whose change is a few bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import zstandard
from safetensors.torch import load_file, save_file
from served_home import Served, serve
from tiny_models import llama_config, save_tiny
from tiny_server import correction, save_tokenizer

from secondnature.errors import BadDelta, BadInput, Conflict, SecondnatureError
from secondnature.lessons.exports import Exports
from secondnature.lessons.identity import check_same, identity_of
from secondnature.lessons.imported import ImportedChange, check_sizes
from secondnature.lessons.job import Job
from secondnature.lessons.lesson_file import LessonFile, open_
from secondnature.lessons.plan import Plan
from secondnature.records import Lesson
from secondnature.weights import checkpoint
from secondnature.weights.tensor_file import header, read_places
from secondnature.weights.updates import UPDATE_FILE, write_update
from secondnature.wire import ExportRequest, TrainRequest


def nobody() -> None:
    """Checks in with nobody."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_tiny(llama_config(vocab_size=320), tmp_path_factory.mktemp("imported") / "model")
    save_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def there(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two lesson files of a home: `0001.lesson` stood on the model's own weights, `0002.lesson` on it."""
    folder = tmp_path_factory.mktemp("there")
    served = serve(folder / "home", model)
    try:
        for number, value in ((1, 0.5), (2, -0.25)):
            lesson = served.on_trial(value, corrections=[correction("tea")])
            name, tensor = next(iter(served.arena.tensors.items()))
            write_update(served.log.directory(lesson) / UPDATE_FILE, {name: torch.ones(tensor.shape)})
            served.log.save(lesson.model_copy(update={"state": "kept"}))
            served.weights.keep()
            request = ExportRequest(
                form="lesson", path=str(folder / f"{number:04d}.lesson"), lesson=lesson.id
            )
            Exports(served.log, served.weights).write(request, nobody)
    finally:
        served.home.close()
    return folder


@pytest.fixture
def here(model: Path, tmp_path: Path) -> Iterator[Served]:
    found = serve(tmp_path / "home", model)
    yield found
    found.home.close()


def change(served: Served, source: LessonFile) -> ImportedChange:
    """The change, its entry running."""
    check_same(source.manifest.model, identity_of(served.log, served.arena.tensors), "there")
    check_sizes(source)
    source.check()
    entry = served.log.create("import", "use", imported=source.origin())
    served.weights.begin(entry)
    entry = served.log.save(
        entry.model_copy(update={"state": "running", "parent": served.log.kept_version()})
    )
    plan = Plan.without_training(corrections=[], samples=[], digests=[], seed=0)
    job = Job(entry, plan, TrainRequest(ledger=True), source=source)
    return ImportedChange(job, log=served.log, weights=served.weights, prober=cast("Any", None))


def kept(served: Served, source: LessonFile) -> Lesson:
    """The lesson, applied and kept."""
    entry = served.weights.record(change(served, source).apply(nobody))
    entry = served.log.save(entry.model_copy(update={"state": "kept"}))
    served.weights.keep()
    return entry


def test_one_after_the_other_they_are_the_same_bytes(here: Served, there: Path) -> None:
    files = [open_(there / f"{n:04d}.lesson") for n in (1, 2)]
    entries = [kept(here, file) for file in files]
    for entry, file in zip(entries, files, strict=True):
        assert entry.version == file.manifest.lesson.version
        assert entry.imported is not None
        assert entry.imported.exact
        assert entry.update_sha256 == file.manifest.parts["update.safetensors"].sha256
        assert (here.log.directory(entry) / UPDATE_FILE).is_file()
    assert here.found == here.clock.version == entries[1].version
    here.weights.take_back(entries[1], lambda: here.log.create_revert(entries[1]))
    assert here.found == entries[0].version


def test_on_other_weights_the_difference_is_added_and_rounded(here: Served, there: Path) -> None:
    """After - before in fp32 on what is there: from the delta where it stood on the model's own, else from the
    file."""
    base = {n: t.clone() for n, t in here.arena.tensors.items()}
    steps = {1: (base, 0.5), 2: (None, -0.25)}
    here.kept(0.125)
    for number in (2, 1):
        source = open_(there / f"{number:04d}.lesson")
        assert source.has("difference.safetensors") == (number == 2)
        before = {n: t.clone() for n, t in here.arena.tensors.items()}
        entry = kept(here, source)
        assert entry.imported is not None
        assert entry.imported.exact is False
        first = next(iter(base))
        was = base[first].view(-1)[:7].float() if number == 1 else torch.full((7,), steps[1][1])
        wanted = before[first].clone()
        wanted.view(-1)[:7] = (before[first].view(-1)[:7].float() + (steps[number][1] - was)).to(
            torch.bfloat16
        )
        for name, tensor in here.arena.tensors.items():
            assert torch.equal(tensor, wanted if name == first else before[name]), (number, name)


def rewritten(
    path: Path, data: bytes, part: str, change_it: Callable[[dict[str, Any], dict[str, str]], None]
) -> Path:
    """A lesson file whose packed part is another one, under checksums that fit."""
    path.write_bytes(data)
    places, metadata = read_places(path)
    parts = {n: data[p.start : p.start + p.nbytes] for n, p in places.items()}
    path.write_bytes(parts[part])
    tensors, about = load_file(path), read_places(path)[1]
    change_it(tensors, about)
    save_file(tensors, path, about)
    parts[part] = path.read_bytes()
    manifest = json.loads(parts.pop("manifest.json"))
    manifest["parts"] = {
        n: {"nbytes": len(b), "sha256": hashlib.sha256(b).hexdigest()} for n, b in parts.items()
    }
    text = json.dumps(manifest).encode()
    whole = {"manifest.json": text, **parts}
    metadata["manifest"] = hashlib.sha256(text).hexdigest()
    path.write_bytes(
        header({n: ("U8", (len(b),), len(b)) for n, b in whole.items()}, metadata) + b"".join(whole.values())
    )
    return path


def bomb(tensors: dict[str, Any], _: dict[str, str]) -> None:
    packed = zstandard.ZstdCompressor(level=19).compress(bytes(50_000_000))
    frame = len(packed).to_bytes(4, "little") + packed
    tensors[next(iter(tensors))] = torch.from_numpy(np.frombuffer(frame, np.uint8).copy())


def stranger(tensors: dict[str, Any], about: dict[str, str]) -> None:
    tensors["stranger"] = torch.zeros(4, dtype=torch.uint8)
    about |= {"bytes:stranger": "1", "elements:stranger": "1"}


def not_finite(tensors: dict[str, Any], about: dict[str, str]) -> None:
    name = next(iter(tensors))
    count = int(about[f"elements:{name}"])
    planes = np.full(count, np.inf, np.float32).view(np.uint8).reshape(-1, 4).T
    packed = zstandard.ZstdCompressor().compress(np.ascontiguousarray(planes).data)
    frame = len(packed).to_bytes(4, "little") + packed
    tensors[name] = torch.from_numpy(np.frombuffer(frame, np.uint8).copy())


def other_shape(_: dict[str, Any], about: dict[str, str]) -> None:
    parts = json.loads(about["parts"])
    for part in parts.values():
        part["shape"] = [2**40]
    about["parts"] = json.dumps(parts)


def test_a_part_that_lies_is_refused_before_a_byte_is_written(
    here: Served, there: Path, tmp_path: Path
) -> None:
    first, second = ((there / f"{n:04d}.lesson").read_bytes() for n in (1, 2))
    here.kept(0.125)
    cases: list[tuple[bytes, str, Any]] = [
        (first, "delta.safetensors", bomb),
        (first, "delta.safetensors", stranger),
        (first, "delta.safetensors", lambda _, about: about.update(base="w2-0000000000000000")),
        (second, "difference.safetensors", bomb),
        (second, "difference.safetensors", stranger),
        (second, "difference.safetensors", not_finite),
        (first, "update.safetensors", other_shape),
    ]
    for number, (data, part, change_it) in enumerate(cases):
        source = open_(rewritten(tmp_path / f"{number}.lesson", data, part, change_it))
        before, writes = here.found, here.arena.writes
        mine = change(here, source)
        with pytest.raises(SecondnatureError) as refused:
            mine.apply(nobody)
        assert (here.found, here.arena.writes) == (before, writes), number
        assert isinstance(refused.value, BadDelta) or part == "difference.safetensors", refused.value
        here.log.save(mine._job.lesson.model_copy(update={"state": "failed"}))
        here.weights.restore()
    assert not list(here.home.path.rglob("*imported-*"))


def test_sizes_that_no_part_of_this_model_has_are_refused(here: Served, there: Path) -> None:
    source = open_(there / "0001.lesson")
    source.manifest.parts["delta.safetensors"] = source.manifest.parts["delta.safetensors"].model_copy(
        update={"nbytes": 10**12}
    )
    with pytest.raises(BadInput, match="1,000,000,000,000 bytes; of this model"):
        check_sizes(source)


def test_another_model_is_told_by_what_differs(here: Served, there: Path, tmp_path: Path) -> None:
    """The same shapes with other weights; the same weights with another template, or other tokens."""
    theirs = open_(there / "0001.lesson").manifest.model
    other = serve(tmp_path / "other", save_other(tmp_path / "model"))
    try:
        with pytest.raises(Conflict, match="before any lesson"):
            check_same(theirs, identity_of(other.log, other.arena.tensors), "x")
    finally:
        other.home.close()
    mine = identity_of(here.log, here.arena.tensors)
    for field, said in (
        ("template_sha256", "template"),
        ("tokenizer_sha256", "tokens"),
        ("architecture", "archit"),
    ):
        with pytest.raises(Conflict, match=said):
            check_same(theirs.model_copy(update={field: "0" * 64}), mine, "x")
    check_same(theirs, mine, "x")
    assert checkpoint.specs(here.log.base_dir).keys() == mine.tensors.keys()


def save_other(directory: Path) -> Path:
    save_tiny(llama_config(vocab_size=320), directory, seed=1)
    save_tokenizer(directory)
    return directory
