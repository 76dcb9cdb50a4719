"""What people think of answers arrives: from the first chunk on, by conversation, by a key for it, in chats."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator
from typing import Any

import httpx2
import openai
import pytest
from vllm_server import Server

from secondnature.errors import Forbidden, NotFound
from secondnature.records import Correction
from secondnature.wire import Client, FeedbackRequest, TrainRequest

CORRECTING = "the-key-that-corrects"


@pytest.fixture(scope="module")
def talker(vllm_environment: None, tmp_path_factory: pytest.TempPathFactory) -> Generator[Server]:
    settings: dict[str, Any] = {"SECONDNATURE_IN_BAND": "1", "SECONDNATURE_CORRECTION_KEY": CORRECTING}
    home = tmp_path_factory.mktemp("feedback") / "home"
    with Server(home, "--api-key", "theirs", **settings) as server:
        yield server.ready()


@pytest.fixture(scope="module")
def helper(talker: Server) -> Generator[Client]:
    """With the key that may only correct."""
    with Client(talker.url, CORRECTING) as client:
        yield client


def turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def feedback(client: Client, **fields: Any) -> Any:
    return client.feedback(FeedbackRequest.model_validate(fields))


def meaning(c: Correction) -> tuple[Any, ...]:
    texts = [None if m is None else m[0].content for m in (c.said, c.chosen, c.rejected)]
    return (*texts, c.feedback, c.rating)


@contextlib.contextmanager
def being_told(talker: Server, path: str, body: dict[str, Any]) -> Generator[tuple[str, str]]:
    """(id, text so far) of a stream that goes on; at the end its client leaves it."""
    body = {**body, "model": "tiny", "stream": True, "temperature": 1, "seed": 1}
    headers = {"authorization": "Bearer theirs"}
    text, key = "", ""
    with httpx2.stream("POST", talker.url + path, json=body, headers=headers, trust_env=False) as reply:
        assert reply.status_code == 200, reply.read()
        lines = reply.iter_lines()  # held: the connection would end with it
        for line in lines:
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                if path == "/v1/responses":
                    key = key or chunk["response"]["id"]
                    text += chunk["delta"] if chunk["type"] == "response.output_text.delta" else ""
                else:
                    key = chunk["id"]
                    text += chunk["choices"][0]["delta"].get("content") or ""
                if len(text) > 10:
                    break
        yield key, text


ASKED = [turn("user", "Paint the wall blue.")]
LEFT: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": ASKED, "max_tokens": 1500, "ignore_eos": True},
    "/v1/responses": {"input": "Paint the wall blue.", "max_output_tokens": 1500, "ignore_eos": True},
}


@pytest.mark.parametrize("path", LEFT)
def test_a_stopped_answer_can_be_corrected(talker: Server, path: str) -> None:
    with being_told(talker, path, LEFT[path]) as (key, text):
        found = feedback(talker.client, completion_id=key, rating=-1).correction
        assert found.finish_reason == "unfinished"
    assert [m.model_dump() for m in found.prompt] == ASKED
    assert found.said is not None
    assert found.said[0].content.startswith(text)
    shown = [*ASKED, turn("assistant", text)]
    same = feedback(talker.client, messages=shown, rating=-1, text="Too long.")
    assert (same.id, same.correction.chosen) == (found.id, None)
    assert talker.client.delete_correction(str(found.id)).id == found.id


def test_feedback_amends_and_is_taken_back(talker: Server) -> None:
    answer = talker.ask("Call the parrot Coco.")
    said, key = answer["choices"][0]["message"]["content"], answer["id"]
    one = feedback(talker.client, completion_id=key, rating=-1)
    assert (one.outcome, one.state.state) == ("added", "nothing_to_teach")
    assert meaning(one.correction) == (said, None, said, None, -1)
    two = feedback(talker.client, completion_id=key, corrected="Yes.")
    assert (two.id, two.outcome, two.state.state) == (one.id, "amended", "waiting")
    liked = feedback(talker.client, id=one.id, rating=1)
    assert meaning(liked.correction) == (said, None, None, None, 1)
    assert talker.client.delete_correction(one.id).lessons == []
    assert one.id not in {c.id for c in talker.client.corrections()}
    with pytest.raises(NotFound):
        talker.client.delete_correction("cor-nothing")


def test_by_conversation_the_server_knows_what_it_said(talker: Server) -> None:
    asked = [turn("user", "Paint the fence green.")]
    said = talker.say("Paint the fence green.")
    seen = feedback(talker.client, messages=[*asked, turn("assistant", said)], rating=-1).correction
    assert meaning(seen)[:3] == (said, None, said)
    edited = feedback(talker.client, messages=[*asked, turn("assistant", "Done.")], rating=-1).correction
    assert edited.id == seen.id
    assert meaning(edited)[:3] == (said, "Done.", said)
    system = [turn("system", "Be brief."), *asked]
    assert feedback(talker.client, messages=system, text="x").correction.id == seen.id
    unknown = [turn("user", "Nobody asked this."), turn("assistant", "Edited, perhaps.")]
    with pytest.raises(NotFound, match="no answer to this conversation is remembered"):
        feedback(talker.client, messages=unknown, rating=-1)
    talker.client.delete_correction(str(seen.id))


def test_openais_update_call_is_feedback(talker: Server) -> None:
    answer = talker.ask("Paint the gate golden.")
    with openai.OpenAI(base_url=f"{talker.url}/v1", api_key=CORRECTING, max_retries=0) as client:
        done = client.chat.completions.update(answer["id"], metadata={"rating": "-1", "corrected": "Yes."})
        assert done.id == answer["id"]
    found = next(c for c in talker.client.corrections() if c.completion_id == answer["id"])
    assert meaning(found)[1] == "Yes."
    talker.client.delete_correction(str(found.id))


def test_the_key_that_corrects_does_nothing_else(talker: Server, helper: Client) -> None:
    answer = helper.chat([turn("user", "Paint the chair red.")], temperature=0, max_tokens=12)
    mine = feedback(helper, completion_id=answer["id"], corrected="Done.")
    assert mine.correction.provenance is not None
    assert mine.correction.provenance.by_key == "correct"
    row = Correction.model_validate({"prompt": "Paint it.", "chosen": "Done."})
    theirs = talker.client.import_corrections([row]).corrections[0]
    dry = TrainRequest.model_validate({"corrections": [row.model_dump()], "dry_run": True})
    for refused in (
        lambda: helper.delete_correction(str(theirs.id)),
        lambda: helper.train(dry),
        helper.corrections,
        helper.lessons,
        helper.checkpoint,
    ):
        with pytest.raises(Forbidden):
            refused()
    statuses = {
        path: talker.status(path, "POST", body, CORRECTING)
        for path, body in (
            ("/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 1}),
            ("/v1/responses", {"model": "tiny", "input": "a", "max_output_tokens": 1}),
            ("/tokenize", {"model": "tiny", "prompt": "a"}),
            ("/scale_elastic_ep", {"new_data_parallel_size": 2}),
        )
    }
    assert statuses == {
        "/v1/completions": 200,
        "/v1/responses": 200,
        "/tokenize": 401,
        "/scale_elastic_ep": 401,
    }
    assert helper.delete_correction(mine.id).id == mine.id
    talker.client.delete_correction(str(theirs.id))


def test_commands_in_a_conversation(talker: Server) -> None:
    with openai.OpenAI(base_url=f"{talker.url}/v1", api_key=CORRECTING, max_retries=0) as client:

        def ask(messages: list[Any], **more: Any) -> Any:
            return client.chat.completions.create(
                model="tiny", messages=messages, temperature=0, max_tokens=12, **more
            )

        said = ask([turn("user", "Hang the lamp low.")]).choices[0].message.content
        history = [turn("user", "Hang the lamp low."), turn("assistant", said), turn("user", "/no Done.")]
        version = talker.client.health().weights_version
        reply = ask(history).choices[0].message.content
        assert reply.startswith("Recorded as cor-")
        found = next(c for c in talker.client.corrections() if str(c.id) in reply)
        assert meaning(found)[:3] == (said, "Done.", said)
        streamed = [*history[:2], turn("user", "/why I said low.")]
        pieces = [x.choices[0].delta.content or "" for x in ask(streamed, stream=True) if x.choices]
        assert "".join(pieces).startswith(f"Recorded as {found.id}")
        going_on = [*history, turn("assistant", reply), turn("user", "Hang it high.")]
        plain = [
            turn("user", "Hang the lamp low."),
            turn("assistant", "Done."),
            turn("user", "Hang it high."),
        ]
        went_on, same = ask(going_on), ask(plain)
        assert went_on.usage.prompt_tokens == same.usage.prompt_tokens
        assert went_on.choices[0].message.content == same.choices[0].message.content
        # the command is no part of what was asked: the answer after it is known by the conversation without it
        seen = feedback(talker.client, completion_id=went_on.id, rating=-1).correction
        assert [m.content for m in seen.prompt] == [m["content"] for m in plain]
        assert ask([turn("user", "/good")]).choices[0].message.content.startswith("Not recorded")
        assert ask([turn("user", "/nothing")]).usage.completion_tokens > 0
        assert talker.client.health().weights_version == version
        for c in (found, seen):
            talker.client.delete_correction(str(c.id))
    for key, error in (("theirs", openai.PermissionDeniedError), ("wrong", openai.AuthenticationError)):
        messages: Any = history
        client = openai.OpenAI(base_url=f"{talker.url}/v1", api_key=key, max_retries=0)
        with client, pytest.raises(error):
            client.chat.completions.create(model="tiny", messages=messages)
    assert not talker.client.corrections()
