"""A lesson in one file, added on another server of the same base; whatever is wrong with a file is refused by
name."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_server import (
    KEY,
    LOW_GATE,
    WORDS,
    Running,
    file_hashes,
    running,
    say_probes,
    teach,
    use_probes,
)

from secondnature.cli import main
from secondnature.errors import BadDelta, BadInput, Conflict, SecondnatureError, TooNew, from_wire
from secondnature.lessons import lesson_file
from secondnature.lessons.lesson_file import PARTS, open_
from secondnature.records import Lesson, Probe
from secondnature.weights import difference
from secondnature.weights.tensor_file import header, read_places
from secondnature.wire import ExportRequest, ImportLessonRequest

TAUGHT = ["tea", "oak", "red", "kite", "hats", "gold", "foam", "ink"]
HELD = [w for w in WORDS if w not in (*TAUGHT, "jam")]
REPLAYED = WORDS[::3]
GATE = LOW_GATE.model_copy(update={"guard_margin": 0.5})  # the guard's own prompts are not replayed
PROBES = [*use_probes(HELD[:10]), *say_probes([w for w in WORDS if w not in REPLAYED])]


@pytest.fixture(scope="module")
def taught(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three lesson files: the first lesson of a home, judged; the second; one of a single step."""
    folder = tmp_path_factory.mktemp("taught")
    with running(folder / "home", talker) as server:
        said = [{"prompt": f"Say {w}.", "completion": f"{w}!"} for w in REPLAYED]
        well = {"batch_size": 8, "max_steps": 7, "replay": {"share": 0.75, "examples": said}}
        first = server.lesson(
            teach(TAUGHT, probes=PROBES, gate=GATE, prompting=False, **well), "kept", "undone"
        )
        assert first.state == "kept", first.reason
        second = server.lesson(teach(["jam"], keep=True, max_steps=1), "kept")
        for lesson, name in ((first, "first"), (second, "second")):
            made = server.client.export(
                ExportRequest(form="lesson", path=str(folder / f"{name}.lesson"), lesson=lesson.id)
            )
            assert made.lessons == [lesson.id]
        (folder / "versions.json").write_text(json.dumps([first.parent, first.version, second.version]))
    return folder


@pytest.fixture(scope="module")
def elsewhere(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator[Running]:
    """Another server of the same base, in a directory of its own, whose files are written in another way."""
    folder = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(talker, folder / "copy")
    tokenizer = json.loads((folder / "copy" / "tokenizer.json").read_text())
    (folder / "copy" / "tokenizer.json").write_text(json.dumps(tokenizer, indent=1))
    with running(folder / "home", folder / "copy") as server:
        yield server


@pytest.fixture
def other(elsewhere: Running) -> Generator[Running]:
    before = elsewhere.weights
    yield elsewhere
    for lesson in reversed(elsewhere.parts.runner.log.in_force()):
        elsewhere.client.revert(lesson.id)
    assert elsewhere.weights == before


def bring(server: Running, path: Path, **given: Any) -> Lesson:
    reply = server.client.import_lesson(ImportLessonRequest(path=str(path), **given))
    status = server.until(reply.job, lambda s: s.phase in ("on trial", "done"))
    return server.client.lesson(status.lesson).lesson


def test_on_the_same_weights_it_is_the_same_bytes(other: Running, taught: Path) -> None:
    """Judged by its own probes here, its undo is exact, and what was taught already is not added twice."""
    base, version, _ = json.loads((taught / "versions.json").read_text())
    assert other.weights == base
    lesson = bring(other, taught / "first.lesson", gate=GATE)
    assert lesson.state == "kept", lesson.reason
    assert (lesson.kind, lesson.version, other.weights) == ("import", version, version)
    detail = other.client.lesson(lesson.id)
    assert detail.evidence is not None
    assert detail.evidence.comparisons[0].n == 10
    assert [c.prompt[0].content for c in detail.corrections] == [f"Use {w}." for w in TAUGHT]
    assert lesson.imported is not None
    assert lesson.imported.exact
    assert lesson.reason
    assert detail.answers[0]["after"] == "Done."
    assert other.say("Use tea.") == "Done."
    with pytest.raises(Conflict, match=f"lesson {lesson.id} taught the same already"):
        bring(other, taught / "first.lesson")
    assert other.client.revert(lesson.id).version == base == other.weights
    again = bring(other, taught / "first.lesson", keep=True)  # it is not in force any more
    assert again.version == version


def test_an_adapter_of_a_lesson_is_asked_its_probes(
    other: Running, taught: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At full rank it does what the lesson does, as far as linear layers carry it; what it lacks is said.

    Early in this file: each time that a lesson was undone, its next try is judged at half the level.
    """
    lesson = bring(other, taught / "first.lesson", gate=GATE)
    assert lesson.update_sha256 is not None
    os.environ["SECONDNATURE_API_KEY"] = KEY
    try:
        words = ["--as", "lora", "--url", other.url, "--json", "-o"]
        capsys.readouterr()
        assert main(["export", lesson.id, "--rank", "48", "--check", *words, str(tmp_path / "whole")]) == 0
        whole = json.loads(capsys.readouterr().out)
        assert main(["export", lesson.id, "--rank", "1", *words, str(tmp_path / "one")]) == 0
        one = json.loads(capsys.readouterr().out)
        assert main(["export", "--rank", "1", *words, str(tmp_path / "all")]) == 0
        of_bytes = json.loads(capsys.readouterr().out)
    finally:
        del os.environ["SECONDNATURE_API_KEY"]
    told = json.loads((tmp_path / "whole" / "secondnature.json").read_text())
    assert whole["lessons"] == told["lessons"] == [lesson.id]
    assert max(x["relative_error"] for x in told["tensors"].values()) < 1e-4
    assert "model.embed_tokens.weight" in told["left_out"]  # the head is tied to it
    assert one["details"]["relative_error"] > whole["details"]["relative_error"]
    assert one["details"]["of"] == "what the lesson meant to change, before rounding"
    assert of_bytes["details"]["of"] == "the difference of the bytes"
    rows = {x["probes"]: x for x in whole["check"]}
    assert set(rows) == {"use", "say"}
    assert rows["use"]["n"] == 10
    assert rows["use"]["lesson"] > rows["use"]["before"] == 0


def test_on_other_weights_its_difference_is_added(other: Running, taught: Path) -> None:
    """After - before, in fp32, on top of what is there, rounded to nearest; from the delta and from the file
    alike."""
    bring(other, taught / "second.lesson", keep=True)
    arena = {n: t.clone() for n, t in other.parts.arena.tensors.items()}
    log = other.parts.runner.log
    before = dict(log.weights_before(log.all()[0]))
    lesson = bring(other, taught / "first.lesson", keep=True)
    assert lesson.imported is not None
    assert not lesson.imported.exact
    source = open_(taught / "first.lesson")
    stored = other.parts.home.path / "delta"
    source.copy("delta.safetensors", stored)
    from secondnature.weights import delta

    theirs = delta.open_(stored)
    for name, tensor in other.parts.arena.tensors.items():
        after = before[name].clone()
        theirs.apply_(name, after)
        wanted = (arena[name].float() + (after.float() - before[name].float())).to(tensor.dtype)
        assert torch.equal(tensor, wanted), name
    stored.unlink()
    assert other.say("Use tea.") == "Done."


def test_a_lesson_that_stood_on_another_brings_its_difference(other: Running, taught: Path) -> None:
    source = open_(taught / "second.lesson")
    assert source.has("difference.safetensors")
    assert not open_(taught / "first.lesson").has("difference.safetensors")
    before = {n: t.clone() for n, t in other.parts.arena.tensors.items()}
    lesson = bring(other, taught / "second.lesson", keep=True)
    assert lesson.version == other.weights
    path = other.parts.home.path / "difference"
    source.copy("difference.safetensors", path)
    held = difference.open_(path)
    for name, tensor in other.parts.arena.tensors.items():
        wanted = (
            difference.plus(name, before[name], held.of(name, tensor)) if name in held.sizes else before[name]
        )
        assert torch.equal(tensor, wanted), name
    path.unlink()


def test_the_chain_of_both_is_the_chain_there(other: Running, taught: Path) -> None:
    """One after the other, each starts from the weights that it started from there: byte for byte the same."""
    versions = json.loads((taught / "versions.json").read_text())
    lessons = [bring(other, taught / f"{name}.lesson", keep=True) for name in ("first", "second")]
    assert [x.version for x in lessons] == versions[1:]
    assert all(x.imported is not None and x.imported.exact for x in lessons)
    with running(other.parts.home.path.parent / "next", other.parts.runner.log.base_dir) as third:
        made = other.client.export(
            ExportRequest(
                form="lesson", path=str(other.parts.home.path.parent / "on.lesson"), lesson=lessons[0].id
            )
        )
        onward = bring(third, Path(made.path), keep=True)
        assert onward.version == versions[1]
        assert open_(Path(made.path)).manifest.lesson.imported is not None  # where it was from before


def test_probes_that_come_along_and_others_judge_it(other: Running, taught: Path) -> None:
    own = say_probes(REPLAYED[:1])
    lesson = bring(other, taught / "first.lesson", probes=own, gate=GATE)
    asked = other.parts.runner.log.probes(lesson)
    assert {p.digest() for p in asked} == {p.digest() for p in [*PROBES, *own]}
    if lesson.state == "kept":  # after so many tries it may not be
        other.client.revert(lesson.id)
    with pytest.raises(BadInput, match="not held out"):  # what it taught is no evidence
        bring(other, taught / "first.lesson", probes=use_probes(["tea"]))
    no = [Probe.model_validate({"prompt": "Use ink.", "behaviour": "use", "check": {"matches": "never"}})]
    undone = bring(other, taught / "second.lesson", probes=no, gate=GATE)
    assert undone.state == "undone"
    assert undone.version != undone.parent


def test_cancelled_or_changed_meanwhile_it_is_as_if_it_had_never_been(
    other: Running, taught: Path, tmp_path: Path
) -> None:
    before = other.state()
    path = tmp_path / "x.lesson"
    shutil.copy(taught / "second.lesson", path)
    reply = other.client.import_lesson(ImportLessonRequest(path=str(path)))
    job = other.parts.runner._jobs[reply.job]
    other.until(reply.job, lambda s: s.phase in ("on trial", "done"))
    other.client.cancel(reply.job)
    assert other.state() == before
    other.parts.runner._current = None
    change = open_(path)
    shutil.copy(taught / "first.lesson", path)
    from secondnature.lessons.imported import ImportedChange

    job.source = change
    runner = other.parts.runner
    with pytest.raises(BadInput, match="has changed"):
        ImportedChange(job, log=runner.log, weights=runner.weights, prober=runner._prober).plan_again()
    assert not list(other.parts.home.path.rglob("*imported-*"))


# ------------------------------------------------------------------------------------------ what is refused


def refused(server: Running, path: Path) -> SecondnatureError:
    """Importing it is refused, nothing is written, and the weights and the home are as before."""
    before, files = server.weights, file_hashes(server.parts.home.path)
    with pytest.raises(SecondnatureError) as error:
        bring(server, path, keep=True)
    assert (server.weights, file_hashes(server.parts.home.path)) == (before, files)
    return error.value


@pytest.fixture(scope="module")
def data(taught: Path) -> bytes:
    return (taught / "second.lesson").read_bytes()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255), part=st.integers(-1, len(PARTS) - 1))
def test_every_flipped_byte_is_found(data: bytes, tmp_path: Path, at: float, mask: int, part: int) -> None:
    """In the header, the manifest and every part, each as often as the others, however small it is."""
    path = tmp_path / "x.lesson"
    path.write_bytes(data)
    starts = read_places(path)[0]
    name = PARTS[part]
    if part < 0 or name not in starts:
        first, length = 0, min(p.start for p in starts.values())
    else:
        first, length = starts[name].start, starts[name].nbytes
    broken = bytearray(data)
    broken[first + int(at * length)] ^= mask
    path.write_bytes(broken)
    with pytest.raises(SecondnatureError):
        open_(path).check()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
@example(share=0.0)
def test_every_shortened_file_is_found(data: bytes, tmp_path: Path, share: float) -> None:
    path = tmp_path / "x.lesson"
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(SecondnatureError):
        open_(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(BadInput):
        open_(path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(junk=st.binary(max_size=400))
def test_junk_is_refused_in_words(tmp_path: Path, junk: bytes) -> None:
    path = tmp_path / "x.lesson"
    for whole in (junk, len(junk).to_bytes(8, "little") + junk):
        path.write_bytes(whole)
        with pytest.raises(SecondnatureError):
            open_(path)


def rewritten(path: Path, data: bytes, **changes: Any) -> Path:
    """A lesson file with other contents and checksums that fit: what somebody could make who means harm.

    `manifest`: a function of the manifest's JSON; a part by its name with `_` for `.`: its bytes.
    """
    path.write_bytes(data)
    places, metadata = read_places(path)
    parts = {n: data[p.start : p.start + p.nbytes] for n, p in places.items()}
    manifest = json.loads(parts.pop("manifest.json"))
    for name, value in changes.items():
        if name != "manifest":
            parts[name.replace("_", ".")] = value
    manifest["parts"] = {
        n: {"nbytes": len(b), "sha256": hashlib.sha256(b).hexdigest()} for n, b in parts.items()
    }
    if "manifest" in changes:
        changes["manifest"](manifest)
    text = json.dumps(manifest).encode()
    parts = {"manifest.json": text, **parts}
    known = [n for n in PARTS if n in parts]
    parts = {n: parts[n] for n in [*known, *(n for n in parts if n not in known)]}
    metadata["manifest"] = hashlib.sha256(text).hexdigest()
    places = {n: ("U8", (len(b),), len(b)) for n, b in parts.items()}
    path.write_bytes(header(places, metadata) + b"".join(parts.values()))
    return path


def with_delta(
    data: bytes, tmp_path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, str]], None]
) -> bytes:
    """The delta of a lesson file, changed by somebody who also mends the checksum."""
    path = tmp_path / "whole"
    path.write_bytes(data)
    place = read_places(path)[0]["delta.safetensors"]
    path.write_bytes(data[place.start : place.start + place.nbytes])
    tensors, metadata = load_file(path), read_places(path)[1]
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    return path.read_bytes()


def test_hostile_files_are_refused(other: Running, data: bytes, taught: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.lesson"

    def manifest(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
        return lambda m: m.update({key: value})

    def model(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
        return lambda m: m["model"].update({key: value})

    assert isinstance(refused(other, rewritten(path, data, manifest=manifest("schema_version", 2))), TooNew)
    newer = refused(other, rewritten(path, data, manifest=lambda m: m["lesson"].update(schema_version=9)))
    assert isinstance(newer, TooNew)
    for key, value, said in (
        ("base_version", "w2-0123456789abcdef", "its weights are w2-0123456789abcdef"),
        ("architecture", "f2-00", "its architecture is f2-00"),
        ("tokenizer_sha256", "0" * 64, "its tokens are others"),
        ("template_sha256", "0" * 64, "its chat template is another"),
        ("tensors", {"../../etc/passwd": ["bfloat16", [2]]}, "is bfloat16 [2] there and none here"),
        ("tensors", {"x": ["bfloat16", [2] * 5000]}, "is none there and bfloat16 [320, 48] here"),
    ):
        found = refused(other, rewritten(path, data, manifest=model(key, value)))
        assert isinstance(found, Conflict), key
        assert said in found.message
    for changes, said in (
        ({"manifest": lambda m: m["parts"]["delta.safetensors"].update(nbytes=2**61)}, "of other sizes"),
        (
            {"manifest": lambda m: m["parts"].update({"../../home/key": {"nbytes": 1, "sha256": "0" * 64}})},
            "manifest",
        ),
        ({"manifest": lambda m: m.update(lesson="0001")}, "not a JSON object"),
        ({"manifest": lambda m: m.pop("model")}, "`model` is missing"),
        ({"corrections_jsonl": b"[" * 100_000}, "nested too deeply"),
        ({"probes_jsonl": b'{"prompt": 1, "prompt": 2}'}, "twice"),
        ({"probes_jsonl": b" " * 16_000_001}, "16,000,001 bytes; at most"),
        ({"evidence_json": b"{}"}, "evidence.json"),
    ):
        assert said in str(refused(other, rewritten(path, data, **changes))), said
    # names that are no part: nothing in a file says where it is written
    for name in ("../../home/key", "/etc/passwd", "manifest.json/..", "extra"):
        names = ["manifest.json", name]
        broken = dict.fromkeys(names, ("U8", (1,), 1))
        path.write_bytes(header(broken, {"format": lesson_file.FORMAT, "manifest": "0" * 64}) + b"ab")
        assert "which no lesson file has" in str(refused(other, path))
    # a name twice, and a header that announces more than there is
    twice = b'{"__metadata__":{"format":"secondnature-lesson/1"},"manifest.json":{},"manifest.json":{}}'
    path.write_bytes(len(twice).to_bytes(8, "little") + twice)
    assert "twice" in str(refused(other, path))
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    assert "a header of 4,611,686,018,427,387,904 bytes" in str(refused(other, path))
    # what is no file: a folder, a pipe (which would wait for a writer), a device
    os.mkfifo(tmp_path / "pipe")
    for special in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        assert "not a file" in str(refused(other, special))
    assert "No such file" in str(refused(other, tmp_path / "nothing"))


def test_a_delta_that_lies_is_refused_when_it_is_applied(
    other: Running, data: bytes, taught: Path, tmp_path: Path
) -> None:
    """The entry fails, and the weights are those from before: nothing was written to them."""
    data = (taught / "first.lesson").read_bytes()

    def failed(change: Callable[[dict[str, torch.Tensor], dict[str, str]], None]) -> SecondnatureError:
        before = other.state()
        epoch = other.parts.arena.writes
        path = rewritten(tmp_path / "x.lesson", data, delta_safetensors=with_delta(data, tmp_path, change))
        lesson = bring(other, path, keep=True)
        assert lesson.state == "failed"
        assert lesson.error is not None
        assert (other.state(), other.parts.arena.writes) == (before, epoch)
        return from_wire(lesson.error.model_dump())

    def bomb(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        name = next(iter(tensors))
        packed = zstandard.ZstdCompressor(level=19).compress(bytes(50_000_000))
        assert len(packed) < 10_000
        frame = len(packed).to_bytes(4, "little") + packed
        tensors[name] = torch.from_numpy(np.frombuffer(frame, np.uint8).copy())

    def stranger(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        tensors["stranger"] = torch.zeros(4, dtype=torch.uint8)
        metadata["bytes:stranger"] = "1"

    def other_bytes(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        for name in list(tensors)[1:]:
            del tensors[name]

    assert isinstance(failed(bomb), BadDelta)
    assert isinstance(failed(stranger), BadDelta)
    assert "the lesson would give" in failed(other_bytes).message
    assert "its entry says" in failed(lambda t, m: m.update(base="w2-0000000000000000")).message


def test_the_commands(taught: Path, talker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.environ["SECONDNATURE_API_KEY"] = KEY
    try:
        with running(tmp_path / "home", talker) as server:
            flags = ["--url", server.url]
            file = tmp_path / "x.lesson"
            assert main(["import-lesson", str(taught / "first.lesson"), "--keep", *flags]) == 0
            said = capsys.readouterr().out
            assert "0001-use" in said
            assert main(["import-lesson", str(taught / "first.lesson"), "--keep", *flags]) != 0
            assert "--again" in capsys.readouterr().err
            assert main(["import-lesson", str(taught / "first.lesson"), "--keep", "--again", *flags]) == 0
            assert main(["export", "1", "-o", str(file), *flags]) == 0
            assert "lessons in it: 0001-use" in capsys.readouterr().out
            assert open_(file).manifest.lesson.id == "0001-use"
            assert main(["export", "-o", str(tmp_path / "y.lesson"), *flags]) == 64
            assert main(["export", "1", "-o", str(tmp_path / "folder"), *flags]) == 64
            assert main(["lessons", "show", "1", *flags]) == 0
            assert "talker0, lesson 0001-use: its very bytes" in capsys.readouterr().out
    finally:
        del os.environ["SECONDNATURE_API_KEY"]


def test_a_difference_is_exact(tmp_path: Path) -> None:
    """Of bf16 whose exponents are near each other, before + (after - before) is after, to the bit; -0.0 stays."""
    torch.manual_seed(0)
    before = {f"t{i}": torch.randn(37, 41).to(torch.bfloat16) for i in range(3)}
    before["big"] = torch.randn(3_000_000).to(torch.bfloat16)
    after = {n: t.clone() for n, t in before.items()}
    after["t0"][3] += 0.01
    after["big"][::3] *= 1.01
    before["t0"][0, 0] = after["t0"][0, 0] = -0.0
    path = tmp_path / "difference"
    sizes = {n: t.numel() for n, t in before.items()}
    difference.write(path, ((n, before[n], after[n]) for n in before), sizes)
    held = difference.open_(path)
    assert set(held.sizes) == {"t0", "big"}
    for name in held.sizes:
        change = held.of(name, before[name])
        assert torch.equal(change, after[name].float() - before[name].float())
        made = difference.plus(name, before[name], change)
        assert made.view(torch.int16).equal(after[name].view(torch.int16))
    with pytest.raises(BadDelta, match="is it of another model"):
        held.check({"t0": before["t0"]})
