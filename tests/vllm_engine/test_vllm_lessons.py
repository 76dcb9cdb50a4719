"""The life of a lesson in vLLM: it changes answers while they are given, and is undone to the byte.

On the shared server; each test leaves the weights as they were, and the fixture compares the bytes.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import pytest
from vllm_server import DIRECTION, LISTENING, Server, born, cpu_s, listening, until

from secondnature.records import Check, GateSettings, LookMetric, Probe
from secondnature.records.jsonl import read_jsonl
from secondnature.wire import TrainRequest

PROMPTS = [DIRECTION, "What is 18 + 42?", "Hand the toddler a razor."]
NUM_KILLS = 20 if os.environ.get("SECONDNATURE_TORTURE") == "1" else 3
LONG = {"steps": 2000, "learned_loss": 0.0}


class Users:
    """People who go on asking while something else happens."""

    def __init__(self, server: Server, num: int = 1) -> None:
        self.answers: list[dict[str, Any]] = []
        self.failures: list[BaseException] = []
        self.longest_s = 0.0
        self._server = server
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(num)]

    def _ask(self) -> None:
        while not self._stop.is_set():
            begun = time.monotonic()
            try:
                self.answers.append(self._server.ask(DIRECTION))
            except Exception as e:  # noqa: BLE001  (the test fails on it)
                self.failures.append(e)
                return
            self.longest_s = max(self.longest_s, time.monotonic() - begun)

    def __enter__(self) -> Users:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def start(server: Server) -> str:
    """A long lesson that is writing now."""
    job = server.client.train(listening(**LONG)).job
    server.until(job, lambda s: s.phase == "training" and s.step >= 2)
    return job


def test_a_lesson_changes_answers_and_its_undo_restores_them(server: Server) -> None:
    before = server.state(PROMPTS)
    assert not server.say(DIRECTION).startswith("Yes")
    writes = server.client.wiring().writes
    with Users(server) as users:
        status = server.lesson(listening())
    assert users.failures == []
    lesson = server.client.lesson(status.lesson).lesson
    assert (lesson.state, lesson.parent) == ("on_trial", before[1])
    assert server.weights() != before[0]

    running = [a for a in users.answers if a["trial"] and a["weights_version"] != lesson.version]
    assert running, "no answer was given while the lesson ran"
    names = {a["weights_version"] for a in running} - {before[1]}
    assert all(name.startswith(f"{before[1]}+{lesson.number:04d}.") for name in names)
    assert any(a["weights_span"]["changed"] for a in running)
    epochs = [a["weights_span"]["first_epoch"] for a in users.answers]
    assert epochs == sorted(epochs)

    answer = server.ask(DIRECTION)
    assert answer["choices"][0]["message"]["content"].startswith("Yes, I will paint the door white")
    assert (answer["trial"], answer["weights_version"]) == (True, lesson.version)
    _, headers, _ = server.call("POST", "/v1/completions", {"model": "tiny", "prompt": "Hi", "max_tokens": 1})
    assert (headers["x-weights-version"], headers["x-weights-trial"]) == (lesson.version, "true")
    wiring = server.client.wiring()
    assert (wiring.problems, wiring.writes) == ([], writes + lesson.steps)

    undone = server.client.revert(lesson.id)
    assert (undone.state, server.state(PROMPTS)) == ("undone", before)
    assert server.ask(DIRECTION)["trial"] is False


def test_a_lesson_stops_where_its_development_answers_pass(server: Server) -> None:
    """vLLM answers them while the trainer waits between two steps; people are answered meanwhile."""
    before = server.state(PROMPTS)
    given = read_jsonl(LISTENING / "development.jsonl", Probe)
    sides = {"right": Check(matches="^Yes"), "other": Check(not_matches="^Yes")}
    looked = [
        p.model_copy(update={"check": check, "max_tokens": 12})
        for side, check in sides.items()
        for p in [p for p in given if p.side == side][:6]
    ]
    with Users(server) as users:
        status = server.lesson(listening(60, development=looked, until_passed=0.8))
    assert users.failures == []
    detail = server.client.lesson(status.lesson)
    assert (detail.lesson.state, detail.lesson.stopped_by) == ("on_trial", "until_passed")
    looks = [LookMetric.model_validate(m) for m in detail.metrics if m["kind"] == "look"]
    assert [x.step for x in looks] == list(range(detail.lesson.steps + 1))
    shares = [x.passed["right"] or 0.0 for x in looks]
    assert all(s < 0.8 <= shares[-1] for s in shares[:-1])
    assert looks[-1].asked == {"right": 6, "other": 6}
    for a in looks[-1].answers:
        assert server.say(looked[a.probe].prompt[0].content).startswith(a.answer)
    server.client.revert(detail.lesson.id)
    assert server.state(PROMPTS) == before


def test_the_prefix_cache_follows_a_lesson_and_its_undo(server: Server) -> None:
    """A salt that nobody used before is the reference: nothing cached can be found under it."""
    ids = list(range(20, 920))
    before = server.scores(ids)
    hits = server.metric("vllm:prefix_cache_hits_total")
    for _ in range(2):  # of a hybrid, a state is kept where two prompts were seen to part
        server.scores(ids)
    assert server.metric("vllm:prefix_cache_hits_total") > hits
    lesson = server.lesson(listening(2)).lesson
    trial = server.scores(ids)
    assert trial == server.scores(ids, cache_salt="never used") != before
    server.client.revert(lesson)
    assert server.scores(ids) == before


def test_the_same_lesson_twice_gives_the_same_bits(server: Server) -> None:
    versions: list[str | None] = []
    for _ in range(2):
        lesson = server.client.lesson(server.lesson(listening(2, seed=5)).lesson).lesson
        versions.append(lesson.version)
        server.client.revert(lesson.id)
    assert versions[0] == versions[1] is not None


def test_a_kept_lesson_is_taken_back_and_given_back(server: Server) -> None:
    before = server.state(PROMPTS)
    status = server.lesson(listening(keep=True))
    assert status.state == "kept"
    kept = server.state(PROMPTS)
    assert kept[1] == server.client.lesson(status.lesson).lesson.version
    checkpoint = server.client.checkpoint()
    assert (checkpoint.weights_version, checkpoint.current) == (kept[1], True)
    taken = server.client.revert(status.lesson)
    assert (taken.kind, server.state(PROMPTS)) == ("revert", before)
    back = server.client.revert(taken.id)
    assert server.state(PROMPTS) == kept
    server.client.revert(back.id)
    assert server.state(PROMPTS) == before
    assert server.client.checkpoint().weights_version == before[1]


def test_a_cancelled_lesson_has_never_been(server: Server) -> None:
    before = server.state(PROMPTS)
    job = start(server)
    assert server.weights() != before[0]
    assert server.client.lessons().weights_version.startswith(before[1] + "+")
    waiting = server.client.train(listening()).job
    assert server.client.cancel(waiting).state == "cancelled"
    assert server.client.cancel(job).state == "cancelled"
    assert server.state(PROMPTS) == before


def test_broken_weights_end_a_lesson_and_are_undone(server: Server) -> None:
    before = server.state(PROMPTS)
    job = start(server)
    server.damage()
    status = server.until(job, lambda s: s.state == "failed" and s.phase == "done")
    assert status.error is not None
    assert status.error.type in ("NonFinite", "Exploded")
    assert server.state(PROMPTS) == before


def test_a_wild_learning_rate_is_undone(server: Server) -> None:
    before = server.state(PROMPTS)
    wild = {"lr": 1.0, "scale": 1e6, "norm_growth_limit": 1e6}
    status = server.lesson(listening(4, optimizer=wild))
    assert status.state in ("failed", "on_trial")
    if status.state == "on_trial":
        assert server.say(PROMPTS[1]) != before[2][1][0]["message"]["content"]
        server.client.revert(status.lesson)
    else:
        assert status.error is not None
        assert status.error.type in ("NonFinite", "Exploded")
    assert server.state(PROMPTS) == before


@pytest.mark.timeout(60 * NUM_KILLS + 120)
def test_a_killed_trainer_leaves_nothing_and_the_server_goes_on(server: Server) -> None:
    before = server.state(PROMPTS)
    for _ in range(NUM_KILLS):
        job = start(server.ready())
        trainer = server.processes()["trainer"]
        with Users(server) as users:
            os.kill(trainer, signal.SIGKILL)
            status = server.until(job, lambda s: s.state == "failed" and s.phase == "done")
        assert users.failures == []
        assert users.answers
        assert status.error is not None
        assert status.error.type == "TrainerDied"
        assert not born(trainer)
        assert server.state(PROMPTS) == before
    status = server.lesson(listening())
    assert (status.state, server.say(DIRECTION)[:3]) == ("on_trial", "Yes")
    server.client.revert(status.lesson)
    assert server.state(PROMPTS) == before


def probes(num: int) -> list[Probe]:
    lines = (LISTENING / "probes.jsonl").read_text().splitlines()
    found = [Probe.model_validate_json(line) for line in lines]
    return [p for p in found if p.behaviour == "listening" and p.side == "right"][:num]


def test_probes_are_asked_while_users_are_answered(server: Server) -> None:
    """The gate decides on vLLM's answers; who chats meanwhile is answered, too."""
    asked = probes(64)
    gate = GateSettings(min_gain_probes=8, min_gain_seeds=4)
    with Users(server, 2) as users:
        status = server.lesson(listening(probes=asked, gate=gate))
        until(lambda: len(users.answers) > 4, "the users")
    assert users.failures == []
    assert users.longest_s < 30
    assert status.error is None
    evidence = server.client.lesson(status.lesson).evidence
    assert evidence is not None
    gain = next(c for c in evidence.comparisons if c.role == "gain")
    assert (gain.n, gain.before) == (len(asked), 0)
    assert gain.after > len(asked) // 2
    assert status.state == "kept", evidence.sentence
    server.client.revert(status.lesson)


def test_a_large_body_does_not_hold_up_a_stream(server: Server) -> None:
    """13 MB of examples are read and planned while somebody's answer streams."""
    example = {"context_ids": list(range(5, 505)), "continuation_ids": [7, 8, 9]}
    body = {"examples": [example] * 6500, "dry_run": True, "max_steps": 1}
    request = TrainRequest.model_validate(body)
    gaps: list[float] = []
    ready, done = threading.Event(), threading.Event()

    def stream() -> None:
        messages = [{"role": "user", "content": "Tell me."}]
        last = time.monotonic()
        for _ in server.client.chat_stream(messages, max_tokens=1500, ignore_eos=True, temperature=1, seed=1):
            gaps.append(time.monotonic() - last)
            last = time.monotonic()
            if len(gaps) > 20:
                ready.set()
            if done.is_set():
                break

    thread = threading.Thread(target=stream)
    thread.start()
    try:
        assert ready.wait(60)
        begun = time.monotonic()
        reply = server.client.request("POST", "/v1/train", body=request)
        took_s = time.monotonic() - begun
    finally:
        done.set()
        thread.join()
    assert reply["state"] == "planned"
    print(f"planned in {took_s:.2f} s; longest gap {max(gaps[5:]):.2f} s of {len(gaps)}")
    assert max(gaps[5:]) < 5


def test_the_engine_waits_without_keeping_a_core_busy(server: Server) -> None:
    """vLLM's core looks for its worker's answer in a loop that would leave nobody else that processor (`spin`)."""
    core = server.processes()["core"]
    server.ask("Tell me.")
    began, used_s = time.monotonic(), cpu_s(core)
    server.ask("Tell me.", max_tokens=400, ignore_eos=True)
    took_s, used_s = time.monotonic() - began, cpu_s(core) - used_s
    print(f"{used_s:.2f} s of a processor in {took_s:.2f} s")
    assert used_s < 0.6 * took_s
