"""What the model itself gives to a lesson: answers to distil, answers to replay; and how far it was moved."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from tiny_server import WORDS, Running, correction, habits, running, teach

from secondnature.errors import BadInput, ContextOverflow
from secondnature.lessons.ledger import Ledger
from secondnature.lessons.own_answers import Distilled, Own, OwnAnswers, teacher_messages
from secondnature.lessons.prober import Prober
from secondnature.model.chat import encode_answer, encode_chat, read_tokenizer
from secondnature.records import Correction, Message
from secondnature.wire import SdftSettings, TrainReply

TAUGHT = ("tea", "oak", "red")
SAY = [q for q, _ in habits() if "Say" in q][:6]
NO_REPLAY = {"share": 0.0}


def comments(words: tuple[str, ...] = TAUGHT, **fields: Any) -> list[Correction]:
    """Corrections that say what was wrong and not what was wanted."""
    return [
        Correction.model_validate({"prompt": f"Use {w}.", "feedback": f"No. Say {w}.", **fields})
        for w in words
    ]


def rehearsal(server: Running, talker: Path) -> tuple[OwnAnswers, Any]:
    tokenizer = read_tokenizer(talker)
    judge = Prober(server.parts.engine, tokenizer, context_limit=256)
    return OwnAnswers(judge, tokenizer, context_limit=256), tokenizer


# ------------------------------------------------------------------------------------- self-distillation


def test_the_teacher_reads_the_conversation_as_it_would_have_gone_on() -> None:
    (told,) = comments(("tea",))
    assert [(m.role, m.content) for m in teacher_messages(told, "Why not red?")] == [
        ("user", "Use tea."),
        ("assistant", "Why not red?"),
        ("user", "No. Say tea."),
    ]
    recorded = told.model_copy(update={"rejected": [Message(role="assistant", content="Why not oak?")]})
    assert teacher_messages(recorded, "Why not red?")[1].content == "Why not oak?"
    written = correction("tea")  # an answer, and no comment
    assert teacher_messages(written, "")[2].content == "I wanted this answer: Done."


def test_the_student_answers_the_plain_prompt(server: Running, talker: Path) -> None:
    """Greedy here, so that the answers are known; one of every correction, then the next of every one."""
    rehearse, tokenizer = rehearsal(server, talker)
    given = comments()
    asked = [Distilled(c, encode_chat(tokenizer, c.prompt), f"correction {i}") for i, c in enumerate(given)]
    settings = SdftSettings(samples=2, temperature=0)
    works = rehearse.distil(asked, settings, lambda *_: None, seed=3)
    assert [w.label for w in works] == [f"correction {i}, answer {k}" for k in range(2) for i in range(3)]
    for work, (word, told) in zip(works, itertools.cycle(zip(TAUGHT, given, strict=True)), strict=False):
        said = f"Why not {WORDS[WORDS.index(word) - 1]}?"
        prompt, answer = encode_answer(tokenizer, told.prompt, Message(role="assistant", content=said))
        assert (work.context, work.continuation) == (prompt, answer)
        assert work.teacher == encode_chat(tokenizer, teacher_messages(told, said))
    warm = SdftSettings(samples=8, temperature=3.0)
    sampled = [
        [w.continuation for w in rehearse.distil(asked[:1], warm, lambda *_: None, seed=s)] for s in (3, 3, 4)
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    assert len({tuple(ids) for ids in sampled[0]}) > 1


@pytest.mark.parametrize("room", [1, 2, 5, 20, 40])
def test_an_answer_that_would_fill_the_teachers_context_ends_before(
    server: Running, talker: Path, room: int
) -> None:
    """The comment leaves `room` tokens; the model's own answer, which nobody recorded, takes up to five."""
    rehearse, tokenizer = rehearsal(server, talker)

    def told(words: int) -> Correction:
        return Correction.model_validate({"prompt": "Use tea.", "feedback": "No." + "!" * words})

    def length(words: int) -> int:
        return len(encode_chat(tokenizer, teacher_messages(told(words), "")))

    given = told(next(n for n in range(256) if length(n) == 256 - room))
    asked = [Distilled(given, encode_chat(tokenizer, given.prompt), "correction 0")]
    works = rehearse.distil(asked, SdftSettings(samples=2), lambda *_: None, seed=3)
    assert len(works) == 2
    for work in works:
        assert work.teacher is not None
        assert 1 <= len(work.continuation) <= 256 - len(work.teacher)
        assert len(work.teacher) >= 256 - room


def test_a_lesson_from_comments_alone(server: Running) -> None:
    """No answer is written anywhere; the loss, a divergence from the teacher, falls."""
    before = server.weights
    request = teach(
        corrections=comments(), objective="sdft", sdft={"samples": 4}, max_steps=8, replay=NO_REPLAY
    )
    planned = server.client.train(request.model_copy(update={"dry_run": True})).plan
    assert planned is not None
    assert (planned["objective"], planned["num_examples"], planned["num_skipped"]) == ("sdft", 12, 0)
    lesson = server.lesson(request, "on_trial")
    assert lesson.version != before
    assert lesson.cause.num_examples == 12
    assert lesson.settings["sdft"] == {"samples": 4, "temperature": 1.0}
    detail = server.client.lesson(lesson.id)
    losses = [m["loss"] for m in detail.metrics if m["kind"] == "step"]
    assert losses[-1] < losses[0]
    assert detail.corrections == comments()
    assert [a.get("wanted") for a in detail.answers] == [None] * 3
    server.client.revert(lesson.id)


def test_a_comment_in_the_ledger_is_enough(tmp_path: Path, talker: Path) -> None:
    """Recorded by the feedback route; what cannot be learned from is left out and counted."""
    home = tmp_path / "home"
    home.mkdir()
    Ledger(home / "ledger.jsonl").add([Correction.model_validate({"prompt": "Use mud.", "rating": -1})])
    with running(home, talker) as server:
        said = server.client.chat([{"role": "user", "content": "Use tea."}], temperature=0)
        server.client.request(
            "POST", "/v1/feedback", body={"completion_id": said["id"], "text": "No, do it.", "rating": -1}
        )
        request = teach(corrections=None, ledger=True, replay=NO_REPLAY, max_steps=1)
        with pytest.raises(BadInput, match="none of 2 corrections says what was wanted") as found:
            server.client.train(request)
        assert "objective: sdft" in found.value.hint
        sdft = request.model_copy(update={"objective": "sdft"})
        reply: TrainReply = server.client.train(sdft.model_copy(update={"dry_run": True}))
        assert reply.plan is not None
        assert (reply.plan["num_examples"], reply.plan["num_skipped"]) == (4, 1)
        assert server.lesson(sdft, "on_trial").steps == 1


@pytest.mark.parametrize(
    ("fields", "error", "words", "hint"),
    [
        (
            {"corrections": [Correction.model_validate({"prompt": "Use tea.", "rating": -1})]},
            BadInput,
            "none of 1 corrections says what was wrong; `sdft` learns from `feedback`",
            "/why",
        ),
        (
            {"corrections": comments(("tea",), feedback="no " * 300)},
            ContextOverflow,
            "correction 0, with the wrong answer and the comment",
            "shorten",
        ),
        (
            {"corrections": comments(("tea",)), "until_margin": 1.0},
            BadInput,
            "`until_margin` has nothing to look at",
            "development",
        ),
    ],
)
def test_what_cannot_be_distilled_is_refused(
    server: Running, fields: dict[str, Any], error: type[Exception], words: str, hint: str
) -> None:
    with pytest.raises(error, match=words) as found:
        server.client.train(teach(**{"objective": "sdft", **fields}))
    assert hint in getattr(found.value, "hint", "")


def test_token_ids_have_no_comment(server: Running) -> None:
    body = {"examples": [{"context_ids": [1], "continuation_ids": [2]}], "objective": "sdft"}
    with pytest.raises(BadInput, match="token-id `examples` have no `feedback`"):
        server.client.request("POST", "/v1/train", body=body)


# ------------------------------------------------------------------------------------------------ replay


def test_own_answers_are_what_the_model_says_now(server: Running, talker: Path) -> None:
    rehearse, tokenizer = rehearsal(server, talker)
    prompts = [
        Own(encode_chat(tokenizer, [Message(role="user", content=q)]), f"replay prompt {i}")
        for i, q in enumerate(SAY)
    ]
    works = rehearse.own(prompts, lambda *_: None, temperature=0.0, seed=0, by_distribution=True)
    for work, prompt in zip(works, SAY, strict=True):
        answer = Message(role="assistant", content=server.say(prompt))
        wanted = encode_answer(tokenizer, [Message(role="user", content=prompt)], answer)
        assert (work.context, work.continuation) == wanted
        assert work.by_distribution


def test_own_answers_are_held_by_distribution_unless_told_otherwise(server: Running) -> None:
    """By distribution a step reports the drift it holds back; as targets there is none to report."""
    drifts: dict[str, list[float | None]] = {}
    for match in ("default", "answer"):
        replay = {"share": 0.5, "prompts": SAY, "lessons": False} | (
            {"match": "answer"} if match == "answer" else {}
        )
        lesson = server.lesson(teach(replay=replay, max_steps=3), "on_trial")
        assert lesson.cause.num_replay == len(SAY)
        assert lesson.settings["replay_prompts_match"] == ("answer" if match == "answer" else "distribution")
        metrics = server.client.lesson(lesson.id).metrics
        drifts[match] = [m.get("drift") for m in metrics if m["kind"] == "step"]
        server.client.revert(lesson.id)
    first, second, third = drifts["default"]
    assert first is not None
    assert second is not None
    assert first < 1e-6 < second
    assert third is not None
    assert drifts["answer"] == [None] * 3


def test_examples_are_targets_while_own_answers_are_held(server: Running) -> None:
    """Both in one lesson, each in its own way; the batches draw from both."""
    examples = [{"prompt": q, "completion": a} for q, a in habits() if "Say" in q][6:12]
    replay = {"share": 0.75, "examples": examples, "prompts": SAY, "lessons": False}
    lesson = server.lesson(teach(replay=replay, max_steps=4), "on_trial")
    assert lesson.cause.num_replay == 12
    assert lesson.settings["replay_match"] == "answer"
    steps = [m for m in server.client.lesson(lesson.id).metrics if m["kind"] == "step"]
    assert any(m.get("drift") for m in steps)
    assert set(lesson.kl) == {"new", "replay"}
    server.client.revert(lesson.id)


def test_a_prompt_must_leave_room_for_an_answer(server: Running) -> None:
    replay = {"share": 0.5, "prompts": ["Say tea.", "tea " * 300]}
    with pytest.raises(ContextOverflow, match="replay prompt 1"):
        server.client.train(teach(replay=replay))
    body = teach().model_dump(mode="json", exclude_none=True)
    body["replay"]["prompts"] = [{"prompt": [{"role": "assistant", "content": "tea!"}]}]
    with pytest.raises(BadInput, match="ends with the assistant"):
        server.client.request("POST", "/v1/train", body=body)


def test_no_more_answers_are_sampled_than_the_steps_can_replay(server: Running) -> None:
    """Two steps of four new examples with a share of a half: eight."""
    plan = server.client.train(
        teach(replay={"share": 0.5, "prompts": SAY * 5}, max_steps=2, dry_run=True)
    ).plan
    assert plan is not None
    assert plan["num_replay"] == 8


def test_a_kept_lesson_from_comments_is_replayed_by_its_prompts(tmp_path: Path, talker: Path) -> None:
    with running(tmp_path / "home", talker) as server:
        first = teach(corrections=comments(), objective="sdft", replay=NO_REPLAY, max_steps=1, keep=True)
        server.lesson(first, "kept")
        second = teach(["jam"], replay={"share": 0.5}, max_steps=9, dry_run=True)
        plan = server.client.train(second).plan
        assert plan is not None
        assert (plan["num_replay"], plan["replay_prompts_match"]) == (3, "distribution")


# ---------------------------------------------------------------------------------------------------- KL


def test_every_lesson_says_how_far_it_moved_the_answers(server: Running) -> None:
    lesson = server.lesson(teach(max_steps=4), "on_trial")
    assert lesson.kl["new"] > lesson.kl["replay"] > 0
    metrics = {m["on"]: m for m in server.client.lesson(lesson.id).metrics if m["kind"] == "kl"}
    for on, mean in lesson.kl.items():
        found = metrics[on]
        assert found["mean"] == pytest.approx(mean)
        assert sum(found["per_prompt"]) / len(found["per_prompt"]) == pytest.approx(mean)
        assert found["num_tokens"] >= len(found["per_prompt"])
    assert server.client.status(lesson.job).kl == lesson.kl
    server.client.revert(lesson.id)


def test_a_lesson_that_writes_nothing_moves_nothing(server: Running) -> None:
    lesson = server.lesson(teach(learned_loss=1000.0, max_steps=1), "on_trial")
    assert lesson.kl == {"new": 0.0, "replay": 0.0}
    server.client.revert(lesson.id)


def test_raw_examples_are_measured_too(server: Running, talker: Path) -> None:
    tokenizer = read_tokenizer(talker)
    context = encode_chat(tokenizer, [Message(role="user", content="Use tea.")])
    body = {"examples": [{"context_ids": context, "continuation_ids": [7, 8, 9]}], "replay": NO_REPLAY}
    lesson = server.lesson(teach(corrections=None, **body), "on_trial")
    assert set(lesson.kl) == {"new"}
    assert lesson.kl["new"] > 0
    server.client.revert(lesson.id)
