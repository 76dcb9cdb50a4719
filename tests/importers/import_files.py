"""One small file of each shape, written for these tests, with the records that it means."""

from __future__ import annotations

import json
from typing import Any

Q, GOOD, BAD, WHY = "Use tabs, please.", "Tabs it is.", "Here are spaces.", "I said tabs."


def u(text: str = Q) -> dict[str, str]:
    return {"role": "user", "content": text}


def a(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


ASKED = [u()]
PAIR = {"prompt": ASKED, "chosen": GOOD, "rejected": BAD}
WANTED = {"prompt": ASKED, "chosen": GOOD}
DOWN = {"prompt": ASKED, "said": BAD, "rejected": BAD, "rating": -1}
COMMENTED = {**DOWN, "feedback": WHY}
UP = {"prompt": ASKED, "said": GOOD, "chosen": GOOD, "rating": 1}
CORRECTED = {"prompt": ASKED, "said": BAD, "rejected": BAD, "chosen": GOOD}
OBJECTION = {"prompt": ASKED, "said": BAD, "feedback": WHY, "state": "candidate"}
TALK = [{"role": "system", "content": "Be brief."}, u("Hi"), a("Hello."), u(), a(GOOD)]
LAST = {"prompt": TALK[:-1], "chosen": GOOD}


def webui_chat(annotation: dict[str, Any] | None) -> dict[str, Any]:
    messages: dict[str, Any] = {
        "m1": {"id": "m1", "parentId": None, "childrenIds": ["m2", "m3"], "role": "user", "content": Q},
        "m2": {"id": "m2", "parentId": "m1", "childrenIds": [], "role": "assistant", "content": BAD},
        "m3": {"id": "m3", "parentId": "m1", "childrenIds": [], "role": "assistant", "content": GOOD},
    }
    if annotation:
        messages["m2"]["annotation"] = annotation
    return {"title": "t", "history": {"messages": messages, "currentId": "m3"}}


def node(key: str, parent: str | None, role: str, text: str, *children: str) -> dict[str, Any]:
    content = {"content_type": "text", "parts": [text]}
    message = {"id": key, "author": {"role": role}, "content": content, "recipient": "all"} if role else None
    return {"id": key, "message": message, "parent": parent, "children": list(children)}


CHATGPT = {
    "title": "t",
    "conversation_id": "c1",
    "current_node": "n4",
    "mapping": {
        "n0": node("n0", None, "", "", "n1"),
        "n1": node("n1", "n0", "user", Q, "n2", "n3"),
        "n2": node("n2", "n1", "assistant", BAD),
        "n3": node("n3", "n1", "assistant", GOOD, "n4"),
        "n4": node("n4", "n3", "user", "Thanks."),
    },
}
VOTE = {
    "id": "n2",
    "conversation_id": "c1",
    "rating": "thumbs_down",
    "content": json.dumps({"tags": [], "text": WHY}),
}


def event(kind: str, content: Any, **more: Any) -> dict[str, Any]:
    message = {"role": kind, "content": content}
    return {"type": kind, "sessionId": "s1", "uuid": f"u-{len(str(content))}", "message": message, **more}


def said(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


CLAUDE_CODE = [
    {"type": "summary", "summary": "Tabs", "leafUuid": "x"},
    event("user", Q),
    event("assistant", [{"type": "thinking", "thinking": "hm"}]),
    event("assistant", [{"type": "tool_use", "id": "t", "name": "Edit", "input": {}}]),
    event("user", [{"type": "tool_result", "tool_use_id": "t", "content": "ok"}]),
    event("assistant", said("A side chain speaks."), isSidechain=True),
    event("assistant", said(BAD)),
    event("user", "<command-name>/clear</command-name>"),
    event("user", WHY),
    event("assistant", said(GOOD)),
    event("user", "No problem, thanks."),
]


def item(role: str, text: str) -> dict[str, Any]:
    kind = "output_text" if role == "assistant" else "input_text"
    return {"type": "message", "role": role, "content": [{"type": kind, "text": text}]}


def wrapped(payload: dict[str, Any]) -> dict[str, Any]:
    return {"timestamp": "2026-01-01T00:00:00Z", "type": "response_item", "payload": payload}


CODEX_TURNS = [
    item("user", "<environment_context>x</environment_context>"),
    item("user", Q),
    {"type": "function_call", "name": "shell", "arguments": "{}"},
    item("assistant", BAD),
    item("user", WHY),
]
CODEX = [{"type": "session_meta", "payload": {"id": "r1", "cwd": "/x"}}, *map(wrapped, CODEX_TURNS)]
CODEX_OLD = [{"id": "r1", "timestamp": "2025", "instructions": None}, {"record_type": "state"}, *CODEX_TURNS]
AIDER = f"""
# aider chat started at 2026-01-01 10:00:00

> /usr/bin/aider
> Model: x

#### {Q}

{BAD}

```
#### no heading
```

> Applied edit to a.py

#### /add b.py
> Added b.py

#### {WHY}

{GOOD}
"""
SPAN = {
    "name": "chat",
    "span_id": "sp",
    "attributes": {
        "gen_ai.operation.name": "chat",
        "gen_ai.input.messages": json.dumps([{"role": "user", "parts": [{"type": "text", "content": Q}]}]),
        "gen_ai.output.messages": json.dumps(
            [{"role": "assistant", "parts": [{"type": "text", "content": BAD}]}]
        ),
    },
    "events": [
        {
            "name": "gen_ai.evaluation.result",
            "attributes": {"gen_ai.evaluation.score.value": 0, "gen_ai.evaluation.explanation": WHY},
        }
    ],
}
HH = f"\n\nHuman: {Q}\n\nAssistant:"
CHATML = f"<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n"
OASST = {
    "message_tree_id": "m",
    "prompt": {
        "message_id": "m",
        "role": "prompter",
        "text": Q,
        "replies": [
            {"role": "assistant", "text": BAD, "rank": 1, "replies": []},
            {"role": "assistant", "text": GOOD, "rank": 0, "replies": []},
        ],
    },
}
PROMPTFOO = {
    "evalId": "e",
    "results": {
        "version": 3,
        "prompts": [{"raw": Q, "label": "p", "provider": "x"}],
        "stats": {"successes": 1, "failures": 1},
        "results": [
            {
                "prompt": {"raw": Q, "label": "p"},
                "response": {"output": BAD},
                "success": False,
                "testCase": {"assert": [{"type": "equals", "value": GOOD}]},
            },
            {"prompt": {"raw": Q}, "response": {"output": GOOD}, "success": True},
        ],
    },
    "config": {},
}

FILES: list[tuple[str, str, Any, list[dict[str, Any]]]] = [
    # (id, shape, rows of the file, records)
    (
        "own",
        "corrections",
        [{"prompt": Q, "said": BAD, "chosen": GOOD, "behaviour": "tabs"}],
        [{**CORRECTED, "behaviour": "tabs"}],
    ),
    ("messages", "messages", [{"messages": TALK}], [{"prompt": TALK[:2], "chosen": "Hello."}, LAST]),
    (
        "openai weight",
        "messages",
        [{"messages": [*TALK[:2], {**TALK[2], "weight": 0}, *TALK[3:]]}],
        [LAST],
    ),
    (
        "axolotl train",
        "messages",
        [{"messages": [*TALK[:2], {**TALK[2], "train": False}, *TALK[3:]]}],
        [LAST],
    ),
    (
        "text parts, name, developer",
        "messages",
        [
            {
                "messages": [
                    {"role": "developer", "content": "Be brief."},
                    {"role": "user", "name": "ann", "content": [{"type": "text", "text": Q}]},
                    {**a(GOOD), "refusal": None},
                ]
            }
        ],
        [{"prompt": [TALK[0], u()], "chosen": GOOD}],
    ),
    ("messages kto", "messages", [{"messages": [u(), a(BAD)], "label": False}], [DOWN]),
    (
        "messages commented",
        "messages",
        [{"messages": [u(), a(BAD)], "rating": -1, "feedback": WHY}],
        [COMMENTED],
    ),
    ("only wanted", "preference", [{"prompt": ASKED, "chosen": [a(GOOD)]}], [WANTED]),
    (
        "a pair of which one answer was rated down",
        "preference",
        [{"prompt": Q, "chosen": GOOD, "rejected": BAD, "rating": -1}],
        [{**PAIR, "rating": -1}],
    ),
    ("trl strings", "preference", [{"prompt": Q, "chosen": " " + GOOD, "rejected": " " + BAD}], [PAIR]),
    ("trl lists", "preference", [{"prompt": ASKED, "chosen": [a(GOOD)], "rejected": [a(BAD)]}], [PAIR]),
    ("trl implicit", "preference", [{"chosen": [u(), a(GOOD)], "rejected": [u(), a(BAD)]}], [PAIR]),
    (
        "ultrafeedback",
        "preference",
        [
            {
                "prompt": Q,
                "prompt_id": "1",
                "chosen": [u(), a(GOOD)],
                "rejected": [u(), a(BAD)],
                "messages": [u(), a(GOOD)],
                "score_chosen": 8.0,
            }
        ],
        [PAIR],
    ),
    ("argilla", "preference", [{"input": Q, "system": "", "chosen": GOOD, "rejected": BAD}], [PAIR]),
    ("hh", "preference", [{"chosen": HH + " " + GOOD, "rejected": HH + " " + BAD}], [PAIR]),
    ("hh prompt", "preference", [{"prompt": HH, "chosen": " " + GOOD, "rejected": " " + BAD}], [PAIR]),
    ("chatml prompt", "preference", [{"prompt": CHATML, "chosen": GOOD, "rejected": BAD}], [PAIR]),
    ("prompt completion", "completion", [{"prompt": Q, "completion": " " + GOOD}], [WANTED]),
    (
        "kto",
        "completion",
        [{"prompt": Q, "completion": BAD, "label": False}, {"prompt": Q, "completion": GOOD, "label": True}],
        [DOWN, UP],
    ),
    (
        "alpaca",
        "alpaca",
        [{"instruction": "Use tabs,", "input": "please.", "output": GOOD}],
        [{"prompt": [u("Use tabs,\nplease.")], "chosen": GOOD}],
    ),
    (
        "alpaca history",
        "alpaca",
        [
            {
                "instruction": Q,
                "input": "",
                "output": GOOD,
                "system": "Be brief.",
                "history": [["Hi", "Hello."]],
            }
        ],
        [LAST],
    ),
    ("alpaca pair", "alpaca", [{"instruction": Q, "input": "", "chosen": GOOD, "rejected": BAD}], [PAIR]),
    ("alpaca kto", "alpaca", [{"instruction": Q, "output": BAD, "kto_tag": False}], [DOWN]),
    (
        "sharegpt",
        "sharegpt",
        [{"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": GOOD}], "system": ""}],
        [WANTED],
    ),
    (
        "sharegpt pair",
        "sharegpt",
        [
            {
                "conversations": [{"from": "human", "value": Q}],
                "chosen": {"from": "gpt", "value": GOOD},
                "rejected": {"from": "gpt", "value": BAD},
            }
        ],
        [PAIR],
    ),
    (
        "openai dpo",
        "openai-preference",
        [{"input": {"messages": ASKED}, "preferred_output": [a(GOOD)], "non_preferred_output": [a(BAD)]}],
        [PAIR],
    ),
    ("ms-swift", "ms-swift", [{"messages": [u(), a(GOOD)], "rejected_response": BAD}], [PAIR]),
    ("oasst", "oasst", [OASST], [PAIR]),
    (
        "langfuse",
        "langfuse",
        [
            {
                "id": "o1",
                "input": {"messages": ASKED},
                "output": a(BAD),
                "scores": [{"name": "output", "dataType": "CORRECTION", "stringValue": GOOD, "comment": WHY}],
            },
            {"id": "o2", "input": ASKED, "output": a(BAD), "scores": []},
        ],
        [{**CORRECTED, "feedback": WHY}],
    ),
    (
        "langsmith",
        "langsmith",
        [
            {
                "id": "r1",
                "run_type": "llm",
                "inputs": {"messages": ASKED},
                "outputs": {"output": BAD},
                "feedback": [{"key": "c", "correction": {"output": GOOD}, "comment": WHY}],
            }
        ],
        [{**CORRECTED, "feedback": WHY}],
    ),
    (
        "phoenix",
        "phoenix",
        [
            {
                "context": {"span_id": "s"},
                "attributes": {
                    "llm": {"input_messages": [{"message.role": "user", "message.content": Q}]},
                    "output.value": BAD,
                },
                "annotations": [{"name": "q", "result": {"label": "thumbs_down", "explanation": WHY}}],
            }
        ],
        [COMMENTED],
    ),
    (
        "helicone",
        "helicone",
        [
            {
                "request_id": "h",
                "request_body": {"messages": ASKED},
                "response_body": {"choices": [{"message": a(BAD)}]},
                "feedback_rating": False,
            }
        ],
        [DOWN],
    ),
    ("otel", "otel", [SPAN], [COMMENTED]),
    ("promptfoo", "promptfoo", PROMPTFOO, [{**CORRECTED, "rating": -1}]),
    (
        "lm-eval",
        "lm-eval",
        [
            {
                "doc_id": 0,
                "doc": {},
                "target": GOOD,
                "arguments": [[Q, {"until": ["\n"]}]],
                "resps": [[BAD]],
                "filtered_resps": [BAD],
                "exact_match": 0.0,
            }
        ],
        [CORRECTED],
    ),
    ("chatgpt", "chatgpt", [CHATGPT], [{**CORRECTED, "state": "candidate"}]),
    (
        "open webui feedback",
        "open-webui-feedback",
        [
            {
                "id": "f",
                "type": "rating",
                "data": {"rating": -1, "comment": WHY, "reason": "other"},
                "meta": {"message_id": "m2", "chat_id": "c"},
                "snapshot": {"chat": {"chat": webui_chat(None)}},
            }
        ],
        [{**COMMENTED, "chosen": GOOD, "state": "candidate"}],
    ),
    (
        "open webui chats",
        "open-webui-chats",
        [{"id": "c", "chat": webui_chat({"rating": -1, "comment": WHY})}],
        [{**COMMENTED, "chosen": GOOD, "state": "candidate"}],
    ),
    (
        "librechat",
        "librechat",
        {
            "conversationId": "c",
            "messages": [
                {"messageId": "1", "parentMessageId": None, "text": Q, "isCreatedByUser": True},
                {
                    "messageId": "2",
                    "parentMessageId": "1",
                    "text": BAD,
                    "isCreatedByUser": False,
                    "feedback": {"rating": "thumbsDown", "tag": "other", "text": WHY},
                },
            ],
        },
        [{**COMMENTED, "state": "candidate"}],
    ),
    (
        "claude",
        "claude",
        [
            {
                "uuid": "c",
                "name": "t",
                "chat_messages": [
                    {"uuid": "1", "sender": "human", "text": Q, "content": said(Q)},
                    {"uuid": "2", "sender": "assistant", "text": BAD, "content": said(BAD)},
                    {"uuid": "3", "sender": "human", "text": WHY, "content": said(WHY)},
                ],
            }
        ],
        [OBJECTION],
    ),
    ("claude code", "claude-code", CLAUDE_CODE, [OBJECTION]),
    ("codex", "codex", CODEX, [OBJECTION]),
    ("codex of before", "codex", CODEX_OLD, [OBJECTION]),
    (
        "aider",
        "aider",
        AIDER,
        [{**OBJECTION, "said": BAD + "\n\n```\n#### no heading\n```"}],
    ),
]
