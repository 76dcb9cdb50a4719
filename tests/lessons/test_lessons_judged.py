"""The life of a lesson: queued, running, on trial, kept or undone; what the gate says; what a restart finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_server import (
    LOW_GATE,
    WORDS,
    Running,
    correction,
    file_hashes,
    running,
    say_probes,
    teach,
    use_probes,
)
from transformers import AutoModelForCausalLM

from secondnature.errors import Busy, NotFound, WrongState
from secondnature.evidence.certificate import verify
from secondnature.records import STOPPED_BY, Evidence, OptimizerSettings
from secondnature.weights.content import content_id

TAUGHT = ["tea", "oak", "red", "kite", "jam", "hats", "gold", "foam"]
HELD_OUT = [w for w in WORDS if w not in TAUGHT]
REPLAYED = WORDS[::3]
GUARDED = [w for w in WORDS if w not in REPLAYED]


def judged(server: Running, **fields: Any) -> tuple[str, Evidence]:
    """A lesson with probes, to its end: (state, certificate), the certificate recomputed from its counts."""
    probes = [*use_probes(HELD_OUT), *say_probes(GUARDED)]
    request = teach(TAUGHT, **{"probes": probes, "gate": LOW_GATE, "batch_size": 8, **fields})
    lesson = server.lesson(request, "kept", "undone", "failed")
    evidence = server.client.lesson(lesson.id).evidence
    assert evidence is not None, lesson
    verify(evidence)
    assert evidence.before_version == lesson.parent
    assert evidence.after_version == lesson.version
    assert evidence.verdict == lesson.verdict
    assert lesson.reason == evidence.sentence
    return lesson.state, evidence


def test_keep_by_hand(server: Running) -> None:
    lesson = server.lesson(teach(max_steps=1))
    answer = server.ask("Use tea.")
    assert (answer["weights_version"], answer["trial"]) == (lesson.version, True)
    kept = server.client.keep(lesson.id)
    assert (kept.state, kept.trial_until) == ("kept", None)
    assert server.ask("Use tea.")["trial"] is False
    with pytest.raises(WrongState, match="is kept, not on trial"):
        server.client.keep(lesson.id)
    assert server.weights == lesson.version
    server.client.revert(lesson.id)


def test_a_gate_that_is_passed_keeps(server: Running) -> None:
    replay = {
        "share": 0.75,
        "examples": [{"prompt": f"Say {w}.", "completion": f"{w}!"} for w in REPLAYED],
    }
    gate = LOW_GATE.model_copy(update={"guard_margin": 0.5})  # the guard's own prompts are not replayed
    state, evidence = judged(server, max_steps=7, replay=replay, gate=gate)
    assert (state, evidence.verdict) == ("kept", "kept"), evidence.sentence
    gain, guard = evidence.comparisons
    assert (gain.role, gain.name, gain.n, guard.role, guard.name, guard.n) == (
        "gain",
        "use",
        len(HELD_OUT),
        "guard",
        "say",
        len(GUARDED),
    )
    assert gain.before == 0 < gain.gains
    assert gain.mean_margin_before is not None
    assert gain.mean_margin_after is not None
    assert gain.mean_margin_before < gain.mean_margin_after
    server.client.revert(server.client.lessons().lessons[-1].id)


def test_a_lesson_that_harms_is_undone(server: Running) -> None:
    """Drilled hard, without replay: everything is answered "Done."."""
    before = server.state()
    state, evidence = judged(
        server, max_steps=40, replay={"share": 0.0}, optimizer=OptimizerSettings(lr=1e-2)
    )
    assert (state, evidence.verdict) == ("undone", "undone")
    guard = evidence.comparisons[1]
    assert guard.harmed
    assert "the lesson did harm" in evidence.sentence
    assert any(f.before.startswith(("tea", "oak")) or f.before for f in guard.flips)
    assert server.state() == before


def test_too_few_probes_are_inconclusive_and_retries_are_counted(server: Running) -> None:
    """The "before" of a version is asked once; the same corrections again halve the gate's alpha."""
    before = server.state()
    asked = server.parts.engine.metrics
    totals: list[int] = []
    alphas: list[float] = []
    for _ in range(2):
        start = asked.requests["stop"] + asked.requests["length"]
        lesson = server.lesson(
            teach(["ink"], max_steps=1, probes=use_probes(HELD_OUT[:4]), replay={"share": 0.0}), "undone"
        )
        totals.append(asked.requests["stop"] + asked.requests["length"] - start)
        evidence = server.client.lesson(lesson.id).evidence
        assert evidence is not None
        assert evidence.verdict in ("inconclusive", "undone")
        alphas.append(evidence.alpha)
        assert evidence.num_retries == lesson.cause.num_retries == len(alphas) - 1
    assert alphas[1] == alphas[0] / 2
    assert totals[1] < totals[0]
    assert server.state() == before


def test_it_stops_at_the_margin_and_records_its_looks(server: Running) -> None:
    probe = {"prompt": "Use mud.", "behaviour": "use", "check": {"prefers": ["Done.", "Why not ink?"]}}
    other = {
        "prompt": "Say mud.",
        "behaviour": "use",
        "check": {"prefers": ["mud!", "Done."]},
        "side": "other",
    }
    lesson = server.lesson(teach(development=[probe, other], until_margin=0.0, max_steps=60))
    assert 0 < lesson.steps < 60
    assert (lesson.stopped_by, lesson.reason) == ("until_margin", STOPPED_BY["until_margin"])
    detail = server.client.lesson(lesson.id)
    looks = [m for m in detail.metrics if m["kind"] == "look"]
    assert [m["step"] for m in looks] == list(range(lesson.steps + 1))
    assert looks[0]["margins"]["right"][0] < 0 <= looks[-1]["margins"]["right"][0]
    assert looks[-1]["margins"]["other"][0] > 0
    steps = [m for m in detail.metrics if m["kind"] == "step"]
    assert len(steps) == lesson.steps
    assert {m["on"] for m in detail.metrics if m["kind"] == "kl"} == {"new", "replay"}
    assert [a["wanted"] for a in detail.answers[:4]] == ["Done."] * 4
    assert lesson.moved
    assert lesson.settings["objective"] == "orpo"
    server.client.revert(lesson.id)


def test_sft_without_a_rejected_answer_and_raw_examples(server: Running) -> None:
    one = correction("wool", rejected=False)
    lesson = server.lesson(teach(corrections=[one], max_steps=2))
    assert (lesson.state, lesson.settings["objective"]) == ("on_trial", "sft")
    server.client.revert(lesson.id)
    raw = {"context_ids": [3, 40, 4], "continuation_ids": [50, 1]}
    lesson = server.lesson(teach(corrections=None, examples=[raw], max_steps=1))
    assert lesson.cause.num_examples == 1
    server.client.revert(lesson.id)


def test_a_dry_run_writes_nothing(server: Running) -> None:
    before = file_hashes(server.parts.home.path)
    reply = server.client.train(teach(dry_run=True))
    assert (reply.state, reply.lesson) == ("planned", None)
    assert reply.plan is not None
    assert (reply.plan["steps"], reply.plan["num_examples"], reply.plan["objective"]) == (3, 4, "orpo")
    assert file_hashes(server.parts.home.path) == before
    with pytest.raises(NotFound):
        server.client.status("dry-run")


def test_the_queue_has_an_end(server: Running) -> None:
    jobs = [server.client.train(teach(max_steps=3000)).job]
    server.until(jobs[0], lambda s: s.state == "running")
    jobs += [server.client.train(teach()).job for _ in range(2)]
    with pytest.raises(Busy, match="2 jobs are waiting; at most 2 may"):
        server.client.train(teach())
    for job in reversed(jobs):
        assert server.client.cancel(job).state == "cancelled"
    with pytest.raises(WrongState, match="is cancelled already"):
        server.client.cancel(jobs[0])


def test_feedback_becomes_a_lesson(server: Running) -> None:
    """A completion's id and the wanted answer are enough; the ledger is durable and is what is trained on."""
    answer = server.ask("Use gold.")
    body = {"completion_id": answer["id"], "corrected": "Done.", "behaviour": "gold", "rating": -1}
    reply = server.client.request("POST", "/v1/feedback", body=body)
    stored = reply["correction"]
    assert stored["rejected"][0]["content"] == answer["choices"][0]["message"]["content"]
    assert stored["weights_version"] == answer["weights_version"]
    on_disk = server.parts.home.ledger_path.read_text().splitlines()
    assert reply["id"] in on_disk[-1]
    lesson = server.lesson(teach(corrections=None, ledger=True, max_steps=1, lesson={"behaviour": "gold"}))
    assert lesson.cause.num_examples == 1
    server.client.revert(lesson.id)


def test_a_restart_serves_the_kept_version(talker: Path, tmp_path: Path) -> None:
    """From base and deltas; then from the checkpoint, which plain transformers loads to the same bytes."""
    home = tmp_path / "home"
    with running(home, talker) as server:
        first = server.lesson(teach(["jam"], keep=True, max_steps=1))
        lesson = server.lesson(teach(["hats"], keep=True, max_steps=1))
        state, answer = server.state(), server.say("Use tea.")
        assert lesson.parent == first.version
    with running(home, talker) as server:
        assert (server.state(), server.say("Use tea.")) == (state, answer)
        reply = server.client.checkpoint()
        assert (reply.weights_version, reply.current) == (lesson.version, True)
        loaded = AutoModelForCausalLM.from_pretrained(reply.path, dtype=torch.bfloat16)
        assert content_id({n: p.data for n, p in loaded.named_parameters()}) == lesson.version
    with running(home, talker) as server:
        assert (server.state(), server.say("Use tea.")) == (state, answer)
        entry = server.client.revert(lesson.id)  # across the checkpoint
        assert server.weights == entry.version == lesson.parent
        assert not server.client.request("GET", "/v1/checkpoint")["current"]
        state = server.state()
    with running(home, talker) as server:
        assert server.state() == state
