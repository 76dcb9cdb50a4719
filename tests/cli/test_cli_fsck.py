"""`fsck`: a healthy home says so, and every kind of damage is found and named; `lessons prune` on the same home."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_server import KEY, LOW_GATE, WORDS, correction, file_hashes, running, say_probes, teach, use_probes

from secondnature.cli import main
from secondnature.errors import WrongState
from secondnature.lessons.home import take_lock
from secondnature.wire import PruneRequest


@pytest.fixture(scope="module")
def healthy(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with all kinds of files: a judged lesson, a revert, a working copy in the middle, one more lesson."""
    home = tmp_path_factory.mktemp("fsck") / "home"
    held = [w for w in WORDS if w not in ("tea", "oak")][:8]
    with running(home, talker, api_key=None) as server:
        server.client._http.headers["authorization"] = f"Bearer {server.parts.teaching.key}"  # pyright: ignore
        server.client.import_corrections([correction("tea"), correction("oak")])
        probes = [*use_probes(held), *say_probes(held)]
        judged = server.lesson(teach(("tea", "oak"), probes=probes, gate=LOW_GATE), "kept", "undone")
        assert judged.verdict is not None
        for word in ("red", "kite"):
            lesson = server.lesson(teach((word,), keep=True, max_steps=1), "kept")
        server.client.revert(lesson.id)
        server.client.checkpoint()
        server.lesson(teach(("jam",), keep=True, max_steps=1), "kept")
    return home


@pytest.fixture
def home(healthy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it."""
    monkeypatch.delenv("SECONDNATURE_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(healthy, tmp_path / "home", symlinks=True)
    return tmp_path / "home"


def checked(home: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = main(["fsck", "--home", str(home), "--json"])
    return code, json.loads(capsys.readouterr().out)


def flip(path: Path, at: float = 0.5, mask: int = 0x80) -> None:
    """Change one byte."""
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= mask
    path.write_bytes(data)


def newest(home: Path, name: str) -> Path:
    """The file of that name in the last lesson that has it."""
    return sorted((home / "lessons").glob(f"*/{name}"))[-1]


def test_a_healthy_home_is_whole_and_stays_as_it_was(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = file_hashes(home)
    assert main(["fsck", "--home", str(home)]) == 0
    out, err = capsys.readouterr()
    assert "is whole" in out
    assert ", 5 lessons, weights w2-" in out
    for phase in ("reading the home", "reading lessons", "reading deltas", "replaying the chain"):
        assert any(line.startswith(f"{phase}: ") and " done in " in line for line in err.splitlines()), err
    code, found = checked(home, capsys)
    assert (code, found["ok"], found["findings"]) == (0, True, [])
    assert file_hashes(home) == before


def _older(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "home.json": (lambda h: flip(h / "home.json"), "home.json", "not JSON"),
    "the model's version": (
        lambda h: _older(h / "home.json", base_version="w2-" + "0" * 16),
        "",
        "the weights before it are w2-0000",
    ),
    "a newer home": (lambda h: _older(h / "home.json", format=99), "home.json", "format 99"),
    "key": (lambda h: flip(h / "key"), "key", "printable"),
    "settings": (lambda h: flip(h / "settings.json"), "settings.json", "not JSON"),
    "ledger": (lambda h: flip(h / "ledger.jsonl", 0.2), "ledger.jsonl", "line 1: not UTF-8"),
    "lesson.json": (lambda h: flip(newest(h, "lesson.json")), "lesson.json", "not JSON"),
    "an entry's place": (
        lambda h: _older(newest(h, "lesson.json"), parent="w2-" + "0" * 16),
        "lesson.json",
        "starts from",
    ),
    "an entry that is gone": (lambda h: newest(h, "lesson.json").unlink(), "lesson.json", "missing"),
    "evidence": (
        lambda h: _older(newest(h, "evidence.json"), sentence="All is well."),
        "evidence.json",
        "sentence",
    ),
    "evidence, a byte": (lambda h: flip(newest(h, "evidence.json")), "evidence.json", "not JSON"),
    "corrections": (lambda h: flip(newest(h, "corrections.jsonl"), 0.3, 1), "corrections.jsonl", ""),
    "probes": (lambda h: flip(newest(h, "probes.jsonl"), 0.001, 1), "probes.jsonl", ""),
    "moved": (lambda h: flip(newest(h, "moved.json")), "moved.json", "not JSON"),
    "answers": (lambda h: flip(newest(h, "answers.jsonl")), "answers.jsonl", "not UTF-8"),
    "a delta": (lambda h: flip(newest(h, "delta.safetensors"), 0.9), "delta.safetensors", "checksum"),
    "a delta that is gone": (
        lambda h: newest(h, "delta.safetensors").unlink(),
        "delta.safetensors",
        "nobody pruned",
    ),
    "an optimizer state": (
        lambda h: flip(newest(h, "optimizer.safetensors"), 0.9),
        "optimizer.safetensors",
        "checksum",
    ),
    "an update": (lambda h: flip(newest(h, "update.safetensors"), 0.9), "update.safetensors", "checksum"),
    "an update that is gone": (
        lambda h: newest(h, "update.safetensors").unlink(),
        "update.safetensors",
        "nobody pruned",
    ),
    "the working copy": (
        lambda h: flip((h / "model" / "current").resolve() / "model.safetensors", 0.9),
        "model/w2-",
        "expected w2-",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_each_kind_of_damage_is_found_and_named(
    kind: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, file, said = DAMAGE[kind]
    damage(home)
    before = file_hashes(home)
    code, found = checked(home, capsys)
    damaged = [f for f in found["findings"] if f["level"] == "damaged"]
    assert any(file in f["file"] and said in f["found"] and f["do"] for f in damaged), found["findings"]
    assert (code, found["ok"]) == (1, False)
    assert file_hashes(home) == before, "it repairs nothing"


def test_what_a_crash_may_leave_is_a_note(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (home / "ledger.jsonl").open("a") as ledger:
        ledger.write('{"prompt": "half')
    flip(newest(home, "metrics.jsonl"), 0.1)
    code, found = checked(home, capsys)
    assert (code, found["ok"]) == (0, True)
    assert {(f["file"].rsplit("/", 1)[-1], f["level"]) for f in found["findings"]} == {
        ("ledger.jsonl", "note"),
        ("metrics.jsonl", "note"),
    }


def test_a_home_that_a_server_holds_is_left_alone(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with take_lock(home):
        assert main(["fsck", "--home", str(home)]) == 69
    assert "stop that server first" in capsys.readouterr().err
    assert main(["fsck", "--home", str(home / "none")]) == 64


def test_prune_says_what_it_removes_and_what_can_still_be_undone(
    home: Path, talker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SECONDNATURE_API_KEY", KEY)
    with running(home, talker) as server:
        before = file_hashes(home)
        log = [x for x in server.client.lessons().lessons if x.state == "kept"]
        head = log[-1]
        dry = server.client.prune(PruneRequest(keep_states=0, keep_deltas=0, dry_run=True))
        assert file_hashes(home) == before
        assert f"{log[0].id}/delta.safetensors" in dry.removed
        assert f"{head.id}/delta.safetensors" not in dry.removed, "the working copy stands on it"
        assert f"{head.id}/optimizer.safetensors" not in dry.removed, "the next lesson starts from it"
        assert dry.undoable == [head.id]
        words = ["lessons", "prune", "--keep-states", "0", "--keep-deltas", "0", "--url", server.url]
        assert main([*words, "--dry-run"]) == 0
        assert "would be removed" in capsys.readouterr().out
        assert main(words) == 0
        out = capsys.readouterr().out
        assert f"can be undone: 1 lesson, {head.id} first" in out
        gone = {name for name in before if not (home / name).exists()}
        assert gone == {f"lessons/{name}" for name in dry.removed}
        server.client.revert(server.client.revert(head.id).id)
        server.client.revert(server.client.lessons().lessons[-1].id)
        stands_on = [x for x in log if x.kind == "train" and x.reverted_by is None and x.id != head.id][-1]
        with pytest.raises(WrongState, match="was pruned: it cannot be taken back"):
            server.client.revert(stands_on.id)
    assert main(["fsck", "--home", str(home)]) == 0, capsys.readouterr().out
