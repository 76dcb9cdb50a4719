"""Exports as programs write them: what is beside the words, what lies in another file, branches of a session."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from importers.import_files import (
    ASKED,
    BAD,
    CHATGPT,
    COMMENTED,
    CORRECTED,
    GOOD,
    OBJECTION,
    VOTE,
    WHY,
    Q,
    a,
    item,
    said,
    webui_chat,
    wrapped,
)
from importers.test_importers_shapes import imported, told, write


def read(path: Path, *files: Any) -> list[dict[str, Any]]:
    paths = [write(path / f"file{i}", rows) for i, rows in enumerate(files)]
    plan, found = imported(paths)
    assert plan.reasons == []
    return [told(c) for c in found]


# -------------------------------------------------------------------------- judgements in a file of their own

OBSERVATIONS = [
    {"id": "o1", "trace_id": "t1", "parent_observation_id": None, "type": "GENERATION",
     "input": json.dumps({"messages": ASKED}), "output": json.dumps(a(BAD)), "model": "x"},
    {"id": "o2", "trace_id": "t1", "parent_observation_id": "o1", "type": "SPAN", "input": "x", "output": "y"},
]  # fmt: skip
SCORE: dict[str, Any] = {
    "id": "s",
    "trace_id": "t1",
    "observation_id": None,
    "source": "ANNOTATION",
    "comment": None,
}


@pytest.mark.parametrize("observation", ["o1", None])
@pytest.mark.parametrize(
    ("score", "record"),
    [
        ({"name": "output", "data_type": "CORRECTION", "string_value": GOOD, "value": 0, "comment": WHY},
         {**CORRECTED, "feedback": WHY}),
        ({"name": "user-feedback", "data_type": "BOOLEAN", "value": 0, "comment": WHY}, COMMENTED),
        ({"name": "user-feedback", "data_type": "NUMERIC", "value": -1, "comment": WHY}, COMMENTED),
    ],
)  # fmt: skip
def test_langfuses_scores_find_their_observation(
    score: dict[str, Any], record: dict[str, Any], observation: str | None, tmp_path: Path
) -> None:
    scores = [{**SCORE, **score, "observation_id": observation}]
    for files in ((OBSERVATIONS, scores), (scores, OBSERVATIONS)):
        assert read(tmp_path, *files) == [record]


def test_langsmiths_feedback_finds_its_run(tmp_path: Path) -> None:
    run = {"id": "r1", "run_type": "llm", "inputs": {"messages": ASKED}, "outputs": {"output": BAD},
           "feedback_stats": {}}  # fmt: skip
    feedback = {
        "id": "f",
        "run_id": "r1",
        "key": "c",
        "score": 0,
        "correction": {"output": GOOD},
        "comment": WHY,
    }
    assert read(tmp_path, [run], [feedback]) == [{**CORRECTED, "feedback": WHY}]
    thumb = {"id": "f", "run_id": "r1", "key": "thumb", "score": 0, "correction": None, "comment": WHY}
    assert read(tmp_path, [run], [thumb]) == [COMMENTED]


def test_judgements_without_their_traces_are_said(tmp_path: Path) -> None:
    plan, found = imported(
        [write(tmp_path / "s", [{**SCORE, "name": "x", "data_type": "NUMERIC", "value": 1}])]
    )
    assert found == []
    assert plan.passed_over == {"judgements whose traces are not in these files": 1}


# ------------------------------------------------------------------------------------------------- evaluations


def test_of_an_evaluation_what_was_said_is_taken_and_not_what_a_filter_found(tmp_path: Path) -> None:
    row = {
        "doc_id": 0,
        "doc": {},
        "target": GOOD,
        "arguments": {"gen_args_0": {"arg_0": Q, "arg_1": {}}},
        "resps": [[BAD]],
        "filtered_resps": ["[invalid]"],
        "filter": "strict-match",
        "exact_match": 0.0,
    }
    assert read(tmp_path, [row]) == [CORRECTED]


# ------------------------------------------------------------------------------------------------------- chats

OPENS = '<details type="reasoning" done="true" duration="2">'
REASONED = OPENS + "\n<summary>Thought</summary>\n> Hm.\n</details>\n"


def test_what_open_webui_puts_beside_an_answer_is_no_answer(tmp_path: Path) -> None:
    chat = webui_chat({"rating": -1, "comment": WHY})
    for key in ("m2", "m3"):
        node = chat["history"]["messages"][key]
        node["content"] = REASONED + node["content"]
    (found,) = read(tmp_path, [{"id": "c", "chat": chat}])
    assert (found["said"], found["chosen"]) == (BAD, GOOD)
    chat["history"]["messages"]["m2"]["content"] = (
        '<details type="tool_calls" done="true">x</details>\n' + BAD
    )
    assert read(tmp_path, [{"id": "c", "chat": chat}]) == []


def test_reasons_that_were_ticked_are_a_comment(tmp_path: Path) -> None:
    vote = {**VOTE, "content": json.dumps({"tags": ["not-factually-correct", "lazy"]})}
    (found,) = read(tmp_path, [CHATGPT], [vote])
    assert (found["feedback"], found["rating"]) == ("not factually correct, lazy", -1)


def test_an_answer_by_tools_is_left_out(tmp_path: Path) -> None:
    messages = [
        {"messageId": "1", "parentMessageId": None, "text": Q, "isCreatedByUser": True},
        {"messageId": "2", "parentMessageId": "1", "isCreatedByUser": False, "text": "",
         "content": [{"type": "think", "think": "hm"}, {"type": "text", "text": {"value": BAD}}],
         "feedback": {"rating": "thumbsDown", "text": WHY}},
    ]  # fmt: skip
    chat = {"conversationId": "c", "messages": messages}
    assert read(tmp_path, [chat]) == [{**COMMENTED, "state": "candidate"}]
    messages[1]["content"] = [{"type": "tool_call", "tool_call": {}}, {"type": "text", "text": BAD}]
    assert read(tmp_path, [chat]) == []


# ---------------------------------------------------------------------------------------------------- sessions


def chain(*spoken: tuple[str, str, str | None, str]) -> list[dict[str, Any]]:
    """Events of Claude Code: (uuid, role, parent, text)."""
    return [
        {"type": role, "sessionId": "s", "uuid": key, "parentUuid": parent, "isSidechain": False,
         "message": {"role": role, "content": said(text)}}
        for key, role, parent, text in spoken
    ]  # fmt: skip


def test_a_branch_that_was_left_is_not_in_the_conversation(tmp_path: Path) -> None:
    session = chain(
        ("1", "user", None, Q), ("2", "assistant", "1", "A first attempt."), ("3", "user", "2", "Go on."),
        ("4", "assistant", "3", "More of it."), ("5", "assistant", "1", BAD), ("6", "user", "5", WHY),
    )  # fmt: skip
    assert read(tmp_path, session) == [OBJECTION]


def test_a_session_that_begins_anew_or_whose_events_name_nothing_is_read(tmp_path: Path) -> None:
    anew = chain(
        ("1", "user", None, "Hi."), ("2", "assistant", "1", "Hello."),
        ("3", "user", None, Q), ("4", "assistant", "3", BAD), ("5", "user", "4", WHY),
    )  # fmt: skip
    assert read(tmp_path, anew) == [OBJECTION]
    bare = chain(("1", "user", None, Q), ("2", "assistant", None, BAD), ("3", "user", None, WHY))
    assert read(tmp_path, bare) == [OBJECTION]


@pytest.mark.parametrize(
    "mark",
    [
        {"isApiErrorMessage": True},
        {"isVisibleInTranscriptOnly": True},
        {"isMeta": True},
        {"isSidechain": True},
        {"message": {"model": "<synthetic>", "role": "assistant", "content": said("API Error: 500")}},
    ],
)
def test_what_the_program_says_is_no_answer(mark: dict[str, Any], tmp_path: Path) -> None:
    session = chain(("1", "user", None, Q), ("2", "assistant", "1", BAD), ("3", "assistant", "2", "x"))
    session[2].update(copy.deepcopy(mark))
    session += chain(("4", "user", "3", WHY))
    (found,) = read(tmp_path, session)
    assert found["said"] == BAD


@pytest.mark.parametrize(
    "put",
    ["<task-notification>\nno, x\n</task-notification>", "<user_shell_command a=1>no</user_shell_command>"],
)
def test_a_turn_of_markup_is_the_programs(put: str, tmp_path: Path) -> None:
    session = chain(
        ("1", "user", None, Q), ("2", "assistant", "1", BAD), ("3", "user", "2", put), ("4", "user", "3", WHY)
    )
    assert read(tmp_path, session) == [OBJECTION]


def test_turns_that_codex_rolled_back_are_forgotten(tmp_path: Path) -> None:
    turns = [
        item("user", Q),
        item("assistant", "A first attempt."),
        item("user", "Go on."),
        item("assistant", "More."),
    ]
    back = {"type": "event_msg", "payload": {"type": "thread_rolled_back", "num_turns": 2}}
    again = [item("user", Q), item("assistant", BAD), item("user", WHY)]
    meta = {"type": "session_meta", "payload": {"id": "r"}}
    assert read(tmp_path, [meta, *map(wrapped, turns), back, *map(wrapped, again)]) == [OBJECTION]
