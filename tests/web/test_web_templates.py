"""What a chat template refuses is 400 with its words, at every door; what it was told, an answer is taught with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tiny_server import KEY, TEMPLATE, Running, running

from secondnature.errors import BadInput
from secondnature.wire import FeedbackRequest, TrainRequest

REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('No system here') }}{% endif %}"
TOLD = "{% if enable_thinking is false %}rope{% endif %}"
SYSTEM = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Use tea."}]
TEA = [{"role": "user", "content": "Use tea."}]
OFF = {"enable_thinking": False}


@pytest.fixture(scope="module")
def strict(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator[Running]:
    """A server whose template refuses system turns, and begins with a word where it is told not to think."""
    folder = tmp_path_factory.mktemp("strict") / "model"
    shutil.copytree(talker, folder)
    (folder / "chat_template.jinja").write_text(REFUSES + TOLD + TEMPLATE)
    with running(tmp_path_factory.mktemp("home"), folder) as server:
        yield server


def posted(server: Running, path: str, body: dict[str, Any]) -> httpx2.Response:
    return httpx2.post(server.url + path, json=body, headers={"authorization": f"Bearer {KEY}"}, timeout=60)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": SYSTEM}),
        ("/v1/chat/completions", {"messages": SYSTEM, "stream": True}),
        ("/v1/responses", {"input": "Use tea.", "instructions": "Be brief."}),
        ("/v1/train", {"corrections": [{"prompt": SYSTEM, "chosen": "Done."}]}),
        ("/v1/train", {"corrections": [{"prompt": SYSTEM, "chosen": "Done."}], "dry_run": True}),
        (
            "/v1/train",
            {"corrections": [{"prompt": SYSTEM, "feedback": "no"}], "objective": "sdft", "dry_run": True},
        ),
        (
            "/v1/train",
            {
                "corrections": [{"prompt": TEA, "chosen": "Done."}],
                "probes": [{"prompt": SYSTEM, "behaviour": "tea", "check": {"matches": "Done"}}],
                "lesson": {"behaviour": "tea"},
                "dry_run": True,
            },
        ),
    ],
)
def test_what_the_template_refuses_is_400_with_its_words(
    path: str, body: dict[str, Any], strict: Running
) -> None:
    found = posted(strict, path, {"optimizer": {"rank": 1}, **body} if path == "/v1/train" else body)
    assert found.status_code == 400
    assert "the model's chat template refuses this conversation: No system here" in found.text
    assert "change the roles" in found.text


def test_a_correction_that_the_template_refuses_is_kept_and_named(strict: Running) -> None:
    body = {"corrections": [{"prompt": SYSTEM, "chosen": "Done."}, {"prompt": TEA, "chosen": "Done."}]}
    found = posted(strict, "/v1/corrections", body).json()
    refused, taken = found["states"]
    assert (refused["state"], taken["state"]) == ("cannot_be_taught", "waiting")
    assert "No system here" in refused["reason"]
    request = TrainRequest.model_validate({"ledger": True, "dry_run": True, "optimizer": {"rank": 1}})
    plan = strict.client.train(request).plan
    assert plan is not None
    assert plan["num_examples"] == 1
    (named,) = plan["passed_over"]
    assert named["id"] == refused["id"]
    assert "No system here" in named["reason"]
    for c in found["corrections"]:
        strict.client.delete_correction(c["id"])


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_corrected_as_it_was_asked_for(strict: Running, stream: bool) -> None:
    body = {"messages": TEA, "chat_template_kwargs": OFF, "max_tokens": 4, "temperature": 0, "stream": stream}
    found = posted(strict, "/v1/chat/completions", body)
    events = [e.removeprefix("data: ") for e in found.text.split("\n\n")] if stream else [found.text]
    reply = strict.client.feedback(
        FeedbackRequest(completion_id=json.loads(events[0])["id"], corrected="Done.", rating=-1)
    )
    assert reply.correction is not None
    assert reply.correction.chat_template_kwargs == OFF
    amended = strict.client.feedback(FeedbackRequest(id=reply.id, text="shorter"))
    assert amended.correction is not None
    assert amended.correction.chat_template_kwargs == OFF
    taught = {"corrections": [reply.correction], "optimizer": {"rank": 1}, "dry_run": True}
    plan = strict.client.train(TrainRequest.model_validate(taught)).plan
    assert plan is not None
    assert plan["shown"][0]["end_of_context"] == "rope<|user|>Use tea.<|end|><|assistant|>"
    strict.client.delete_correction(reply.id)


@pytest.mark.parametrize("objective", ["sft", "sdft"])
def test_a_probe_that_asks_what_is_taught_under_other_options_is_no_evidence(
    strict: Running, objective: str
) -> None:
    given = {"prompt": TEA, "chosen": "Done.", "chat_template_kwargs": OFF}
    probe = {"prompt": TEA, "behaviour": "tea", "check": {"matches": "Done"}}
    body = {"corrections": [given], "objective": objective, "probes": [probe], "lesson": {"behaviour": "tea"}}
    with pytest.raises(BadInput, match="1 of 1 probes are not held out"):
        strict.client.train(TrainRequest.model_validate({**body, "dry_run": True, "optimizer": {"rank": 1}}))


def test_options_that_are_none_of_a_templates_are_refused_by_name(strict: Running) -> None:
    given = {"prompt": TEA, "chosen": "Done.", "chat_template_kwargs": {"tokenize": True}}
    body = {"corrections": [given], "dry_run": True, "optimizer": {"rank": 1}}
    with pytest.raises(BadInput, match="correction 0: `tokenize` is no option of a chat template"):
        strict.client.train(TrainRequest.model_validate(body))


def test_the_same_said_under_other_options_is_another_correction(strict: Running) -> None:
    one, two = ({"prompt": TEA, "chosen": "Sure.", **x} for x in ({}, {"chat_template_kwargs": OFF}))
    found = posted(strict, "/v1/corrections", {"corrections": [one, two, two]}).json()
    assert found["outcomes"] == ["added", "added", "known"]
    for identifier in {c["id"] for c in found["corrections"]}:
        strict.client.delete_correction(identifier)
