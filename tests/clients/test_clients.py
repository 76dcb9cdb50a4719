# pyright: reportMissingImports=false, reportUnknownMemberType=false
"""Real clients against a real server: a chat, a round of tools, an answer that fits a schema, as their users ask.

A client that is not installed is skipped, and says so. Tools are demanded where the client can: whether a small
model calls one by itself, or ever ends a list of calls, is not the question here.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel

pytestmark = pytest.mark.timeout(1200)  # a real model on a busy machine
ROOT = Path(__file__).parents[2]
KEY = os.environ.get("OPENAI_API_KEY", "")
ASK: Any = [{"role": "user", "content": "Paint the door red."}]
MODEL = "default"


class Door(BaseModel):
    """A door to paint."""

    colour: Literal["red", "blue"]
    coats: Literal[1, 2]


PAINT: Any = {
    "type": "function",
    "function": {
        "name": "paint",
        "description": "Paint a door.",
        "parameters": {
            "type": "object",
            "properties": {"colour": {"type": "string", "enum": ["red", "blue"]}},
            "required": ["colour"],
        },
    },
}
DEMANDED: Any = {"type": "function", "function": {"name": "paint"}}


def test_openai(url: str) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
        answer = client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=12)
        again = [
            *ASK,
            answer.choices[0].message,
            {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
        ]
        assert client.chat.completions.create(model=MODEL, messages=again, max_tokens=8).choices
        called = client.chat.completions.create(
            model=MODEL, messages=ASK, tools=[PAINT], tool_choice=DEMANDED
        )
        said = called.choices[0].message
        assert json.loads(said.tool_calls[0].function.arguments)["colour"] in ("red", "blue")
        result = {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "done"}
        then = client.chat.completions.create(
            model=MODEL, messages=[*ASK, said, result], tools=[PAINT], max_tokens=8
        )
        assert then.choices
        parsed = client.chat.completions.parse(model=MODEL, messages=ASK, response_format=Door)
        assert isinstance(parsed.choices[0].message.parsed, Door)
        with client.responses.stream(model=MODEL, input="Paint the door red.", max_output_tokens=8) as stream:
            assert [event.type for event in stream][-1] in ("response.completed", "response.incomplete")
        assert isinstance(
            client.responses.parse(model=MODEL, input="Paint.", text_format=Door).output_parsed, Door
        )
        texts = client.completions.create(model=MODEL, prompt=["Paint", "The door"], max_tokens=3, n=2)
        assert [c.index for c in texts.choices] == [0, 1, 2, 3]


def test_litellm(url: str) -> None:
    litellm = pytest.importorskip("litellm")
    given: Any = {"model": f"openai/{MODEL}", "api_base": url, "api_key": KEY, "messages": ASK}
    assert litellm.completion(**given, max_tokens=8).choices[0].message.content is not None
    assert "".join(
        c.choices[0].delta.content or "" for c in litellm.completion(**given, max_tokens=8, stream=True)
    )
    demand: Any = {"tools": [PAINT], "tool_choice": "required", "parallel_tool_calls": False}
    called = litellm.completion(**given, **demand).choices[0].message
    assert called.tool_calls[0].function.name == "paint"
    assert Door.model_validate_json(
        litellm.completion(**given, response_format=Door).choices[0].message.content
    )
    long = [{"role": "user", "content": "Paint the door red. " * 5_000}]
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**{**given, "messages": long})
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(**given, max_tokens=900_000)


def test_langchain(url: str) -> None:
    found = pytest.importorskip("langchain_openai")
    chat = found.ChatOpenAI(model=MODEL, base_url=url, api_key=KEY, max_retries=0, max_tokens=60)
    assert chat.invoke("Paint the door red.").content
    assert "".join(piece.content for piece in chat.stream("Paint the door red."))
    called = chat.bind_tools([PAINT], tool_choice="paint").invoke("Paint the door red.")
    assert called.tool_calls[0]["name"] == "paint"
    for method in ("json_schema", "function_calling"):
        assert isinstance(chat.with_structured_output(Door, method=method).invoke("Paint it."), Door)
    assert (
        found.OpenAI(model=MODEL, base_url=url, api_key=KEY, max_retries=0, max_tokens=4).invoke("Paint")
        is not None
    )


def test_llm(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    llm = pytest.importorskip("llm")
    given = f"- model_id: ours\n  model_name: {MODEL}\n  api_base: {url}\n"
    given += "  supports_schema: true\n  supports_tools: true\n"
    (tmp_path / "extra-openai-models.yaml").write_text(given)
    model = llm.get_model("ours")
    assert model.prompt("Paint the door red.", key=KEY, max_tokens=8).text()
    assert Door.model_validate_json(model.prompt("Paint it.", key=KEY, schema=Door).text())

    def paint(colour: str) -> str:
        """Paint the door."""
        return f"painted {colour}"

    assert model.prompt("Hello.", key=KEY, tools=[paint], max_tokens=8).text() is not None


def test_pydantic_ai(url: str) -> None:
    pytest.importorskip("pydantic_ai")
    from pydantic_ai import Agent, NativeOutput
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=url, api_key=KEY))
    assert Agent(model, model_settings={"max_tokens": 8}).run_sync("Paint the door red.").output
    for output in (Door, NativeOutput(Door)):
        agent = Agent(model, output_type=output, model_settings={"parallel_tool_calls": False})
        assert isinstance(agent.run_sync("Paint the door red.").output, Door)


def test_instructor(url: str) -> None:
    instructor = pytest.importorskip("instructor")
    openai = pytest.importorskip("openai")
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        client = instructor.from_openai(openai.OpenAI(base_url=url, api_key=KEY), mode=mode)
        found = client.chat.completions.create(model=MODEL, messages=ASK, response_model=Door, max_retries=0)
        assert isinstance(found, Door)


def test_smolagents(url: str) -> None:
    smolagents = pytest.importorskip("smolagents")
    model = smolagents.OpenAIServerModel(MODEL, api_base=url, api_key=KEY, max_tokens=8)
    asked = [{"role": "user", "content": [{"type": "text", "text": "Paint the door red."}]}]
    assert model.generate(asked).content

    @smolagents.tool
    def paint(twice: bool) -> str:
        """Paint the door.

        Args:
            twice: whether it gets two coats
        """
        return f"painted {twice}"

    one_call: Any = {"max_tokens": 200, "parallel_tool_calls": False}
    caller = smolagents.OpenAIServerModel(MODEL, api_base=url, api_key=KEY, **one_call)
    called = caller.generate(asked, tools_to_call_from=[paint])
    assert called.tool_calls[0].function.name == "paint"


def test_guidance(url: str) -> None:
    guidance = pytest.importorskip("guidance")
    model = guidance.models.OpenAI(MODEL, base_url=url, api_key=KEY, echo=False)
    with guidance.user():
        model += "Paint the door red."
    with guidance.assistant():
        model += guidance.gen("answer", max_tokens=8)
    assert isinstance(model["answer"], str)


def test_dspy(url: str) -> None:
    dspy = pytest.importorskip("dspy")
    lm = dspy.LM(f"openai/{MODEL}", api_base=url, api_key=KEY, max_tokens=60, cache=False)
    assert lm("Paint the door red.")[0]
    assert len(lm("Paint the door red.", n=2, temperature=1.0)) == 2
    assert Door.model_validate_json(lm("Paint the door red.", response_format=Door)[0])


def test_openai_agents(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    agents = pytest.importorskip("agents")
    openai = pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_AGENTS_DISABLE_TRACING", "1")

    @agents.function_tool
    def paint(colour: Literal["red", "blue"]) -> str:
        """Paint the door."""
        return f"painted {colour}"

    short = agents.ModelSettings(max_tokens=8)
    demanding = agents.ModelSettings(tool_choice="required", parallel_tool_calls=False, max_tokens=40)

    async def go() -> None:
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
            chat = agents.OpenAIChatCompletionsModel(MODEL, client)
            plain = agents.Agent("painter", model=chat, model_settings=short)
            assert (await agents.Runner.run(plain, "Paint the door red.")).final_output
            tooled = agents.Agent("painter", model=chat, model_settings=demanding, tools=[paint])
            found = await agents.Runner.run(
                tooled, "Paint the door red."
            )  # the call, and what it makes of it
            assert any("painted" in str(getattr(item, "output", "")) for item in found.new_items)
            responses = agents.OpenAIResponsesModel(
                MODEL, client
            )  # takes an answer that is cut for a failure
            tooled = tooled.clone(model=responses, tool_use_behavior="stop_on_first_tool")
            assert "painted" in (await agents.Runner.run(tooled, "Paint the door red.")).final_output
            for model in (chat, responses):
                shaped = agents.Agent("painter", model=model, output_type=Door)
                assert isinstance((await agents.Runner.run(shaped, "Paint it.")).final_output, Door)

    asyncio.run(go())


def test_outlines(url: str) -> None:
    outlines = pytest.importorskip("outlines")
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
        model = outlines.from_openai(client, MODEL)
        assert model("Paint the door red.", max_tokens=8)
        assert Door.model_validate_json(model("Paint the door red.", Door))


def test_haystack(url: str) -> None:
    pytest.importorskip("haystack")
    from haystack.components.generators.chat import OpenAIChatGenerator
    from haystack.dataclasses import ChatMessage
    from haystack.tools import create_tool_from_function
    from haystack.utils import Secret

    def paint(colour: Literal["red", "blue"]) -> str:
        """Paint the door."""
        return f"painted {colour}"

    generator = OpenAIChatGenerator(
        Secret.from_token(KEY), MODEL, api_base_url=url, generation_kwargs={"max_tokens": 60}, max_retries=0
    )
    asked = [ChatMessage.from_user("Paint the door red.")]
    assert generator.run(asked)["replies"][0].text
    one_call = {"tool_choice": "required", "parallel_tool_calls": False}
    called = generator.run(asked, tools=[create_tool_from_function(paint)], generation_kwargs=one_call)
    assert called["replies"][0].tool_calls[0].tool_name == "paint"


def test_javascript(url: str, tmp_path: Path) -> None:
    """openai-js and the Vercel AI SDK, from npm."""
    modules = ROOT / ".venv-clients" / "js" / "node_modules"
    if shutil.which("node") is None or not modules.is_dir():
        pytest.skip("no node, or its packages are not there: make test-clients puts them there where npm is")
    script = tmp_path / "clients.mjs"
    shutil.copy(Path(__file__).parent / "clients.mjs", script)
    (tmp_path / "node_modules").symlink_to(modules)
    ran = subprocess.run(
        ["node", str(script), url, KEY, MODEL], capture_output=True, text=True, timeout=1000, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.split() == ["openai", "ai-compatible", "ai-openai"]


@pytest.mark.parametrize("tokenized", [True, False])
def test_lm_eval(url: str, tokenizer_directory: Path, tokenized: bool) -> None:
    """Its log-likelihoods are the server's own sums, also where the model would end after the continuation."""
    pytest.importorskip("lm_eval")
    openai = pytest.importorskip("openai")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from transformers import AutoTokenizer

    scored = LocalCompletionsAPI(
        base_url=f"{url}/completions",
        model=MODEL,
        tokenizer=str(tokenizer_directory),
        tokenized_requests=tokenized,
        batch_size=2,
    )
    pairs = [
        ("Paint the door", " red."),
        ("How about", " pink."),
        ("How about", " yellow instead?"),
        ("Tell", " me"),
    ]
    asked: Any = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    found = [x[0] for x in scored.loglikelihood(asked, disable_tqdm=True)]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory)
    with openai.OpenAI(base_url=url, api_key=KEY) as client:
        for (context, continuation), sum_found in zip(pairs, found, strict=True):
            before = tokenizer(context, add_special_tokens=False)["input_ids"]
            ids = tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
            own = client.completions.create(model=MODEL, prompt=ids, max_tokens=0, echo=True, logprobs=1)
            assert sum_found == pytest.approx(
                sum(own.choices[0].logprobs.token_logprobs[len(before) :]), abs=1e-4
            )
