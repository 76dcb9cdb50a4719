"""`doctor` on a server: its wiring, a lesson that must show and be gone again, and who it is that answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_server import AFTER, BEFORE, KEY, WELL_WIRED, Fake

from secondnature.cli import doctor, main
from secondnature.errors import ContextOverflow, Unauthorized
from secondnature.records import Lesson, utc_now
from secondnature.wire import Client, UnreadableLine

WRITES = "write and restore"


@pytest.fixture(autouse=True)
def _no_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is looked at elsewhere, which takes a while."""
    monkeypatch.setattr(doctor, "environment", lambda _: [])


def findings(
    capsys: pytest.CaptureFixture[str], home: Path, *words: str, code: int = 0
) -> dict[str, dict[str, Any]]:
    assert main(["doctor", "--home", str(home), "--json", *words]) == code
    return {f["name"]: f for f in json.loads(capsys.readouterr().out)["findings"]}


def test_it_says_what_the_engine_computes_with(
    fake: Fake, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = findings(capsys, home)["wiring"]
    assert found["level"] == "ok"
    assert "vLLM 0.32.0: 3 of 3 tensors are the arena's memory (4.0 MB)" in found["found"]
    assert "salted with the epoch" in found["found"]
    fake.wiring = WELL_WIRED.model_copy(update={"engine": "local", "engine_version": "5.1", "cache": "none"})
    assert "local, transformers 5.1" in findings(capsys, home)["wiring"]["found"]


def test_it_says_what_ends_a_turn_and_who_says_so(
    fake: Fake, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = findings(capsys, home)["end of a turn"]
    wanted = "'<|endoftext|>' (1): config.json; '<|im_end|>' (7): the tokenizer, the chat template"
    assert (found["level"], found["found"]) == ("ok", wanted)
    fake.wiring = WELL_WIRED.model_copy(update={"ends": []})
    found = findings(capsys, home)["end of a turn"]
    assert (found["level"], "generation_config.json" in found["hint"]) == ("warn", True)


def test_it_says_what_of_the_ledger_cannot_be_read(
    fake: Fake, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert findings(capsys, home)["key"]["level"] == "ok"
    fake.num_torn = 1
    found = findings(capsys, home)["key"]
    assert found["level"] == "ok"
    assert "torn by a crash" in found["found"]
    fake.unreadable = [UnreadableLine(line=3, reason="unknown state")]
    found = findings(capsys, home)
    assert found["key"]["level"] == "warn"
    assert "1 line that cannot be read (line 3: unknown state)" in found["key"]["found"]
    assert "ledger.jsonl" in found["key"]["hint"]
    assert found["wiring"]["level"] == "ok"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"problems": ["layer.weight is packed"]}, "layer.weight is packed"),
        ({"aliased": 2}, "2 of 3"),
        ({"cache": "unsalted"}, "NOT salted"),
    ],
)
def test_wrong_wiring_is_a_failure(
    fields: dict[str, Any], said: str, fake: Fake, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.wiring = WELL_WIRED.model_copy(update=fields)
    found = findings(capsys, home, code=1)["wiring"]
    assert found["level"] == "fail"
    assert said in found["found"]


def test_a_lesson_shows_and_is_gone_again(fake: Fake, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = findings(capsys, home)[WRITES]
    assert found["level"] == "ok"
    assert "1 step: 47 log-probabilities moved by up to 1 nats" in found["found"]
    assert (
        f"weights {BEFORE} again, log-probabilities the same to the bit (entry 0001-doctor)" in found["found"]
    )
    (request,) = fake.requests
    assert (request.max_steps, request.keep, request.lesson.behaviour) == (1, False, "doctor")
    assert [x.state for x in fake.lessons.values()] == ["undone"]


def test_it_takes_more_steps_where_one_does_not_show(
    fake: Fake, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.deaf = 2
    assert "4 steps" in findings(capsys, home)[WRITES]["found"]
    assert [(r.optimizer.lr, r.max_steps) for r in fake.requests] == [(1e-7, 1), (None, 1), (None, 4)]
    assert {x.state for x in fake.lessons.values()} == {"undone"}


def test_a_lesson_that_never_shows_is_a_failure(
    fake: Fake, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.deaf = 9
    found = findings(capsys, home, code=1)[WRITES]
    assert "changed no log-probability" in found["found"]
    assert "does not compute with what is written" in found["hint"]
    assert {x.state for x in fake.lessons.values()} == {"undone"}


def test_what_an_undo_leaves_is_stated(fake: Fake, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake.scar = 0.25
    found = findings(capsys, home)[WRITES]
    assert found["level"] == "warn"
    assert "differ by up to 0.25 nats (two readings before it: by 0)" in found["found"]


def test_weights_that_do_not_come_back_are_a_failure(
    fake: Fake, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    complete = fake.complete
    monkeypatch.setattr(
        fake, "complete", lambda p: complete(p) | ({"weights_version": AFTER} if fake.lessons else {})
    )
    found = findings(capsys, home, code=1)[WRITES]
    assert f"after the undo of 0001-doctor the weights are {AFTER}; before it {BEFORE}" in found["found"]


def test_an_answer_on_trial_that_does_not_say_so_is_a_failure(
    fake: Fake, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    complete = fake.complete
    monkeypatch.setattr(fake, "complete", lambda p: complete(p) | {"trial": False})
    assert "trial false" in findings(capsys, home, code=1)[WRITES]["found"]


def test_a_lesson_that_fails_is_a_failure(fake: Fake, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake.ends = "failed"
    assert "0001-doctor is failed: loss is nan" in findings(capsys, home, code=1)[WRITES]["found"]


@pytest.mark.parametrize("state", ["queued", "running", "on_trial"])
def test_it_does_not_come_between(
    state: str, fake: Fake, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.lessons["0001-x"] = Lesson.model_validate(
        {"id": "0001-x", "number": 1, "job": "j", "state": state, "cause": {}, "created_at": utc_now()}
    )
    found = findings(capsys, home)[WRITES]
    assert (found["level"], fake.requests) == ("warn", [])
    assert f"not now: 0001-x is {state.replace('_', ' ')}" in found["found"]


def test_it_writes_nothing_where_it_shall_not(
    fake: Fake, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert WRITES not in findings(capsys, home, "--no-write")
    (home / "key").write_text("wrong")
    found = findings(capsys, home, code=1)
    assert found["key"]["level"] == "fail"
    assert not {"wiring", WRITES} & found.keys()
    assert fake.requests == []


@pytest.mark.parametrize("key", ["the-key-of-another", KEY])
def test_a_vllm_without_the_plug_in_is_named(
    key: str, fake: Fake, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.plain_vllm = "0.99.1"
    monkeypatch.setenv("SECONDNATURE_API_KEY", key)
    url = json.loads((home / "server.json").read_text())["url"]
    found = findings(capsys, home, "--url", url, code=1)["server"]
    assert found["level"] == "fail"
    assert found["found"] == f"vLLM 0.99.1 answers at {url} without secondnature"
    assert "VLLM_PLUGINS=secondnature" in found["hint"]
    assert main(["lessons", "log", "--url", url]) == 69
    assert "without secondnature" in capsys.readouterr().err
    with Client(url, key) as client, pytest.raises(ContextOverflow if key == KEY else Unauthorized):
        client.complete([1], max_tokens=9)
