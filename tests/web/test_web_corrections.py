"""Feedback as clients give it: amended, taken back, by conversation, from the first chunk on, with its own key."""

from __future__ import annotations

import asyncio
import copy
import importlib.util
import json
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import openai
import pytest
from tiny_server import KEY, Running, running, teach

from secondnature.errors import BadInput, Forbidden, NotFound
from secondnature.records import Correction
from secondnature.wire import Client, FeedbackRequest

CORRECTING = "the-key-that-may-correct"
EXAMPLE = Path(__file__).parents[2] / "examples" / "open_webui" / "secondnature_feedback.py"


@pytest.fixture(scope="module")
def server(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator[Running]:
    home = tmp_path_factory.mktemp("corrections")
    with running(home, talker, correction_key=CORRECTING, in_band=True) as found:
        yield found


@pytest.fixture(scope="module")
def helper(server: Running) -> Generator[Client]:
    """With the key that may only correct."""
    with Client(server.url, CORRECTING) as client:
        yield client


def turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def feedback(client: Client, **fields: Any) -> Any:
    return client.feedback(FeedbackRequest.model_validate(fields))


def meaning(c: Correction) -> tuple[Any, ...]:
    texts = [None if m is None else m[0].content for m in (c.said, c.chosen, c.rejected)]
    return (*texts, c.feedback, c.rating)


def test_feedback_amends_and_is_taken_back(server: Running) -> None:
    answer = server.ask("Use tea.")
    said, key = answer["choices"][0]["message"]["content"], answer["id"]
    one = feedback(server.client, completion_id=key, rating=-1)
    assert (one.outcome, one.state.state) == ("added", "nothing_to_teach")
    assert meaning(one.correction) == (said, None, said, None, -1)
    two = feedback(server.client, completion_id=key, corrected="Done.")
    assert (two.id, two.outcome, two.state.num_amended) == (one.id, "amended", 1)
    assert meaning(two.correction) == (said, "Done.", said, None, -1)
    again = feedback(server.client, id=one.id, corrected="Done.")
    assert (again.outcome, again.correction) == ("known", two.correction)
    three = feedback(server.client, id=one.id, text="I said tea.")
    assert meaning(three.correction) == (said, "Done.", said, "I said tea.", -1)
    liked = feedback(server.client, completion_id=key, rating=1)
    assert meaning(liked.correction) == (said, None, None, None, 1)
    provenance = liked.correction.provenance
    assert provenance is not None
    assert provenance.kind == "observed"
    assert [c.id for c in server.client.corrections()].count(one.id) == 1
    assert server.client.delete_correction(one.id).lessons == []
    assert one.id not in {c.id for c in server.client.corrections()}
    assert feedback(server.client, completion_id=key, rating=-1).id == one.id  # said again
    lines = server.parts.home.ledger_path.read_text().splitlines()
    assert sum(one.id in line for line in lines) == 6
    with pytest.raises(NotFound):
        server.client.delete_correction("cor-nothing")


def test_the_same_record_again_adds_nothing(server: Running) -> None:
    rows = [{"prompt": "Use jam.", "completion": x, "rating": -1} for x in ("No.", "No.", "Never.")]
    corrections = [Correction.model_validate(r) for r in rows]
    first = server.client.import_corrections(corrections)
    assert first.outcomes == ["added", "known", "added"]
    assert first.corrections[0].id == first.corrections[1].id
    size = server.parts.home.ledger_path.stat().st_size
    assert server.client.import_corrections(corrections).outcomes == ["known"] * 3
    assert server.parts.home.ledger_path.stat().st_size == size
    named = Correction.model_validate({"prompt": "Use jam.", "chosen": "Done.", "id": "mine/1"})
    assert server.client.import_corrections([named]).outcomes == ["added"]
    changed = named.model_copy(update={"feedback": "I said jam."})
    assert server.client.import_corrections([changed]).outcomes == ["amended"]
    assert server.client.delete_correction("mine/1").id == "mine/1"


def test_a_candidate_is_not_taught_until_somebody_confirms_it(server: Running) -> None:
    row = {"prompt": "Use ink.", "chosen": "Done.", "behaviour": "candidates", "state": "candidate"}
    found = Correction.model_validate(row)
    reply = server.client.import_corrections([found])
    assert reply.states is not None
    assert reply.states[0].state == "candidate"
    request = teach(corrections=None, ledger=True, dry_run=True, lesson={"behaviour": "candidates"})
    ids = {c.id for c in server.parts.teaching.ledger.confirmed()}
    assert reply.corrections[0].id not in ids
    confirmed = found.model_copy(update={"state": None})
    assert server.client.import_corrections([confirmed]).outcomes == ["amended"]
    assert server.client.import_corrections([found]).outcomes == ["known"]  # a program undoes no decision
    plan = server.client.train(request).plan
    assert plan is not None
    assert plan["num_examples"] >= 1
    server.client.delete_correction(str(reply.corrections[0].id))
    assert server.client.import_corrections([found]).outcomes == ["known"]


def test_what_cannot_be_taught_blocks_nothing_and_is_named(server: Running) -> None:
    rows = [
        {"prompt": "Use mud.", "chosen": "Done.", "behaviour": "mixed"},
        {"prompt": "long " * 400, "chosen": "Done.", "behaviour": "mixed"},
        {"prompt": "Use mud.", "chosen": "  ", "behaviour": "mixed"},
        {"prompt": "Use mud.", "said": "No.", "chosen": "No.", "rating": -1, "behaviour": "mixed"},
        {"prompt": "Use mud.", "completion": "Fine.", "rating": 1, "feedback": "Nice.", "behaviour": "mixed"},
    ]
    reply = server.client.import_corrections([Correction.model_validate(r) for r in rows])
    assert reply.states is not None
    states = [s.state for s in reply.states]
    assert states == ["waiting", *["cannot_be_taught"] * 3, "waiting"]
    assert "tokens" in str(reply.states[1].reason)
    assert "blank" in str(reply.states[2].reason)
    request = teach(corrections=None, ledger=True, dry_run=True, lesson={"behaviour": "mixed"})
    plan = server.client.train(request).plan
    assert plan is not None
    named = {x["id"]: x["reason"] for x in plan["passed_over"]}
    assert {str(c.id) for c in reply.corrections[1:4]} <= named.keys()
    assert str(reply.corrections[0].id) not in named
    assert plan["num_passed_over"] == len(named)
    distil = request.model_copy(update={"objective": "sdft"})
    plan = server.client.train(distil).plan  # praise is no comment on what was wrong
    assert plan is not None
    told = [c for c in server.parts.teaching.ledger.confirmed() if c.rating == 1]
    assert told
    with pytest.raises(BadInput, match="none of 1 corrections says what was wrong"):
        server.client.train(teach(corrections=[told[-1]], objective="sdft", dry_run=True))
    for c in reply.corrections:
        server.client.delete_correction(str(c.id))


def test_an_answer_cut_short_is_not_taught_as_ended(server: Running) -> None:
    cut = {"prompt": "Use red.", "said": "Why not", "chosen": "Done.", "finish_reason": "length"}
    planner = server.parts.runner._planner  # pyright: ignore[reportPrivateUsage]
    rejected = [
        planner._encoder.work(Correction.model_validate({**cut, **more}), "it").rejected  # pyright: ignore[reportPrivateUsage]
        for more in ({}, {"finish_reason": "stop"})
    ]
    assert rejected[0] is not None
    assert rejected[1] is not None
    assert rejected[0] == rejected[1][:-1]
    answer = server.ask("Use red.", max_tokens=2)
    found = feedback(server.client, completion_id=answer["id"], corrected="Done.").correction
    assert found.finish_reason == "length"
    assert found.is_cut


def test_a_stopped_answer_can_be_corrected(server: Running) -> None:
    body = {"messages": [turn("user", "Say rope.")], "stream": True, "temperature": 5, "max_tokens": 200}
    headers = {"authorization": f"Bearer {KEY}"}
    url, text, key = f"{server.url}/v1/chat/completions", "", ""
    with httpx2.stream("POST", url, json=body, headers=headers, trust_env=False) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                key = chunk["id"]
                text += chunk["choices"][0]["delta"].get("content") or ""
                if len(text) > 10:
                    break
    found = feedback(server.client, completion_id=key, rating=-1).correction
    assert found.finish_reason == "unfinished"
    assert found.said is not None
    assert found.said[0].content.startswith(text)
    shown = [turn("user", "Say rope."), turn("assistant", text)]
    same = feedback(server.client, messages=shown, rating=-1, text="Too wild.").correction
    assert (same.id, same.chosen) == (found.id, None)


def test_by_conversation_the_server_knows_what_it_said(server: Running) -> None:
    asked = [turn("user", "Use wool.")]
    said = server.say("Use wool.")
    seen = feedback(server.client, messages=[*asked, turn("assistant", said)], rating=-1).correction
    assert meaning(seen)[:3] == (said, None, said)
    # the trap: a client that lets people edit answers sends the wanted one as if it had been said
    edited = feedback(server.client, messages=[*asked, turn("assistant", "Done.")], rating=-1).correction
    assert edited.id == seen.id
    assert meaning(edited)[:3] == (said, "Done.", said)
    system = [turn("system", "Be brief."), *asked]
    assert feedback(server.client, messages=system, text="x").correction.id == seen.id
    unknown = [turn("user", "Use nothing that was asked."), turn("assistant", "Edited, perhaps.")]
    with pytest.raises(NotFound, match="no answer to this conversation is remembered"):
        feedback(server.client, messages=unknown, rating=-1)
    told = feedback(server.client, messages=unknown, rating=-1, text="I said no.").correction
    assert meaning(told) == (None, None, None, "I said no.", -1)
    server.client.delete_correction(str(told.id))


def test_openais_update_call_is_feedback(server: Running) -> None:
    answer = server.ask("Use corn.")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=CORRECTING, max_retries=0) as client:
        fields = {"rating": "-1", "corrected": "Done.", "note": "mine"}
        done = client.chat.completions.update(answer["id"], metadata=fields)
        assert done.id == answer["id"]
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.update(answer["id"], metadata={"note": "mine"})
    found = next(c for c in server.client.corrections() if c.completion_id == answer["id"])
    assert meaning(found)[1] == "Done."


def test_the_key_that_corrects_does_nothing_else(server: Running, helper: Client) -> None:
    answer = helper.chat([turn("user", "Use glue.")], temperature=0, max_tokens=12)
    mine = feedback(helper, completion_id=answer["id"], corrected="Done.")
    provenance = mine.correction.provenance
    assert provenance is not None
    assert provenance.by_key == "correct"
    row = Correction.model_validate({"prompt": "Use fern.", "chosen": "Done."})
    theirs = server.client.import_corrections([row]).corrections[0]
    assert helper.import_corrections([row]).outcomes == ["known"]
    for refused in (
        lambda: helper.delete_correction(str(theirs.id)),
        lambda: helper.import_corrections([row.model_copy(update={"id": theirs.id, "rating": -1})]),
        lambda: helper.train(teach(dry_run=True)),
        helper.corrections,
        helper.lessons,
        lambda: helper.revert("0001-use"),
        helper.checkpoint,
    ):
        with pytest.raises(Forbidden):
            refused()
    assert helper.delete_correction(mine.id).id == mine.id
    server.client.delete_correction(str(theirs.id))
    key = server.parts.home.path / "correction_key"
    assert not key.exists()  # it was given


def test_commands_in_a_conversation(server: Running) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=CORRECTING, max_retries=0) as client:

        def ask(messages: list[Any], **more: Any) -> Any:
            return client.chat.completions.create(
                model="default", messages=messages, temperature=0, max_tokens=12, **more
            )

        said = ask([turn("user", "Use lamp.")]).choices[0].message.content
        history = [turn("user", "Use lamp."), turn("assistant", said), turn("user", "/no Done.")]
        steps = server.client.health().weights_version
        reply = ask(history).choices[0].message.content
        assert reply.startswith("Recorded as cor-")
        found = next(c for c in server.client.corrections() if str(c.id) in reply)
        assert meaning(found)[:3] == (said, "Done.", said)
        streamed = [*history[:2], turn("user", "/why I said lamp.")]
        pieces = [x.choices[0].delta.content or "" for x in ask(streamed, stream=True) if x.choices]
        assert "".join(pieces).startswith(f"Recorded as {found.id}")
        # sent back, command and confirmation are no conversation, and the model had said what was wanted
        going_on = [*history, turn("assistant", reply), turn("user", "Say lamp.")]
        plain = [turn("user", "Use lamp."), turn("assistant", "Done."), turn("user", "Say lamp.")]
        assert ask(going_on).usage == ask(plain).usage
        key = ask(going_on).id
        assert [m.content for m in server.parts.teaching.memory.recall(key).prompt or []] == [
            m["content"] for m in plain
        ]
        assert ask([turn("user", "/good")]).choices[0].message.content.startswith("Not recorded")
        assert ask([*history[:2], turn("user", "/no")]).choices[0].message.content.startswith("Not recorded")
        assert ask([turn("user", "/nothing")]).usage.completion_tokens > 0
        assert server.client.health().weights_version == steps
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none-of-ours", max_retries=0) as stranger:
        messages: Any = history
        with pytest.raises(openai.PermissionDeniedError, match="the key that was sent may not"):
            stranger.chat.completions.create(model="default", messages=messages)


def test_commands_in_a_response(server: Running) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=CORRECTING, max_retries=0) as client:

        def ask(given: Any, **more: Any) -> Any:
            return client.responses.create(model="default", input=given, temperature=0, **more)

        first = ask("Use bell.")
        part = {"type": "input_text", "text": "/no Done."}
        history = [turn("user", "Use bell."), *first.output, {"role": "user", "content": [part]}]
        reply = ask(history)
        assert reply.output_text.startswith("Recorded as cor-")
        assert reply.usage.total_tokens == 0
        found = next(c for c in server.client.corrections() if str(c.id) in reply.output_text)
        assert meaning(found)[:3] == (first.output_text, "Done.", first.output_text)
        assert found.completion_id == first.id
        events = list(ask([*history[:2], turn("user", "/why I said bell.")], stream=True))
        assert events[-1].response.output_text.startswith(f"Recorded as {found.id}")
        assert [e.sequence_number for e in events] == list(range(len(events)))
        going_on = [*history, *reply.output, turn("user", "Say bell.")]
        plain = [turn("user", "Use bell."), turn("assistant", "Done."), turn("user", "Say bell.")]
        assert ask(going_on).usage == ask(plain).usage
        for nothing in ("/good", [turn("user", "/no Done.")], [*history[:2], turn("user", "/no")]):
            assert ask(nothing).output_text.startswith("Not recorded")
        instructed = ask("Use bell.", instructions="Be brief.")
        given = [turn("user", "Use bell."), *instructed.output, turn("user", "/good")]
        kept = ask(given, instructions="Be brief.").output_text
        found = next(c for c in server.client.corrections() if str(c.id) in kept)
        assert [m.role for m in found.prompt] == ["system", "user"]


def test_open_webuis_thumbs_arrive(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example's own function, with events and records shaped as Open WebUI's."""
    spec = importlib.util.spec_from_file_location("secondnature_feedback", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    said = server.say("Use hats.")
    messages = {
        "u1": {"id": "u1", "parentId": None, "role": "user", "content": "Use hats."},
        "a1": {"id": "a1", "parentId": "u1", "role": "assistant", "content": said},
        "a2": {"id": "a2", "parentId": "u1", "role": "assistant", "content": "another branch"},
    }
    record = SimpleNamespace(
        id="f-1",
        meta={"message_id": "a1", "chat_id": "chat-1"},
        data={"rating": -1, "reason": None, "comment": ""},
        snapshot={"chat": {"chat": {"history": {"messages": copy.deepcopy(messages)}}}},
    )

    async def read(_: str) -> Any:
        return record

    async def read_ratings(chat_id: str) -> list[Any]:
        return [record] if chat_id == "chat-1" else []

    async def read_messages(_: str) -> Any:
        return messages

    monkeypatch.setattr(example, "read_feedback", read)
    monkeypatch.setattr(example, "read_ratings", read_ratings)
    monkeypatch.setattr(example, "read_messages", read_messages)
    function = example.Event()
    function.valves = example.Event.Valves(url=f"{server.url}/v1", correction_key=CORRECTING)

    def happen(name: str, subject: str = "f-1") -> Any:
        return asyncio.run(function.event({"event": name, "subject": {"id": subject}}))

    def recorded() -> Correction:
        (found,) = [c for c in server.client.corrections() if c.id == "open-webui-f-1"]
        return found

    assert happen("chat.created", "chat-1") is None
    assert happen("feedback.created")["outcome"] == "added"
    record.data |= {"reason": "didnt_fully_follow_instructions", "comment": "I said hats."}
    assert happen("feedback.updated")["outcome"] == "amended"
    assert happen("chat.updated", "chat-1") is None
    messages["a1"]["content"] = "Done."  # the user edits the answer; Open WebUI keeps no copy of the old one
    assert happen("chat.updated", "chat-2") is None
    assert happen("chat.updated", "chat-1")["outcome"] == "amended"
    text = "didn't fully follow instructions. I said hats."
    assert meaning(recorded()) == (said, "Done.", said, text, -1)
    assert happen("chat.updated", "chat-1")["outcome"] == "known"
    record.snapshot["chat"]["chat"]["history"]["messages"] = messages
    assert happen("feedback.updated")["outcome"] == "known"
    provenance = recorded().provenance
    assert provenance is not None
    assert (recorded().conversation_id, provenance.source) == ("chat-1", "open-webui")
    assert happen("feedback.deleted")["id"] == "open-webui-f-1"
    assert "open-webui-f-1" not in {c.id for c in server.client.corrections()}


def test_an_answer_is_found_where_the_client_put_files_around_the_question(server: Running) -> None:
    around = turn("user", "Answer from <source>roses</source>.\n\nUse pots.")
    said = server.say(around["content"])
    shown = [turn("user", "Use pots.")]
    with pytest.raises(NotFound):  # without the answer it may be another conversation
        feedback(server.client, messages=shown, rating=-1)
    with pytest.raises(NotFound):
        feedback(server.client, messages=[*shown, turn("assistant", "Never said.")], rating=-1)
    found = feedback(server.client, id="pots", messages=[*shown, turn("assistant", said)], rating=-1)
    assert [m.content for m in found.correction.prompt] == [around["content"]]
    edited = feedback(server.client, id="pots", messages=[*shown, turn("assistant", "Done.")], rating=-1)
    assert (edited.outcome, meaning(edited.correction)) == ("amended", (said, "Done.", said, None, -1))
