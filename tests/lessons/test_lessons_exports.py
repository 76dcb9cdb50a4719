"""What leaves the home: whole or not there, to the bit what is kept, and known of when a lesson is taken back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from failing_disk import disk
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from served_home import Served, serve
from tiny_server import Running, teach
from transformers import AutoModelForCausalLM, AutoTokenizer

from secondnature.errors import BadInput, Busy, NotDurable, SecondnatureError, StorageError, WrongState
from secondnature.lessons.exports import Exports
from secondnature.records import Export
from secondnature.weights import checkpoint
from secondnature.weights.content import content_id
from secondnature.wire import ExportRequest, PruneRequest


def nobody() -> None:
    """Checks in with nobody."""


def to(path: Path, form: str = "checkpoint", **given: Any) -> ExportRequest:
    return ExportRequest.model_validate({"form": form, "path": str(path), **given})


@pytest.fixture(scope="module")
def sharded(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The talker in two files, with what a processor and a license are beside it."""
    directory = tmp_path_factory.mktemp("sharded") / "model"
    shutil.copytree(talker, directory)
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, mine in parts.items():
        save_file({n: weights[n] for n in mine}, directory / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: file for file, mine in parts.items() for n in mine}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "preprocessor_config.json").write_text('{"size": 3}')
    (directory / "LICENSE").write_text("yours")
    (directory / "pytorch_model.bin").write_bytes(b"PK\x03\x04 somebody's")
    return directory


@pytest.fixture
def served(sharded: Path, tmp_path: Path) -> Generator[Served]:
    found = serve(tmp_path / "home", sharded)
    yield found
    found.home.close()


def test_a_checkpoint_is_to_the_bit_what_is_kept(served: Served, sharded: Path, tmp_path: Path) -> None:
    """In as many files as the model has, with all that belongs to it; plain transformers loads it."""
    first, second = served.kept(0.25), served.kept(0.5)
    exports, target = Exports(served.log, served.weights), tmp_path / "out"
    made = exports.write(to(target), nobody)
    assert content_id(checkpoint.read(target)) == made.weights_version == second.version
    assert {p.name for p in target.iterdir()} == {
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("chat_template.jinja", "preprocessor_config.json", "LICENSE", "secondnature.json"),
        *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        "model.safetensors.index.json",
    }
    where = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
    was = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    renamed = {"a.safetensors": "model-00001-of-00002.safetensors"}
    other = "model-00002-of-00002.safetensors"
    assert where == {n: renamed.get(file, other) for n, file in was.items()}
    loaded: Any = AutoModelForCausalLM.from_pretrained(target)
    for name, tensor in served.arena.tensors.items():
        assert torch.equal(loaded.get_parameter(name), tensor), name
    assert AutoTokenizer.from_pretrained(target).chat_template
    assert made.lessons == checkpoint.state(target)["lessons"] == [first.id, second.id]
    assert made.nbytes == sum(p.stat().st_size for p in target.iterdir())
    assert exports.all() == [made]


def test_what_is_on_trial_is_not_exported(served: Served, tmp_path: Path) -> None:
    kept = served.kept(0.25)
    served.on_trial(0.5)
    made = Exports(served.log, served.weights).write(to(tmp_path / "out"), nobody)
    assert content_id(checkpoint.read(tmp_path / "out")) == made.weights_version == kept.version


def test_a_disk_that_refuses_any_call_leaves_all_of_it_or_nothing(served: Served, tmp_path: Path) -> None:
    """And whatever is there was noted before."""
    served.kept(0.25)
    exports = Exports(served.log, served.weights)
    exports.write(to(tmp_path / "first"), nobody)  # the first note of a home makes the file
    with disk() as counted:
        exports.write(to(tmp_path / "whole"), nobody)
    wanted = served.log.kept_version()
    for n in range(len(counted.made)):
        target = tmp_path / f"out-{n}"
        with disk(n), pytest.raises((StorageError, OSError)) as refused:
            exports.write(to(target), nobody)
        there = target.exists()
        assert there == isinstance(refused.value, NotDurable), counted.made[n]
        if there:
            assert content_id(checkpoint.read(target)) == wanted
            assert str(target) in [x.path for x in exports.all()]
    assert not list(tmp_path.glob(".out-*"))
    exports.write(to(tmp_path / "after"), nobody)


def test_a_crash_leaves_nothing_that_looks_whole_and_the_next_export_removes_it(
    served: Served, sharded: Path, tmp_path: Path
) -> None:
    code = f"""
import os
from pathlib import Path
from secondnature.weights import checkpoint
def dying():
    for i, pair in enumerate(checkpoint.stream(Path({str(sharded)!r}))):
        if i == 5:
            os._exit(9)
        yield pair
target = Path({str(tmp_path)!r}) / f".out.{{os.getpid()}}.tmp"
checkpoint.export(target, Path({str(sharded)!r}), dying(), {{}})
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 9
    left = list(tmp_path.glob(".out.*.tmp"))
    assert len(left) == 1
    with pytest.raises(SecondnatureError):
        checkpoint.read(left[0])
    Exports(served.log, served.weights).write(to(tmp_path / "out"), nobody)
    assert not list(tmp_path.glob(".out.*.tmp"))


def test_where_an_export_may_not_go(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exports = Exports(served.log, served.weights)
    (tmp_path / "there").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    wrong = ["there", "dangling", "no/folder", "home/out", "home/lessons/out", "there/../../out"]
    for path in [*(f"{tmp_path}/{w}" for w in wrong), "relative", "/", f"{tmp_path}/nul\0"]:
        with pytest.raises(BadInput):
            exports.write(ExportRequest(form="checkpoint", path=path), nobody)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(StorageError, match=r"0\.2 MB are needed, 0\.0 MB are free"):
        exports.write(to(tmp_path / "out"), nobody)
    assert not list(tmp_path.glob("*out*"))
    assert exports.all() == []


def test_what_is_read_stays_and_one_is_written_at_a_time(served: Served, tmp_path: Path) -> None:
    served.kept(0.25)
    exports = Exports(served.log, served.weights)
    asked = list[str]()

    def check_in() -> None:
        if not asked:
            with pytest.raises(Busy):
                served.weights.fold()
            with pytest.raises(Busy):
                exports.write(to(tmp_path / "second"), nobody)
            progress = exports.progress
            assert progress is not None
            asked.append(progress.unit)

    exports.write(to(tmp_path / "first"), check_in)
    assert asked == ["tensors"]
    assert exports.progress is None
    served.weights.fold()


def test_the_weights_before_any_kept_entry_are_found_on_either_side_of_the_working_copy(
    served: Served,
) -> None:
    lessons = [served.kept(0.1 * (i + 1)) for i in range(4)]
    served.weights.take_back(lessons[3], lambda: served.log.create_revert(lessons[3]))
    for fold_after in (False, True):
        if fold_after:
            served.weights.fold()
        for lesson in [*lessons, served.log.all()[-1]]:
            before = content_id(dict(served.log.weights_before(lesson)))
            assert before == lesson.parent, (lesson.id, fold_after)
    served.delta(lessons[1]).unlink()
    assert content_id(dict(served.log.weights_before(lessons[0]))) == lessons[0].parent  # from the base
    assert content_id(dict(served.log.weights_before(lessons[2]))) == lessons[2].parent
    served.delta(lessons[2]).unlink()
    with pytest.raises(WrongState, match="pruned"):
        served.log.weights_before(lessons[2])


def test_a_lesson_that_is_taken_back_is_found_in_what_left(
    server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from secondnature.cli import main

    lesson = server.lesson(teach(["jam"], keep=True, max_steps=1), "kept")
    flags = ["--url", server.url, "--json"]
    os.environ["SECONDNATURE_API_KEY"] = "the-key-of-the-tests"
    try:
        assert main(["export", "-o", str(tmp_path / "out"), *flags]) == 0
        made = Export.model_validate_json(capsys.readouterr().out)
        assert made.lessons[-1] == lesson.id
        assert content_id(checkpoint.read(tmp_path / "out")) == server.weights
        assert main(["lessons", "recall", lesson.id, *flags]) == 0
        server.client.revert(lesson.id)
        capsys.readouterr()
        assert main(["lessons", "recall", lesson.id, *flags]) == 1
        found = json.loads(capsys.readouterr().out)
        assert found["undone"]
        assert [x["path"] for x in found["exports"]] == [str(tmp_path / "out")]
        shutil.rmtree(tmp_path / "out")
        assert main(["lessons", "recall", lesson.id, *flags]) == 0
        assert main(["export", "-o", str(tmp_path / "again"), *flags]) == 0
        capsys.readouterr()
        assert server.client.exports(lesson.id).exports == [made]
        assert server.client.prune(PruneRequest(dry_run=True)).dry_run
    finally:
        del os.environ["SECONDNATURE_API_KEY"]


def test_a_judged_lesson_keeps_what_it_was_judged_by(server: Running) -> None:
    from tiny_server import LOW_GATE, say_probes, use_probes

    probes = [*use_probes(["dots", "salt"]), *say_probes(["dots"])]
    lesson = server.lesson(teach(max_steps=1, probes=probes, gate=LOW_GATE))
    assert server.parts.runner.log.probes(lesson) == probes


def test_the_files_of_one_tensor_are_in_the_library_s_order(served: Served, tmp_path: Path) -> None:
    Exports(served.log, served.weights).write(to(tmp_path / "out"), nobody)
    for file in tmp_path.glob("out/*.safetensors"):
        with safe_open(file, framework="pt") as stored:
            assert stored.metadata() == {"format": "pt"}
