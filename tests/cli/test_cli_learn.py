"""`learn` and `train`: what is sent, how it ends, what is said; against a fake server."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_server import BEFORE, KEY, Fake

from secondnature.cli import main
from secondnature.records import Correction
from secondnature.wire import UnreadableLine


@pytest.mark.parametrize(("ends", "code"), [("kept", 0), ("undone", 1), ("inconclusive", 2), ("failed", 1)])
def test_learn_ends_with_the_code_of_the_verdict(
    ends: str, code: int, fake: Fake, home: Path, lesson_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.ends = ends
    assert main(["learn", str(lesson_dir), "--home", str(home)]) == code
    out, err = capsys.readouterr()
    undo = f"secondnature lessons revert 0001-listening --home {home}"
    assert (undo in out) == (ends == "kept")
    moved = "moved:  KL(before ‖ after) 0.75 on new prompts, 0.002 on replay prompts, nats per token"
    assert (moved in out) == (ends != "failed")
    assert ("the weights are as before" in out) == (ends != "kept")
    assert ("loss is nan in correction 2" in out) == (ends == "failed")
    assert "measuring before" in err
    assert (
        "training: 4/5 steps, 2 s each, about 3.0 s left, loss 0.25, development 1/4, other 2/3 (1 lost)"
        in err
    )
    passed = "looks:  development 3 of 4 (3 before) after "
    assert passed in out
    page = Path("report.html").read_text()
    assert "0001-listening" in page
    assert Path("report.json").exists()


def test_learn_sends_the_whole_directory_in_one_request(fake: Fake, home: Path, lesson_dir: Path) -> None:
    (lesson_dir / "development.jsonl").write_text(
        '{"prompt": "x", "behaviour": "listening", "check": {"prefers": ["a", "b"]}}\n'
        '{"prompt": "y", "behaviour": "listening", "check": {"matches": "^Yes"}, "max_tokens": 4}\n'
    )
    (lesson_dir / "replay.jsonl").write_text('{"prompt": "hi", "completion": "hello"}\n')
    toml = (
        "note = 'n'\nbatch_size = 2\n[optimizer]\nlr = 2e-4\nrank = 4\n[replay]\nshare = 0.5\n"
        "[gate]\nmin_gain_probes = 5\n"
    )
    (lesson_dir / "lesson.toml").write_text(toml)
    assert (
        main(
            [
                "learn",
                str(lesson_dir),
                "--home",
                str(home),
                "--seed",
                "7",
                "--lr",
                "3e-4",
                "--until-passed",
                "0.8",
            ]
        )
        == 0
    )
    (request,) = fake.requests
    assert request.corrections is not None
    assert [c.prompt[0].content for c in request.corrections] == ["Use tabs.", "Use spaces."]
    assert (len(request.probes), len(request.development), len(request.replay.examples)) == (3, 2, 1)
    assert request.lesson.behaviour == "listening"
    assert request.lesson.note == "n"
    assert (request.until_passed, request.development[1].max_tokens) == (0.8, 4)
    assert (request.optimizer.lr, request.optimizer.rank, request.batch_size, request.seed) == (3e-4, 4, 2, 7)
    assert (request.replay.share, request.gate.min_gain_probes, request.max_steps) == (0.5, 5, None)


def test_learn_json_is_one_document(
    fake: Fake, home: Path, lesson_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["learn", str(lesson_dir), "--home", str(home), "--json", "--report", "r.html"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["lesson"]["id"] == "0001-listening"
    assert found["evidence"]["verdict"] == "kept"
    assert found["report"] == "r.html"
    assert found["undo"].startswith("secondnature lessons revert 0001-listening")


def test_learn_from_the_ledger_takes_its_behaviour(
    fake: Fake, home: Path, lesson_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["learn", "--home", str(home), "--probes", str(lesson_dir / "probes.jsonl")]
    assert main(command) == 64
    assert "the ledger: 0 records" in capsys.readouterr().err
    fake.ledger.append(
        Correction.model_validate({"prompt": "a", "completion": "b", "behaviour": "listening"})
    )
    assert main(command) == 0
    assert fake.requests[0].ledger
    assert fake.requests[0].lesson.behaviour == "listening"


def test_learn_says_what_of_the_ledger_the_server_cannot_read(
    fake: Fake, home: Path, lesson_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["learn", "--home", str(home), "--probes", str(lesson_dir / "probes.jsonl")]
    fake.unreadable = [UnreadableLine(line=3, reason="not JSON"), UnreadableLine(line=7, reason="not JSON")]
    assert main(command) == 64
    said = capsys.readouterr().err
    assert "2 lines of the ledger cannot be read (line 3: not JSON), and it has no others" in said
    assert "empty" not in said
    assert fake.requests == []
    fake.ledger.append(
        Correction.model_validate({"prompt": "a", "completion": "b", "behaviour": "listening"})
    )
    assert main(command) == 0
    assert "2 lines of the ledger cannot be read (line 3: not JSON): left out" in capsys.readouterr().err
    assert len(fake.requests) == 1


def test_learn_sdft_takes_comments_without_an_answer(
    fake: Fake, home: Path, lesson_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.ledger.append(
        Correction.model_validate({"prompt": "a", "feedback": "No.", "behaviour": "listening"})
    )
    command = ["learn", "--home", str(home), "--probes", str(lesson_dir / "probes.jsonl")]
    assert main(command) == 64
    assert "--objective sdft" in capsys.readouterr().err
    assert main([*command, "--objective", "sdft"]) == 0
    (lesson_dir / "lesson.toml").write_text("objective = 'sdft'\n[sdft]\nsamples = 2\ntemperature = 0.5\n")
    assert main(["learn", str(lesson_dir), "--home", str(home)]) == 0
    flag, file = fake.requests
    assert (flag.objective, flag.ledger, flag.sdft.samples) == ("sdft", True, 4)
    assert (file.objective, file.sdft.samples, file.sdft.temperature) == ("sdft", 2, 0.5)


def test_learn_reads_replay_prompts_from_text_and_jsonl(
    fake: Fake, home: Path, lesson_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, lines = lesson_dir / "general.txt", lesson_dir / "replay_prompts.jsonl"
    text.write_text("What is new?\n\n  Who are you? \n")
    lines.write_text('{"prompt": "Hi"}\n"Hello"\n{"prompt": [{"role": "user", "content": "Bye"}]}\n')
    (lesson_dir / "lesson.toml").write_text("[replay]\ntemperature = 0.5\n")
    command = ["learn", str(lesson_dir), "--home", str(home)]
    assert main(command) == 0
    assert main([*command, "--replay-prompts", str(text)]) == 0
    found = [[p.prompt[-1].content for p in r.replay.prompts] for r in fake.requests]
    assert found == [["Hi", "Hello", "Bye"], ["What is new?", "Who are you?"]]
    assert {r.replay.temperature for r in fake.requests} == {0.5}
    assert "3 replay prompts" in capsys.readouterr().err


def test_learn_without_probes_stays_on_trial_and_says_how_to_decide(
    fake: Fake, home: Path, lesson_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (lesson_dir / "probes.jsonl").unlink()
    assert main(["learn", str(lesson_dir), "--home", str(home)]) == 2
    out = capsys.readouterr().out
    assert f"lessons keep 0001-listening --home {home}" in out
    assert f"lessons revert 0001-listening --home {home}" in out


def test_learn_keep_ignores_the_probes_beside(fake: Fake, home: Path, lesson_dir: Path) -> None:
    assert main(["learn", str(lesson_dir), "--home", str(home), "--keep"]) == 0
    assert fake.requests[0].keep
    assert fake.requests[0].probes == []


def test_calibrate_takes_the_smallest_rate_that_reaches_the_margin_and_undoes_the_trials(
    fake: Fake, home: Path, lesson_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["learn", str(lesson_dir), "--home", str(home), "--calibrate"]) == 0
    rates = [(r.optimizer.lr, bool(r.probes)) for r in fake.requests]
    assert rates == [(1e-5, False), (1e-4, False), (1e-4, True)]
    assert [lesson.state for lesson in fake.lessons.values()] == ["undone", "undone", "kept"]
    err = capsys.readouterr().err
    assert "lr 1e-05, 5 steps, margin not reached; undone" in err
    assert "lr 0.0001, 4 steps, margin reached; undone" in err


def test_calibrate_without_success_changes_nothing(
    fake: Fake, home: Path, lesson_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.reaches_at = 1.0
    assert main(["learn", str(lesson_dir), "--home", str(home), "--calibrate"]) == 1
    assert {lesson.state for lesson in fake.lessons.values()} == {"undone"}
    assert len(fake.lessons) == 3
    assert "no learning rate" in capsys.readouterr().err


def test_train_posts_a_body_as_it_is(fake: Fake, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = {"examples": [{"context_ids": [1], "continuation_ids": [2]}], "max_steps": 3, "keep": True}
    Path("body.json").write_text(json.dumps(body))
    assert main(["train", "body.json", "--home", str(home), "--json"]) == 0
    assert fake.requests[0].examples is not None
    assert json.loads(capsys.readouterr().out)["report"] is None
    Path("body.json").write_text(json.dumps({**body, "max_stepz": 3}))
    assert main(["train", "body.json", "--home", str(home), "--json"]) == 64
    assert "max_stepz" in json.loads(capsys.readouterr().out)["error"]["message"]
    assert len(fake.requests) == 1


def start(home: Path, *words: str) -> subprocess.Popen[str]:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("SECONDNATURE_")}
    command = [sys.executable, "-m", "secondnature.cli", *words, "--home", str(home)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_cancels_the_job_and_waits_until_it_is_undone(
    number: signal.Signals, fake: Fake, home: Path, lesson_dir: Path
) -> None:
    fake.ends = "hang"
    process = start(home, "learn", str(lesson_dir))
    while not any(lesson.steps for lesson in fake.lessons.values()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, (out, err)
    assert f"undone; the weights are as before (version {BEFORE})" in err
    assert "Traceback" not in err
    assert [lesson.state for lesson in fake.lessons.values()] == ["cancelled"]
    assert "DELETE /v1/train/job-1" in fake.calls


def test_a_second_ctrl_c_leaves_at_once_and_says_what_becomes_of_the_lesson(
    fake: Fake, home: Path, lesson_dir: Path
) -> None:
    fake.ends = "stuck"
    process = start(home, "learn", str(lesson_dir))
    for awaited in ("GET /v1/train/status", "DELETE /v1/train/job-1"):
        while awaited not in fake.calls:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, (out, err)
    assert "left at once; the lesson is undone when its lease ends" in err
    assert "Traceback" not in err


def test_a_server_that_does_not_start_says_why(
    tmp_path: Path, home: Path, lesson_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "new"
    words = ["learn", str(lesson_dir), "--home", str(new), "--model", str(tmp_path / "no-model")]
    assert main(words) == 64
    err = capsys.readouterr().err
    assert "no model there" in err
    assert str(new / "server.log") in err
    assert not (new / "server.json").exists()


def test_a_home_is_served_with_the_model_it_belongs_to(tmp_path: Path, home: Path) -> None:
    from secondnature import config
    from secondnature.cli.connect import home_model

    (home / "home.json").write_text(json.dumps({"model": str(tmp_path)}))
    assert home_model(config.load({"home": home}, environ={})) == str(tmp_path)
    assert home_model(config.load({"home": home, "model": "other"}, environ={})) == "other"
    (home / "home.json").write_text(json.dumps({"model": str(tmp_path / "gone")}))
    assert home_model(config.load({"home": home}, environ={})) == "embedded"


def test_a_file_left_by_a_crash_is_no_server(
    tmp_path: Path, home: Path, lesson_dir: Path, fake: Fake
) -> None:
    (home / "server.json").write_text(json.dumps({"pid": 2**22 + 1, "url": "http://127.0.0.1:9"}))
    assert main(["train", str(lesson_dir / "lesson.toml"), "--home", str(home)]) == 64  # not JSON: read first
    body = tmp_path / "b.json"
    body.write_text(json.dumps({"ledger": True}))
    assert main(["train", str(body), "--home", str(home)]) == 69
    assert fake.calls == []


def test_the_homes_key_goes_to_this_machine_only(home: Path, fake: Fake) -> None:
    from secondnature import config
    from secondnature.cli.connect import _key, is_loopback  # pyright: ignore[reportPrivateUsage]

    settings = config.load({"home": home}, environ={})
    assert _key(settings, home, "http://localhost:1") == KEY
    assert _key(settings, home, "http://127.0.0.1:1") == KEY
    assert _key(settings, home, "http://[::1]:1") == KEY
    assert _key(settings, home, "https://models.example.org") is None
    assert not is_loopback("http://127.0.0.1.example.org")


def test_a_request_without_an_answer_is_sent_once_more_and_stays_one_lesson(
    fake: Fake, home: Path, lesson_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.mute = 1
    assert main(["learn", str(lesson_dir), "--home", str(home)]) == 0
    assert fake.calls.count("POST /v1/train") == 2
    assert len(fake.requests) == 1
    assert "asking once more" in capsys.readouterr().err
    assert main(["learn", str(lesson_dir), "--home", str(home)]) == 0
    first, second = (r.idempotency_key for r in fake.requests)
    assert first != second, "whoever teaches again means it"
    assert None not in (first, second)
    fake.mute = 2
    assert main(["learn", str(lesson_dir), "--home", str(home)]) == 69
    assert f"`secondnature lessons log --home {home}` says whether it was accepted" in capsys.readouterr().err
    file = lesson_dir / "body.json"
    file.write_text(
        '{"examples": [{"context_ids": [1], "continuation_ids": [2]}], "keep": true, "idempotency_key": "mine"}'
    )
    assert main(["train", str(file), "--home", str(home)]) == 0
    assert fake.requests[-1].idempotency_key == "mine"


@pytest.mark.parametrize("words", [["learn", "lesson"], ["lessons", "log"], ["chat"], ["doctor"]])
def test_a_server_that_is_not_well_is_named_with_its_reason(
    words: list[str],
    fake: Fake,
    home: Path,
    lesson_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake.trouble = "the weights: they are being restored; it is tried again"
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    main([*(str(lesson_dir) if w == "lesson" else w for w in words), "--home", str(home)])
    out, err = capsys.readouterr()
    assert "the server is not well: the weights: they are being restored" in err
    if words == ["doctor"]:
        assert "trainer ready; the weights: they are being restored" in " ".join(out.split())


def test_a_dry_run_shows_what_would_be_taught_and_trains_nothing(
    fake: Fake, home: Path, lesson_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = {
        "example": "correction 0",
        "end_of_context": "<|user|>Use tabs.<|assistant|>",
        "taught": "Tabs it is. \nYes.<|end|>",
        "rejected": "Spaces.<|end|>",
        "num_taught_tokens": 7,
        "notes": ["turns not taught: 1 earlier answer, which are read only"],
    }
    fake.plan = {"num_examples": 2, "num_skipped": 1, "shown": [example], "notes": {"turns not taught": 1}}
    assert main(["learn", str(lesson_dir), "--home", str(home), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "taught          ⟦Tabs it is. \\nYes.<|end|>⟧  (7 tokens)" in out
    assert "rejected        ⟦Spaces.<|end|>⟧" in out
    assert "turns not taught: 1 earlier answer" in out
    assert "and 1 more" in out
    assert "1 corrections are skipped" in out
    assert "nothing was trained" in out
    assert fake.requests[-1].dry_run
    assert not Path("report.html").exists()
    assert main(["learn", str(lesson_dir), "--home", str(home), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["shown"][0] == example
