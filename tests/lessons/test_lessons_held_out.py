"""What is read in training, in any role, is no evidence; and what is decided when a lesson begins, not before."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from served_home import Served, serve
from tiny_server import correction, say_probes, teach, use_probes

from secondnature.config import Settings
from secondnature.errors import BadInput, ContextOverflow
from secondnature.lessons.job import Job
from secondnature.lessons.life import Life
from secondnature.lessons.own_answers import OwnAnswers
from secondnature.lessons.plan import Plan
from secondnature.lessons.planner import Planner
from secondnature.lessons.prober import Prober
from secondnature.lessons.trained import Trained
from secondnature.model.chat import encode_answer, encode_chat, read_tokenizer
from secondnature.records import Correction, Message
from secondnature.wire import TrainRequest

SAY = [{"prompt": f"Say {w}.", "completion": f"{w}!"} for w in ("tabs", "dots", "salt")]
LONG = {"prompt": "Use tea. " * 100, "completion": "x"}


@pytest.fixture(scope="module")
def tokenizer(talker: Path) -> Any:
    return read_tokenizer(talker)


@pytest.fixture
def planner(tokenizer: Any) -> Planner:
    return Planner(tokenizer, vocab_size=320, context_limit=256, highest_rank=16, default_lr=None)


@pytest.fixture
def served(talker: Path, tmp_path: Path) -> Generator[Served]:
    found = serve(tmp_path / "home", talker)
    yield found
    found.home.close()


def contexts(plan: Plan) -> set[tuple[int, ...]]:
    """All that the plan reads in training."""
    read = (*plan.examples, *plan.replay, *plan.distilled, *plan.own, *plan.development)
    return {tuple(x.context) for x in read}


@pytest.mark.parametrize("match", ["answer", "distribution"])
@pytest.mark.parametrize("given", ["examples", "prompts", "earlier"])
def test_what_is_replayed_is_no_evidence(planner: Planner, tokenizer: Any, match: str, given: str) -> None:
    """A guard that asks what would be replayed: that is left out of the replay and counted, and never read."""
    guards = say_probes(["tabs", "dots", "rope"])
    replay: dict[str, Any] = {"share": 0.5, "match": match, "lessons": given == "earlier"}
    if given == "examples":
        replay["examples"] = SAY
    if given == "prompts":
        replay["prompts"] = [{"prompt": x["prompt"]} for x in SAY]
    earlier = [Correction.model_validate(x) for x in SAY] if given == "earlier" else []
    plan = planner.plan(teach(probes=[*use_probes(["mud"]), *guards], replay=replay), [], earlier)
    assert plan.left_out == {"asked by a probe": 2}
    assert len(plan.replay) + len(plan.own) == 1
    assert not contexts(plan) & {tuple(encode_chat(tokenizer, p.prompt)) for p in guards}
    assert plan.cause(0).num_replay_left_out == 2


@pytest.mark.parametrize("role", ["corrections", "examples", "sdft", "development", "spoken"])
def test_a_probe_that_asks_what_is_taught_or_looked_at_is_refused(
    planner: Planner, tokenizer: Any, role: str
) -> None:
    """Also where it comes as token ids: what is compared is what the model reads."""
    fields: dict[str, Any] = {"probes": use_probes(["tea", "mud"])}
    if role == "examples":
        context, answer = encode_answer(
            tokenizer, correction("tea").prompt, Message(role="assistant", content="Done.")
        )
        fields |= {"corrections": None, "examples": [{"context_ids": context, "continuation_ids": answer}]}
    elif role == "sdft":
        told = correction("tea").model_copy(update={"feedback": "Just do it."})
        fields |= {"corrections": [told], "objective": "sdft"}
    elif role in ("development", "spoken"):
        check = {"matches": "^Done"} if role == "spoken" else {"prefers": ["Done.", "Why not dots?"]}
        look = {"prompt": "Use tea.", "behaviour": "use", "check": check}
        fields |= {"corrections": [correction("oak")], "development": [look]}
    else:
        fields |= {"corrections": [correction("tea")]}
    with pytest.raises(BadInput, match=r"^1 of 2 probes are not held out") as caught:
        planner.plan(teach(**fields), [], [])
    assert ("development probes" if role in ("development", "spoken") else "taught") in str(caught.value)


# ------------------------------------------------------------------------------------------ when it begins


def life(served: Served, planner: Planner, request: TrainRequest) -> Life:
    """A lesson as it is accepted: planned and born, with what was known then."""
    plan = planner.plan(request, [], served.log.earlier()[0])
    entry = served.log.create("train", "use", cause=plan.cause(0), settings=plan.settings())
    job = Job(entry, plan, request)
    prober: Any = Prober(None, None, context_limit=256)  # pyright: ignore[reportArgumentType]
    trainer: Any = None
    own = OwnAnswers(prober, None, context_limit=256)
    change = Trained(job, log=served.log, planner=planner, prober=prober, own_answers=own, trainer=trainer)
    return Life(
        job,
        change,
        settings=Settings(),
        log=served.log,
        weights=served.weights,
        prober=prober,
        check_in=lambda: None,
        wait=lambda _: None,
    )


def begin(led: Life) -> Job:
    led._begin()
    return led._job


def judge(served: Served, job: Job) -> None:
    """As if it had come to a verdict, and were undone."""
    served.weights.restore()
    served.log.save(job.lesson.model_copy(update={"state": "undone", "verdict": "inconclusive"}))


def test_tries_are_counted_when_a_lesson_begins(served: Served, planner: Planner, tokenizer: Any) -> None:
    """Queued together, in another order, as token ids: the set of examples is the same."""
    words = ["tea", "oak", "red"]
    answers = [encode_answer(tokenizer, c.prompt, c.chosen[0]) for c in map(correction, words) if c.chosen]
    pairs = [encode_answer(tokenizer, c.prompt, c.rejected[0]) for c in map(correction, words) if c.rejected]
    ids = [
        {"context_ids": c, "continuation_ids": a, "rejected_ids": r}
        for (c, a), (_, r) in zip(answers, pairs, strict=True)
    ]
    requests = [
        teach(words),
        teach(words[::-1]),
        teach(corrections=None, examples=ids),
        teach(corrections=None, examples=ids[::-1]),
        teach(words[:2]),
    ]
    waiting = [life(served, planner, r) for r in requests]
    found: list[int] = []
    for led in waiting:
        job = begin(led)
        found.append(job.lesson.cause.num_retries)
        judge(served, job)
    assert found == [0, 1, 2, 3, 0]


def test_what_was_kept_meanwhile_is_replayed(served: Served, planner: Planner) -> None:
    """And what does not fit, or cannot be read, is left out and counted, not an error."""
    request = teach(["tea"], replay={"share": 0.5})
    led = life(served, planner, request)
    assert led._job.plan.replay == []
    long = Correction.model_validate({"prompt": LONG["prompt"], "chosen": "x"})
    kept = [served.kept(0.1 * i, corrections=[c]) for i, c in enumerate([correction("oak"), long], start=1)]
    torn = served.kept(0.9, corrections=[correction("red")])
    (served.log.directory(torn) / "corrections.jsonl").write_text("{")
    job = begin(led)
    assert [w.label for w in job.plan.replay] == ["replay of an earlier lesson 0"]
    assert job.plan.left_out == {"too long": 1, "unreadable lessons": 1}
    assert job.lesson.cause.num_replay == 1
    assert job.lesson.cause.num_replay_left_out == 2
    assert job.lesson.parent == torn.version != kept[0].version


def test_replay_that_is_too_long_is_found_by_the_plan_and_at_share_0_nobody_reads_it(
    planner: Planner,
) -> None:
    with pytest.raises(ContextOverflow, match="replay 0"):
        planner.plan(teach(replay={"share": 0.5, "examples": [LONG]}), [], [])
    plan = planner.plan(
        teach(replay={"share": 0, "examples": [LONG], "prompts": [{"prompt": LONG["prompt"]}]}), [], []
    )
    assert [s.on for s in plan.samples if s.on == "replay"] == []
    assert (plan.replay, plan.own, plan.replay_share) == ([], [], 0.0)
