"""What cannot be trained on, over HTTP: a 4xx that says found, expected and what to do, and nothing is written.

Nothing: no byte of the weights or of the home (optimizer's state, entries, ledger), not even an entry of a lesson.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from typing import Any

import httpx2
import pytest
from tiny_server import KEY, Running, correction, file_hashes, running

from secondnature.records import OptimizerSettings
from secondnature.wire import ReplaySettings, TrainRequest

EXAMPLE: dict[str, Any] = {"context_ids": [3, 40, 4], "continuation_ids": [50, 1]}
SAME: dict[str, Any] = {**EXAMPLE, "rejected_ids": [50, 1]}
PAIR: dict[str, Any] = {**EXAMPLE, "rejected_ids": [51, 1]}
TEXT: dict[str, Any] = {"prompt": "Use tea.", "chosen": "Done."}
NUMBERS = ("NaN", "Infinity", "-Infinity")


@pytest.fixture(scope="module")
def server(shared_server: Running) -> Generator[Running]:
    """With a correction in the ledger, which must still be there at the end."""
    kept = correction("tea").model_copy(update={"behaviour": "kept-safe"})
    shared_server.client.request(
        "POST", "/v1/corrections", body={"corrections": [kept.model_dump(mode="json", exclude_none=True)]}
    )
    before = shared_server.client.request("GET", "/v1/corrections")["corrections"]
    yield shared_server
    assert shared_server.client.request("GET", "/v1/corrections")["corrections"][: len(before)] == before


def post(server: Running, content: str) -> httpx2.Response:
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    return httpx2.post(
        f"{server.url}/v1/train", content=content, headers=headers, trust_env=False, timeout=60
    )


def one(**changes: Any) -> dict[str, Any]:
    """A request with one example, changed."""
    return {"examples": [{**EXAMPLE, **changes}]}


def option(name: str, value: Any) -> dict[str, Any]:
    """A request that would train, but for one option of the optimizer."""
    return {**one(), "optimizer": {name: value}}


def objective(name: str, source: dict[str, Any]) -> dict[str, Any]:
    return {"objective": name, **source}


CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    "empty continuation": (one(continuation_ids=[]), "BadInput", "continuation_ids: .* at least 1"),
    "empty rejected": (one(rejected_ids=[]), "BadInput", "rejected_ids: .* at least 1"),
    "empty context": (one(context_ids=[]), "BadInput", "context_ids: .* at least 1"),
    "empty answer": ({"corrections": [{**TEXT, "chosen": ""}]}, "BadInput", "`chosen` is empty; expected"),
    "context outside the vocabulary": (one(context_ids=[3, 320]), "BadExample", "token id 320; .* at 319"),
    "continuation outside": (one(continuation_ids=[320]), "BadExample", "token id 320; .* at 319"),
    "rejected outside": (one(rejected_ids=[999]), "BadExample", "token id 999; .* at 319"),
    "negative id": (one(context_ids=[-1]), "BadInput", r"greater than or equal to 0 \(found -1\)"),
    "id that is no integer": (one(context_ids=[1.5]), "BadInput", r"valid integer.*\(found 1.5\)"),
    "context over the limit": (
        one(context_ids=[3] * 255),
        "ContextOverflow",
        r"255 \+ 2 tokens; .* reads 256",
    ),
    "text over the limit": (
        {"corrections": [{**TEXT, "prompt": "tea " * 400}]},
        "ContextOverflow",
        "correction 0: .* reads 256",
    ),
    "weight 0": (one(weight=0), "BadInput", r"greater than 0 \(found 0\)"),
    "weight NaN": (one(weight="NaN"), "BadInput", "weight: .* finite"),
    "lr 0": (option("lr", 0), "BadInput", r"lr: .* greater than 0 \(found 0\)"),
    "lr negative": (option("lr", -1e-5), "BadInput", r"greater than 0 \(found -1e-05\)"),
    "lr over 1": (option("lr", 1.5), "BadInput", r"less than or equal to 1 \(found 1.5\)"),
    **{f"lr {x!r}": (option("lr", x), "BadInput", "lr: .* finite number") for x in NUMBERS},
    "lr no number": (option("lr", "fast"), "BadInput", "lr: .* valid number"),
    "rank 0": (option("rank", 0), "BadInput", r"rank: .* greater than or equal to 1 \(found 0\)"),
    "rank negative": (option("rank", -4), "BadInput", r"\(found -4\)"),
    "rank that fits no matrix": (
        option("rank", 4096),
        "BadInput",
        "rank 4096 fits no matrix of the model; the highest",
    ),
    "beta 1": (option("betas", [0.9, 1]), "BadInput", r"betas.1: .* less than 1 \(found 1\)"),
    "beta NaN": (option("betas", ["NaN", 0.9]), "BadInput", "betas.0"),
    "one beta": (option("betas", [0.9]), "BadInput", "betas.1"),
    "eps 0": (option("eps", 0), "BadInput", "eps: .* greater than 0"),
    "decay negative": (option("weight_decay", -1), "BadInput", "weight_decay"),
    "warm-up negative": (option("warmup_steps", -1), "BadInput", "warmup_steps"),
    "scale infinite": (option("scale", "inf"), "BadInput", "scale: .* finite"),
    "refresh 0": (option("proj_refresh", 0), "BadInput", "proj_refresh"),
    "growth 1": (option("norm_growth_limit", 1), "BadInput", "norm_growth_limit: .* greater than 1"),
    "cooldown over 1": (option("cooldown", 1.5), "BadInput", "cooldown: .* less than or equal to 1"),
    "batch 0": ({**one(), "batch_size": 0}, "BadInput", r"batch_size: .* equal to 1 \(found 0\)"),
    "epochs 0": ({**one(), "epochs": 0}, "BadInput", r"epochs: .* equal to 1 \(found 0\)"),
    "steps 0": ({**one(), "max_steps": 0}, "BadInput", "max_steps"),
    "unknown option": ({**one(), "learning_rate": 1e-4}, "BadInput", "unknown field `.*learning_rate`"),
    "too much replay": (
        {**one(), "replay": {"share": 0.9999999, "examples": [TEXT]}},
        "BadInput",
        r"replay.share 0.9999999 with a batch_size of 1 makes 10,000,000 examples a step; expected at most 4,096",
    ),
    "too much replay of own answers": (
        {**one(), "replay": {"share": 0.9998, "prompts": ["Say tea."]}, "dry_run": True},
        "BadInput",
        "makes 5,000 examples a step",
    ),
    "unknown optimizer option": (option("momentum", 0.9), "BadInput", "unknown field `.*momentum`"),
    "unknown replay option": ({**one(), "replay": {"ratio": 1}}, "BadInput", "unknown field `.*ratio`"),
    "unknown lesson option": ({**one(), "lesson": {"name": "x"}}, "BadInput", "unknown field `.*name`"),
    "unknown gate option": ({**one(), "gate": {"beta": 1}}, "BadInput", "unknown field `.*beta`"),
    "unknown objective": (
        objective("ppo", one()),
        "BadInput",
        "objective: .*'sft', 'orpo', 'dpo', 'dpop' or 'sdft'",
    ),
    **{
        f"{name} without rejected {kind}": (objective(name, source), "BadInput", f"`{name}` needs")
        for name in ("orpo", "dpo", "dpop")
        for kind, source in (("ids", one()), ("text", {"corrections": [TEXT]}))
    },
    **{
        f"{name} with one of two without rejected": (
            objective(name, {"examples": [PAIR, EXAMPLE]}),
            "BadInput",
            f"`{name}` needs rejected_ids; missing in example 1",
        )
        for name in ("orpo", "dpo", "dpop")
    },
    **{
        f"{name or 'default'} with identical {kind}": (
            objective(name, source) if name else source,
            "BadExample",
            "0: the rejected answer is the wanted one; expected two different",
        )
        for name in ("", "sft", "orpo", "dpo", "dpop")
        for kind, source in (
            ("ids", {"examples": [SAME]}),
            ("text", {"corrections": [{**TEXT, "rejected": "Done."}]}),
        )
    },
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_and_nothing_is_written(server: Running, case: str) -> None:
    body, kind, words = CASES[case]
    assert_refused(server, json.dumps(body), kind, words)


@pytest.mark.parametrize("number", NUMBERS)
def test_numbers_that_are_not_json_are_refused(server: Running, number: str) -> None:
    """Python's JSON reader takes them as literals."""
    text = json.dumps(option("lr", 12345)).replace("12345", number)
    assert number in text
    assert_refused(server, text, "BadInput", "lr: .* finite number")


def assert_refused(server: Running, content: str, kind: str, words: str) -> None:
    before = (server.state(), server.parts.arena.writes, file_hashes(server.parts.home.path))
    reply = post(server, content)
    error = reply.json()["error"]
    assert (reply.status_code, error["type"]) == (400, kind), error
    assert error["hint"]
    with pytest.raises(ValueError, match=words):
        raise ValueError(error["message"])
    assert (server.state(), server.parts.arena.writes, file_hashes(server.parts.home.path)) == before


@pytest.mark.parametrize("model", [OptimizerSettings, ReplaySettings, TrainRequest])
def test_every_number_has_a_bound(model: Any) -> None:
    """No option takes NaN or infinity, whatever is added later."""
    for name, schema in model.model_json_schema()["properties"].items():
        for part in [schema, *schema.get("anyOf", []), *schema.get("prefixItems", [])]:
            if part.get("type") in ("number", "integer"):
                assert {"minimum", "exclusiveMinimum"} & set(part), name
                assert {"maximum", "exclusiveMaximum"} & set(part), name


def test_a_ledger_that_wants_what_it_rejects_still_teaches_the_rest(server: Running) -> None:
    """It was acknowledged, so it stays; but it can no more be mended, and must not block the others."""
    same = {"prompt": "Use red.", "chosen": "Done.", "rejected": "Done.", "behaviour": "twice"}
    good = {"prompt": "Use oak.", "chosen": "Done.", "rejected": "No.", "behaviour": "twice"}
    server.client.request("POST", "/v1/corrections", body={"corrections": [same, good]})
    body = {"ledger": True, "dry_run": True, "lesson": {"behaviour": "twice"}}
    plan = post(server, json.dumps(body)).json()["plan"]
    assert (plan["num_examples"], plan["num_skipped"]) == (1, 1)


def test_the_highest_rank_is_one_that_trains(talker: Any, tmp_path: Any) -> None:
    """What the refusal names as the highest is taken, and one more is not."""
    with running(tmp_path / "home", talker) as server:
        words = post(server, json.dumps(option("rank", 4096))).json()["error"]["message"]
        highest = int(words.rpartition(" ")[2].rstrip(")"))
        assert_refused(server, json.dumps(option("rank", highest + 1)), "BadInput", "fits no matrix")
        request = {**option("rank", highest), "max_steps": 1, "optimizer": {"rank": highest, "lr": 1e-3}}
        lesson = server.lesson(TrainRequest.model_validate(request), "on_trial")
        assert lesson.version != lesson.parent
        server.client.revert(lesson.id)
