"""What clients really send is accepted or refused by name, and answers say what they are made of."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_server import KEY, TEMPLATE, Running, running

from secondnature.model.chat import encode_chat, read_tokenizer
from secondnature.records import Message
from secondnature.wire import ALWAYS_NEUTRAL, NEUTRAL, ChatCompletionRequest, ChatMessage, ImportRequest

TEA: list[Any] = [{"role": "user", "content": "Say tea."}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
PROMPT = "<|user|>Say tea.<|end|><|assistant|>"


@pytest.fixture(scope="module")
def server(shared_server: Running) -> Running:
    """It only answers here."""
    return shared_server


@pytest.fixture(scope="module")
def http(server: Running) -> Generator[httpx2.Client]:
    with httpx2.Client(base_url=server.url, trust_env=False, timeout=60) as client:
        yield client


def chat(http: httpx2.Client, messages: Any = TEA, **fields: Any) -> Any:
    reply = http.post("/v1/chat/completions", json={"messages": messages, **GREEDY, **fields})
    return (
        reply.json() if reply.status_code == 200 else {**reply.json()["error"], "status": reply.status_code}
    )


def text(http: httpx2.Client, prompt: Any = PROMPT, **fields: Any) -> Any:
    reply = http.post("/v1/completions", json={"prompt": prompt, **GREEDY, **fields})
    return (
        reply.json() if reply.status_code == 200 else {**reply.json()["error"], "status": reply.status_code}
    )


def events(http: httpx2.Client, path: str, **body: Any) -> list[Any]:
    reply = http.post(path, json={**GREEDY, "stream": True, **body})
    lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


# ------------------------------------------------------------------------------------------------ fields


def test_every_neutral_field_changes_nothing(http: httpx2.Client) -> None:
    own = {
        "logit_bias": {},
        "top_k": -1,
        "min_p": 0,
        "repetition_penalty": 1.0,
        "n": 1,
        "stop": [],
        "best_of": 1,
    }
    own |= {"presence_penalty": 0, "stop_token_ids": [], "chat_template_kwargs": {}, "ignore_eos": False}
    many = {name: values[0] for name, values in NEUTRAL.items()} | dict.fromkeys(ALWAYS_NEUTRAL, True) | own
    plain = chat(http)["choices"]
    assert plain == chat(http, **many)["choices"] == chat(http, **dict.fromkeys(many))["choices"]
    of_text = {k: v for k, v in many.items() if k not in ("chat_template_kwargs",)}
    assert text(http)["choices"] == text(http, **of_text, logprobs=False)["choices"]


def test_all_wrong_fields_are_named_at_once(http: httpx2.Client) -> None:
    wrong = {
        "functions": [{}],
        "temprature": 1,
        "top_p": 7,
        "stop": [3],
        "response_format": {"type": "xml"},
    }
    error = chat(http, [{"role": "usr", "content": "a"}], **wrong)
    for name in ("`functions`", "`temprature`", "top_p", "stop.0", "response_format", "messages.0.role"):
        assert name in error["message"], (name, error)
    for internal in ("function-after", "Input should", "body.", "functools", "[type="):
        assert internal not in error["message"]
    assert error["hint"] in error["message"]
    assert (error["status"], error["type"]) == (400, "BadInput")
    codes = {
        "functions": "unsupported_parameter",
        "temprature": "unknown_parameter",
        "top_p": "invalid_value",
    }
    for name, code in codes.items():
        error = chat(http, **{name: wrong[name]})
        assert (error["param"], error["code"]) == (name, code)
    error = http.post("/v1/chat/completions", json={}).json()["error"]
    assert (error["param"], error["code"]) == ("messages", "missing_required_parameter")
    error = text(http, [["a"], 3])
    assert "expected a text, token ids" in error["message"]
    assert error["param"] == "prompt"


@pytest.mark.parametrize("header", [None, "text/plain"])
def test_a_body_that_is_not_sent_as_json_is_told_so(http: httpx2.Client, header: str | None) -> None:
    headers = {"content-type": header} if header else {}
    reply = http.post("/v1/chat/completions", content=json.dumps({"messages": TEA}), headers=headers)
    assert reply.status_code == 400
    assert "Content-Type" in reply.json()["error"]["message"]
    assert "application/json" in reply.json()["error"]["message"]


def test_codes_that_clients_branch_on(http: httpx2.Client) -> None:
    error = chat(http, max_tokens=1000)
    assert error["code"] == "context_length_exceeded"
    assert "This model's maximum context length is 256 tokens" in error["message"]
    error = chat(http, [{"role": "user", "content": "tea " * 9999}])
    assert "This model's maximum context length is 256 tokens" in error["message"]
    error = chat(http, model="gpt-4o")
    assert (error["status"], error["code"], error["param"]) == (404, "model_not_found", "model")
    served = http.get("/v1/models").json()["data"][0]["id"]
    for name in (served, "default", None):
        assert "choices" in chat(http, model=name)


def test_extremes_of_the_seed(http: httpx2.Client) -> None:
    for seed in (2**63 - 1, -(2**63)):
        assert "choices" in chat(http, seed=seed, temperature=1)
    assert chat(http, seed=2**63)["param"] == "seed"


# ------------------------------------------------------------------------------------------------ messages

EMPTY = st.sampled_from([None, "", [], {}])
OF_AN_ANSWER = (
    "refusal",
    "tool_calls",
    "function_call",
    "audio",
    "annotations",
    "reasoning_content",
    "parsed",
)


@given(
    content=st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    empty=st.dictionaries(st.sampled_from(OF_AN_ANSWER), EMPTY),
    cuts=st.lists(st.integers(0, 20), max_size=3),
    identity=st.none() | st.just("msg_1"),
)
def test_a_turn_is_the_same_however_it_is_sent(
    content: str, empty: dict[str, Any], cuts: list[int], identity: str | None
) -> None:
    """With what an answer carries, in parts, in a request and in an import."""
    places = [0, *sorted(min(c, len(content)) for c in cuts), len(content)]
    parts = [{"type": "text", "text": content[a:b]} for a, b in itertools.pairwise(places)]
    for given_content in (content, parts):
        turn = {"role": "assistant", "content": given_content, "id": identity, "name": None, **empty}
        expected = Message(role="assistant", content=content)
        assert ChatMessage.model_validate(turn).plain() == expected
        if content:
            imported = ImportRequest.model_validate(
                {"corrections": [{"prompt": [{"role": "developer", "content": parts}], "chosen": [turn]}]}
            ).corrections[0]
            assert imported.chosen == [expected]
            assert imported.prompt == [Message(role="system", content=content)]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32),
    scored=st.booleans(),
    stream=st.booleans(),
    n=st.integers(1, 2),
    temperature=st.just(3),
)
def test_whatever_the_server_emits_is_accepted_back(
    http: httpx2.Client, seed: int, scored: bool, stream: bool, n: int, temperature: float
) -> None:
    """Messages and whole choices' messages, and the deltas of a stream put together."""
    fields: dict[str, Any] = {"seed": seed, "n": n, "temperature": temperature, "max_tokens": 4}
    if stream:
        deltas = [
            c["choices"][0]["delta"] for c in events(http, "/v1/chat/completions", messages=TEA, **fields)
        ]
        message: dict[str, Any] = {}
        for delta in deltas:
            message |= {k: message.get(k, "") + v if k == "content" else v for k, v in delta.items()}
        messages = [message]
    else:
        messages = [c["message"] for c in chat(http, logprobs=scored, **fields)["choices"]]
    for message in messages:
        turns = [*TEA, message, {"role": "user", "content": "Say oak.", "name": "ann"}]
        assert "choices" in chat(http, turns, max_tokens=1), message
        body = {"corrections": [{"prompt": TEA, "rejected": [message], "feedback": "no"}]}
        if message["content"]:
            ImportRequest.model_validate(body)


def test_what_is_no_text_is_refused_by_name(http: httpx2.Client) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    error = chat(http, [{"role": "user", "content": [{"type": "text", "text": "a"}, image]}])
    assert "part 1 of `content` is of the type `image_url`; this model reads text only" in error["message"]
    assert error["param"] == "messages.0"
    reply = http.post(
        "/v1/corrections",
        json={"corrections": [{"prompt": [{"role": "user", "content": [image]}], "chosen": "a"}]},
        headers={"authorization": f"Bearer {KEY}"},
    )
    assert (reply.status_code, "image_url" in reply.text) == (400, True)


def test_the_templates_own_options_reach_it(talker: Path, tmp_path: Path) -> None:
    tokenizer = read_tokenizer(talker)
    tokenizer.chat_template = "{% if enable_thinking is false %}tea{% endif %}" + TEMPLATE
    body = ChatCompletionRequest.model_validate(
        {"messages": TEA, "chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "low"}
    )
    assert body.template_options() == {"enable_thinking": False, "reasoning_effort": "low"}
    plain = encode_chat(tokenizer, body.plain())
    changed = encode_chat(tokenizer, body.plain(), template_options=body.template_options())
    assert len(changed) > len(plain)
    assert changed[-len(plain) :] == plain
    for name in ("chat_template", "tokenize", "add_generation_prompt", "tools"):
        with pytest.raises(ValueError, match=name):
            ChatCompletionRequest.model_validate({"messages": TEA, "chat_template_kwargs": {name: "x"}})


# ------------------------------------------------------------------------------------------------ choices


def test_a_list_of_prompts_is_one_choice_for_each_and_each_of_n(http: httpx2.Client, server: Running) -> None:
    other = PROMPT.replace("tea", "oak")
    alone = [text(http, p) for p in (PROMPT, other)]
    both = text(http, [PROMPT, other])
    assert [c["index"] for c in both["choices"]] == [0, 1]
    assert (
        [c["text"] for c in both["choices"]] == [a["choices"][0]["text"] for a in alone] == ["tea!", "oak!"]
    )
    for key in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert both["usage"][key] == sum(a["usage"][key] for a in alone)
    assert [c["text"] for c in text(http, [PROMPT])["choices"]] == ["tea!"]
    fields: dict[str, Any] = {"temperature": 2.0, "seed": 5, "max_tokens": 6}
    seeded = [text(http, PROMPT, **{**fields, "seed": 5 + i})["choices"][0]["text"] for i in range(3)]
    three = text(http, [PROMPT, other], n=3, **fields)
    assert [c["index"] for c in three["choices"]] == list(range(6))
    assert [c["text"] for c in three["choices"]][:3] == seeded
    assert three["usage"]["prompt_tokens"] == both["usage"]["prompt_tokens"]
    streamed: dict[int, str] = {}
    options = {"stream_options": {"include_usage": True}}
    found = events(http, "/v1/completions", prompt=[PROMPT, other], n=3, **fields, **options)
    for chunk in found:
        for choice in chunk["choices"]:
            streamed[choice["index"]] = streamed.get(choice["index"], "") + choice["text"]
    assert [streamed[i] for i in range(6)] == [c["text"] for c in three["choices"]]
    assert found[-1]["usage"] == three["usage"]
    ids = read_tokenizer(Path(server.parts.settings.model))(PROMPT)["input_ids"]
    assert [c["text"] for c in text(http, [ids, ids])["choices"]] == ["tea!", "tea!"]
    assert [c["message"]["content"] for c in chat(http, n=2)["choices"]] == ["tea!", "tea!"]


def test_one_prompt_that_cannot_be_served_ends_all(http: httpx2.Client, server: Running) -> None:
    before = dict(server.parts.engine.metrics.requests)
    error = text(http, [PROMPT, "tea " * 60], max_tokens=200)
    assert error["code"] == "context_length_exceeded"
    assert server.parts.engine.metrics.requests["length"] == before["length"]
    assert "1024 answers at most" in text(http, [PROMPT] * 600, n=2)["message"]


# ------------------------------------------------------------------------------------------------ log-probabilities


def test_log_probabilities_have_an_entry_for_each_token_in_usage(http: httpx2.Client) -> None:
    """lm-eval drops the last entry: where it is missing, a token of the text is dropped."""
    for fields in ({"max_tokens": 1}, {}, {"logprobs": 0}):
        for prompt in (PROMPT + "tea!", PROMPT):
            found = text(http, prompt, echo=True, **{"logprobs": 1, **fields})
            logprobs, usage = found["choices"][0]["logprobs"], found["usage"]
            for key in ("tokens", "token_logprobs", "text_offset"):
                assert len(logprobs[key]) == usage["total_tokens"], key
            assert logprobs["tokens"][-1] == "<|end|>" or fields.get("max_tokens") == 1
            whole = found["choices"][0]["text"]
            for token, at in zip(logprobs["tokens"][:-1], logprobs["text_offset"], strict=False):
                assert whole.startswith(token, at)
    ended = text(http, PROMPT + "tea!", echo=True, logprobs=1, max_tokens=1)["choices"][0]["logprobs"]
    assert ended["tokens"][-1] == "<|end|>"
    scored = text(http, PROMPT + "tea!", echo=True, logprobs=1, max_tokens=0)["choices"][0]["logprobs"]
    assert ended["token_logprobs"][1:-1] == pytest.approx(scored["token_logprobs"][1:], abs=1e-6)
    answer = chat(http, logprobs=True, top_logprobs=1)
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == answer["usage"]["completion_tokens"]
    assert (content[-1]["token"], content[-1]["bytes"]) == ("<|end|>", None)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_streams_and_whole_answers_say_the_same(http: httpx2.Client, seed: int) -> None:
    """Offsets count on, an echo is scored, and the bytes of a chat's tokens are the answer, whatever is said."""
    fields: dict[str, Any] = {"seed": seed, "temperature": 4, "max_tokens": 12, "logprobs": 2}
    for echo in (True, False):
        whole = text(http, PROMPT + "日é", echo=echo, **fields)["choices"][0]
        chunks = events(http, "/v1/completions", prompt=PROMPT + "日é", echo=echo, **fields)
        pieces = [c["choices"][0] for c in chunks]
        assert "".join(p["text"] for p in pieces) == whole["text"]
        for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            found = [x for p in pieces if p["logprobs"] for x in p["logprobs"][key]]
            assert found == whole["logprobs"][key], key
        offsets = whole["logprobs"]["text_offset"]
        assert offsets == sorted(offsets)
        assert offsets[-1] <= len(whole["text"]) + 3  # bytes that are no character are left out at the end
    answer = chat(http, logprobs=True, **{k: v for k, v in fields.items() if k != "logprobs"})["choices"][0]
    raw = b"".join(bytes(t["bytes"] or []) for t in answer["logprobs"]["content"])
    assert raw.decode("utf-8", "replace").rstrip("\ufffd") == answer["message"]["content"].rstrip("\ufffd")


# ------------------------------------------------------------------------------------------------ routes


def test_a_route_that_is_not_there_is_404_with_or_without_a_key(http: httpx2.Client) -> None:
    for key in ({}, {"authorization": "Bearer sk-any"}, {"authorization": f"Bearer {KEY}"}):
        for path in ("/v1/nothing", "/chat/completions", "/tokenize", "/"):
            reply = http.get(path, headers=key)
            assert (reply.status_code, reply.json()["error"]["code"]) == (404, "no_such_route"), path
        assert "use /v1/chat/completions" in http.post("/chat/completions", headers=key).text
    for path in (
        "/v1/lessons",
        "/v1/lessons/x",
        "/v1/corrections",
        "/v1/train/status",
        "/v1/wiring",
        "/train",
    ):
        assert http.get(path).status_code == 401, path  # what is there asks for its key as before
    assert http.delete("/v1/chat/completions").status_code == 405
    assert http.put("/v1/lessons", headers={"authorization": f"Bearer {KEY}"}).status_code == 405


def test_the_model_by_its_name(http: httpx2.Client, server: Running) -> None:
    (card,) = http.get("/v1/models").json()["data"]
    assert card["max_model_len"] == server.parts.engine.limits.context == 256
    assert http.get(f"/v1/models/{card['id']}").json() == card
    assert http.get("/v1/models/gpt-4o").json()["error"]["code"] == "model_not_found"


def test_the_fingerprint_is_the_weights_version(http: httpx2.Client, server: Running) -> None:
    version = server.client.health().weights_version
    assert chat(http)["system_fingerprint"] == text(http)["system_fingerprint"] == version
    chunks = events(http, "/v1/chat/completions", messages=TEA)
    assert {c["system_fingerprint"] for c in chunks} == {version}


def test_pages_of_allowed_origins_may_ask_and_no_others(talker: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(talker)
    allowed, other = "http://localhost:3000", "http://evil.example"
    asks = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    with (
        running(tmp_path / "home", tmp_path / "model", allowed_origins=(allowed,)) as server,
        httpx2.Client(base_url=server.url, trust_env=False, timeout=60) as http,
    ):
        for path in ("/v1/chat/completions", "/v1/feedback", "/v1/train", "/v1/models"):
            reply = http.options(path, headers={"origin": allowed, **asks})
            assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, allowed)
            refused = http.options(path, headers={"origin": other, **asks})
            assert "access-control-allow-origin" not in refused.headers
        reply = http.post(
            "/v1/chat/completions", json={"messages": TEA, **GREEDY}, headers={"origin": allowed}
        )
        assert reply.headers["access-control-allow-origin"] == allowed
        assert "x-weights-version" in reply.headers["access-control-expose-headers"]
        reply = http.get(
            "/v1/lessons", headers={"origin": allowed}
        )  # an error can be read, too, and a key is asked for
        assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (401, allowed)


def test_no_page_may_ask_by_default(http: httpx2.Client) -> None:
    asks = {"origin": "http://localhost:3000", "access-control-request-method": "POST"}
    reply = http.options("/v1/chat/completions", headers=asks)
    assert reply.status_code == 405
    assert not [name for name in reply.headers if name.startswith("access-control")]


def test_a_models_own_sampling_is_the_default_and_can_be_switched_off(talker: Path, tmp_path: Path) -> None:
    shutil.copytree(talker, tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "temperature": 5.0}))

    def answers(home: str, **fields: Any) -> set[str]:
        with running(tmp_path / home, tmp_path / "model", model_sampling=home == "on") as server:
            replies = [server.client.chat(TEA, max_tokens=12, seed=i, **fields) for i in range(6)]
            return {r["choices"][0]["message"]["content"] for r in replies}

    assert len(answers("on")) > 1
    assert answers("on", temperature=0) == {"tea!"}
    assert answers("off") == {"tea!"}
