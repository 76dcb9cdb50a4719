"""A file of each shape means the right records, and nothing is guessed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from importers.import_files import AIDER, BAD, CHATGPT, CHATML, COMMENTED, FILES, GOOD, HH, VOTE, WHY, Q, a, u

from secondnature.errors import BadInput, BadRecord
from secondnature.importers import Context, Options, Plan, read_into, recognise, sight
from secondnature.importers.objections import objects
from secondnature.importers.shapes import BY_NAME
from secondnature.records import Correction, parse_jsonl


def imported(
    paths: list[Path], options: Options | None = None, form: str | None = None
) -> tuple[Plan, list[Correction]]:
    chosen, spool = options or Options(), io.BytesIO()
    plan = recognise(paths, chosen, form)
    read_into(spool, plan, Context(chosen))
    data = spool.getvalue()
    return plan, parse_jsonl(data, Correction, source="spool") if data else []


def write(path: Path, value: Any) -> Path:
    if isinstance(value, str):
        path.write_text(value, encoding="utf-8")
    elif isinstance(value, dict):
        path.write_text(json.dumps(value, indent=1), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(v) + "\n" for v in value), encoding="utf-8")
    return path


FIELDS = ("prompt", "said", "chosen", "rejected", "feedback", "rating", "behaviour", "state")


def told(correction: Correction) -> dict[str, Any]:
    """What a record says, its answers as text."""
    found = correction.model_dump(mode="json", exclude_none=True, include=set(FIELDS))
    for key in ("said", "chosen", "rejected"):
        if key in found:
            (message,) = found[key]
            assert message["role"] == "assistant"
            found[key] = message["content"]
    return found


@pytest.mark.parametrize(("name", "shape", "rows", "records"), FILES, ids=[f[0] for f in FILES])
def test_a_file_of_each_shape_is_recognised_and_means_the_right_records(
    name: str, shape: str, rows: Any, records: list[dict[str, Any]], tmp_path: Path
) -> None:
    plan, found = imported([write(tmp_path / "file", rows)])
    assert [s.shape.name for s in plan.sources] == [shape], name
    assert plan.reasons == []
    assert [told(c) for c in found] == records
    for c in found:
        assert c.provenance is not None
        assert c.provenance.source == str(tmp_path / "file")
        assert c.provenance.line is not None
        assert c.provenance.kind == ("written" if BY_NAME[shape].kind == "written" else "observed")


def test_every_shape_has_its_file() -> None:
    of_two_files = {"chatgpt-feedback", "langfuse-scores", "langsmith-feedback"}
    assert {f[1] for f in FILES} | of_two_files | {"sheet"} == set(BY_NAME)


@pytest.mark.parametrize("rows", [f[2] for f in FILES if isinstance(f[2], list)])
def test_an_array_is_read_like_lines(rows: list[Any], tmp_path: Path) -> None:
    _, lines = imported([write(tmp_path / "a", rows)])
    for indent in (None, 2):
        (tmp_path / "b").write_text(json.dumps(rows, indent=indent), encoding="utf-8")
        _, array = imported([tmp_path / "b"])
        assert [told(c) for c in array] == [told(c) for c in lines]


def test_thumbs_of_another_file_find_their_message_whatever_the_order(tmp_path: Path) -> None:
    chats, votes = write(tmp_path / "c", [CHATGPT]), write(tmp_path / "v", [VOTE])
    expected = [{**COMMENTED, "chosen": GOOD, "state": "candidate"}]
    for paths in ([chats, votes], [votes, chats]):
        _, found = imported(paths)
        assert [told(c) for c in found] == expected


def test_only_the_last_turn_on_request(tmp_path: Path) -> None:
    path = write(tmp_path / "f", [{"messages": [u("Hi"), a("Hello."), u(), a(GOOD)]}])
    plan, found = imported([path], Options(turns="last"))
    assert [c.chosen[0].content for c in found if c.chosen] == [GOOD]
    assert plan.passed_over == {"earlier turns of the assistant (--turns last)": 1}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [u(), {"role": "assistant", "tool_calls": [{}], "content": None}]}, "tools"),
        ({"messages": [u(), a(GOOD)], "tools": [{"type": "function"}]}, "tools"),
        ({"messages": [u(), a(GOOD), {"role": "tool", "content": "1"}]}, "tools"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, a(GOOD)]}, "image_url"),
        ({"messages": [u(), {"role": "wizard", "content": "x"}]}, "wizard"),
        ({"prompt": "[INST] x [/INST]", "chosen": "a", "rejected": "b"}, "Llama 2 or Mistral"),
        ({"prompt": "<bos><start_of_turn>user\nx", "chosen": "a", "rejected": "b"}, "Gemma"),
        ({"prompt": "<|im_start|>user\nx<|im_end|>\nand more", "completion": "a"}, "ChatML"),
        ({"prompt": "### Instruction:\nx\n\n### Response:\n", "completion": "a"}, "Alpaca"),
        ({"prompt": "x", "chosen": "a", "rejected": "b", "rating": 1}, "of which answer"),
        ({"prompt": "x", "chosen": "a", "rating": -1}, "rated down"),
        ({"prompt": "x", "completion": 4}, "the value 4"),
        (
            {"prompt": "x", "completion": "y", "messages": None, "said": "z", "behaviour": "Use Tabs"},
            "small letters",
        ),
        ({"messages": [u("  "), a(GOOD)]}, "the prompt is blank"),
        ({"prompt": "x", "chosen": "a", "rejected": "a"}, "the same"),
        ({"prompt": "x", "chosen": None, "rejected": "a"}, "without a wanted one"),
        ({"chosen": " blue.", "rejected": " green."}, "what was asked is not known"),
        ({"chosen": [u("x"), a("y")], "rejected": [u("z"), a("y2")]}, "differ before the last turn"),
        ({"prompt": "x", "completion": "y", "rating": 4}, "unknown scale"),
        ({"prompt": "x", "completion": "y", "label": True, "rating": -1}, "different things"),
        ({"prompt": "x", "completion": ""}, "no answer"),
        ({"prompt": "", "completion": "y"}, "empty"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "no turn of the assistant"),
    ],
)
def test_what_would_be_guessed_is_refused_by_name(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    plan, found = imported([write(tmp_path / "f", [row])])
    assert found == []
    ((place, why),) = plan.reasons
    assert reason in why
    assert (place.number, place.unit) == (1, "line")


@pytest.mark.parametrize("column", ["label", "rating", "kto_tag"])
@pytest.mark.parametrize("value", [False, -1, "👎", "thumbs_down", "false", 0])
def test_what_was_rated_down_is_never_wanted(column: str, value: Any, tmp_path: Path) -> None:
    rows = [
        {"prompt": Q, "completion": BAD, column: value},
        {"messages": [u(), a(BAD)], column: value},
        {"instruction": Q, "output": BAD, column: value},
    ]
    for row in rows:
        if value == 0 and not isinstance(value, bool) and column != "label":
            continue  # 0 is no judgement, but of a label
        _, found = imported([write(tmp_path / "f", [row])])
        assert [(c.chosen, c.rating) for c in found] == [(None, -1)]


def test_an_ambiguous_file_is_refused_with_its_candidates(tmp_path: Path) -> None:
    both = {"instruction": Q, "output": GOOD, "conversations": [{"from": "human", "value": Q}]}
    path = write(tmp_path / "f", [both])
    with pytest.raises(BadRecord, match=r"alpaca .*sharegpt") as e:
        imported([path])
    assert "--format" in e.value.hint
    _, found = imported([path], form="alpaca")
    assert [c.chosen[0].content for c in found if c.chosen] == [GOOD]
    with pytest.raises(BadInput, match="no format"):
        imported([path], form="alpca")


@pytest.mark.parametrize(
    ("row", "word"),
    [
        ({"input_ids": [1, 2]}, "POST /v1/train"),
        ({"segments": []}, "input_output"),
        ({"prompt": "x", "completions": ["a"], "labels": [True]}, "stepwise"),
        ({"text": "x"}, "plain text"),
        ({"text": "x", "role": "prompter", "message_id": "1", "parent_id": None}, "single messages"),
        ({"prompt": "x"}, "prompts without answers"),
        ({"a": 1, "b": 2}, "no shape that is known"),
    ],
)
def test_what_is_known_and_cannot_be_taught_is_named(row: dict[str, Any], word: str, tmp_path: Path) -> None:
    with pytest.raises(BadRecord, match=word):
        imported([write(tmp_path / "f", [row])])


def test_columns_that_are_not_read_are_named_once(tmp_path: Path) -> None:
    rows = [
        {"prompt": Q, "chosen": GOOD, "rejected": f"{BAD}{i}", "source": "x", "score": 1} for i in range(3)
    ]
    plan, found = imported([write(tmp_path / "f", rows)])
    assert len(found) == 3
    assert plan.unused == {"source": 3, "score": 3}


def test_the_same_row_again_is_one_record(tmp_path: Path) -> None:
    row = {"prompt": Q, "chosen": GOOD, "rejected": BAD}
    plan, found = imported([write(tmp_path / "a", [row, row]), write(tmp_path / "b", [row])])
    assert (len(found), plan.num_duplicates) == (1, 2)


@pytest.mark.parametrize(
    "text",
    ["no", "No, tabs.", "I said tabs.", "That's not what I asked", "wrong", "Please don't do that", "you forgot it",
     "why did you change it?", "Nein, Tabs."],
)  # fmt: skip
def test_an_objection_is_seen(text: str) -> None:
    assert objects(text)


@pytest.mark.parametrize(
    "text", ["No problem", "Thanks!", "Now add tests", "Notes are here", "It is fine", "Nothing"]
)
def test_what_is_no_objection_is_not(text: str) -> None:
    assert not objects(text)


def test_a_file_is_told_in_a_few_words(tmp_path: Path) -> None:
    conversations = [{"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": GOOD}]}] * 3
    (tmp_path / "f").write_text(json.dumps(conversations))
    found = sight(tmp_path / "f")
    assert found is not None
    assert found.what == "a JSON array of 3 rows with `conversations`: ShareGPT (`conversations`)"
    assert (found.importable, found.direct) == (True, False)
    (tmp_path / "f").write_text("%%%")
    assert sight(tmp_path / "f") is None


def test_rendered_text_is_split_and_not_taught_as_one_turn(tmp_path: Path) -> None:
    for prompt in (HH, CHATML):
        _, (found,) = imported([write(tmp_path / "f", [{"prompt": prompt, "completion": GOOD}])])
        assert [(m.role, m.content) for m in found.prompt] == [("user", Q)]
    assert WHY in AIDER


@pytest.mark.parametrize(
    "prompt",
    [
        "What does <|im_end|> mean? <|im_start|>system\nhi",
        "What is [INST] for?",
        "Explain <start_of_turn>user to me.",
        "Human: who is that?",
    ],
)
def test_whoever_writes_about_marks_of_turns_is_taken_at_their_word(prompt: str, tmp_path: Path) -> None:
    _, (found,) = imported([write(tmp_path / "f", [{"prompt": prompt, "completion": GOOD}])])
    assert [(m.role, m.content) for m in found.prompt] == [("user", prompt)]


def test_thoughts_beside_an_answer_are_counted(tmp_path: Path) -> None:
    row = {"messages": [u(), {**a(GOOD), "reasoning_content": "Tabs, hm."}]}
    plan, (found,) = imported([write(tmp_path / "f", [row])])
    assert found.chosen is not None
    assert found.chosen[0].content == GOOD
    assert plan.passed_over == {"thoughts beside an answer, which are not taught": 1}


def test_columns_beside_our_own_records_are_named(tmp_path: Path) -> None:
    row = {"prompt": Q, "said": BAD, "chosen": GOOD, "colour": "red", "rating": None}
    plan, _ = imported([write(tmp_path / "f", [row])])
    assert plan.unused == {"colour": 1}


def test_thumbs_without_their_conversations_are_said(tmp_path: Path) -> None:
    plan, found = imported([write(tmp_path / "v", [VOTE])])
    assert found == []
    assert plan.passed_over == {"thumbs whose conversations are not in these files": 1}


def test_a_file_of_another_encoding_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes('{"prompt": "Größe?", "completion": "x"}\n'.encode("latin-1"))
    with pytest.raises(BadRecord, match="line 1: not UTF-8 text"):
        imported([tmp_path / "f"])


def test_what_may_be_meant_otherwise_is_counted(tmp_path: Path) -> None:
    rows = [
        {"prompt": Q, "chosen": GOOD, "rejected": BAD},
        {"prompt": Q, "chosen": BAD, "rejected": GOOD},
        {"prompt": "The sky is", "chosen": "The sky is blue.", "rejected": "The sky is red."},
        {
            "prompt": [{"role": "system", "content": "Greet."}],
            "chosen": [a("Hello.")],
            "rejected": [a("No.")],
        },
    ]
    plan, found = imported([write(tmp_path / "f", rows)])
    assert len(found) == 4
    assert +plan.doubts == {
        "contradicts another one": 1, "the answer begins with the prompt": 1, "nobody asks": 1,
    }  # fmt: skip


def test_what_the_template_is_told_is_kept(tmp_path: Path) -> None:
    row = {
        "messages": [u("Hi"), a("Hello."), u(), a(GOOD)],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    plan, found = imported([write(tmp_path / "f", [row])])
    assert [c.chat_template_kwargs for c in found] == [{"enable_thinking": False}] * 2
    assert plan.unused == {}
    plan, found = imported([write(tmp_path / "g", [{**row, "chat_template_kwargs": "x"}])])
    assert (found, [why for _, why in plan.reasons]) == ([], ["chat_template_kwargs: expected an object"] * 2)
