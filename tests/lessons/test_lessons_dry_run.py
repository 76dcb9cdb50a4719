"""A dry run shows what would be taught, decoded from the tokens themselves, and what one might not expect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chat_templates import TEMPLATES, tokenizer_for

from secondnature.errors import BadExample, BadInput
from secondnature.lessons.planner import Planner
from secondnature.wire import TrainRequest


def planner(family: str) -> Planner:
    tokenizer = tokenizer_for(TEMPLATES[family])
    return Planner(tokenizer, vocab_size=len(tokenizer), context_limit=512, highest_rank=8, default_lr=None)


def dry(family: str, *corrections: dict[str, Any], **more: Any) -> dict[str, Any]:
    made = planner(family)
    body = {"corrections": list(corrections), "optimizer": {"rank": 1}, "dry_run": True, **more}
    return made.show(made.plan(TrainRequest.model_validate(body), [], []))


def test_an_example_is_shown_as_its_tokens_say_it() -> None:
    plan = dry("chatml", {"prompt": "Where?", "chosen": "It is <|im_end|> Paris.", "rejected": "Who knows."})
    (example,) = plan["shown"]
    assert example["end_of_context"] == "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n"
    assert example["taught"] == "It is <|im_end|> Paris.<|im_end|>"
    assert example["rejected"] == "Who knows.<|im_end|>"
    assert example["example"] == "correction 0"
    assert example["notes"] == ["control tokens taken as text: <|im_end|>"]
    assert plan["notes"] == {"control tokens taken as text": 1}


def test_a_closed_block_of_thoughts_is_said() -> None:
    plan = dry("deepseek-r1", {"prompt": "Where?", "chosen": "It is Paris."})
    (example,) = plan["shown"]
    assert example["end_of_context"].endswith("<｜Assistant｜><think>\n\n</think>\n\n")
    assert example["taught"] == "It is Paris.<｜end▁of▁sentence｜>"
    assert "after a closed block of thoughts, which is read and not taught" in example["notes"][0]


@pytest.mark.parametrize(
    ("prompt", "marks"),
    [
        ("\n\nHuman: Hi\n\nAssistant:", "Assistant:, Human:"),
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>, <|im_start|>"),
        ("[INST] Hi [/INST]", "[/INST], [INST]"),
    ],
)
def test_a_prompt_that_was_rendered_before_is_named(prompt: str, marks: str) -> None:
    plan = dry("chatml", {"prompt": prompt, "chosen": "Hello."})
    assert f"a message of the user holds {marks}: it is taken as its text" in plan["shown"][0]["notes"][0]
    assert plan["notes"]["perhaps rendered already"] == 1


def test_earlier_answers_are_said_to_be_read_only() -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    plan = dry("chatml", {"messages": [{"role": r, "content": c} for r, c in turns]})
    assert plan["shown"][0]["notes"] == ["turns not taught: 1 earlier answer, which are read only"]
    assert plan["shown"][0]["taught"] == "d<|im_end|>"


def test_many_and_long_examples_are_bounded() -> None:
    plan = dry("chatml", *({"prompt": f"Say {i}.", "chosen": "x"} for i in range(30)))
    assert len(plan["shown"]) == 20
    assert plan["num_examples"] == 30
    plan = dry("chatml", {"prompt": "p" * 300, "chosen": "x"})
    assert plan["shown"][0]["end_of_context"].startswith("[")
    assert len(plan["shown"][0]["end_of_context"]) < 250


def test_a_correction_that_the_template_refuses_is_named() -> None:
    body = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}
    body["messages"].append({"role": "assistant", "content": "a"})
    with pytest.raises(
        BadInput, match="correction 0: the model's chat template refuses this conversation: System"
    ):
        dry("gemma2", body)


def test_a_probe_that_asks_what_is_taught_is_refused_behind_a_closed_block_of_thoughts_too() -> None:
    probe = {"prompt": "Where?", "behaviour": "x", "check": {"matches": "Paris"}}
    with pytest.raises(BadInput, match="1 of 1 probes are not held out"):
        dry(
            "qwen3", {"prompt": "Where?", "chosen": "It is Paris."}, probes=[probe], lesson={"behaviour": "x"}
        )


def test_two_answers_after_different_contexts_are_not_compared() -> None:
    with pytest.raises(BadInput, match="correction 0: one of the two answers brings thoughts of its own"):
        dry("qwen3", {"prompt": "Where?", "chosen": "Here.", "rejected": "<think>\nHm.\n</think>\n\nThere."})


def test_examples_of_token_ids_are_decoded_too() -> None:
    made = planner("chatml")
    request = TrainRequest.model_validate(
        {"examples": [{"context_ids": [1, 2], "continuation_ids": [3]}], "optimizer": {"rank": 1}}
    )
    (example,) = made.show(made.plan(request, [], []))["shown"]
    assert (example["example"], example["num_taught_tokens"]) == ("example 0", 1)


def test_the_export_names_all_that_ends_an_answer(tmp_path: Path) -> None:
    import json

    from tiny_models import dense_config, read_weights, save_tiny

    from secondnature.weights import checkpoint

    source = save_tiny(dense_config(vocab_size=320, eos_token_id=1), tmp_path / "source")
    tokenizer = tokenizer_for(TEMPLATES["chatml"], eos="</s>")
    tokenizer.save_pretrained(source)
    ids = tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"])
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": ids[1], "top_k": 20}))
    made = checkpoint.save(tmp_path / "root", source, read_weights(source), {"version": "w1"})
    settings = json.loads((made / "generation_config.json").read_text())
    assert settings["eos_token_id"][0] == ids[1]
    assert set(settings["eos_token_id"]) == {1, *ids}
    assert settings["top_k"] == 20


def test_what_may_be_meant_otherwise_is_said_of_each_example() -> None:
    plan = dry(
        "chatml",
        {"prompt": "Where?", "chosen": "Here.", "rejected": "There."},
        {"prompt": "Where?", "chosen": "There.", "rejected": "Here."},
        {"prompt": [{"role": "system", "content": "Greet."}], "chosen": " Hello.", "rejected": "No."},
    )
    first, second, third = (e["notes"] for e in plan["shown"])
    assert first == []
    assert second == ["contradicts another one: correction 0 wants what this one rejects, or the reverse"]
    assert [n.split(":")[0] for n in third] == ["nobody asks", "the answer begins with a space or a line end"]
    assert plan["notes"]["contradicts another one"] == 1


@pytest.mark.parametrize("objective", ["sft", "sdft"])
def test_what_asks_nothing_is_not_taught(objective: str) -> None:
    with pytest.raises(BadExample, match="correction 0: the prompt is blank"):
        dry("chatml", {"prompt": " ", "chosen": "Hello.", "feedback": "say it"}, objective=objective)


@pytest.mark.parametrize(
    ("asked", "steps", "learned_loss"),
    [
        ({}, 40, 0.2),
        ({"batch_size": 1}, 80, 0.2),
        ({"learned_loss": 0.5}, 40, 0.5),
        ({"max_steps": 3}, 3, 1e-3),
        ({"epochs": 2}, 6, 1e-3),
        ({"until_margin": 1.0}, 100, 1e-3),
        ({"objective": "sdft"}, 10, 1e-3),
    ],
)
def test_where_nothing_says_when_to_stop_it_is_when_the_examples_are_learned(
    asked: dict[str, Any], steps: int, learned_loss: float
) -> None:
    corrections = [
        {"prompt": f"Where is {i}?", "chosen": "Here.", "rejected": "Who knows.", "feedback": "Say where."}
        for i in range(20)
    ]
    plan = dry("chatml", *corrections, **asked)
    assert (plan["steps"], plan["learned_loss"]) == (steps, learned_loss)
