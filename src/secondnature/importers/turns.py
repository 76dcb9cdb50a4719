"""Messages of other people's making as plain turns: roles, text parts, rendered prompts, thumbs (client).

What would have to be guessed is refused by name: tools, pictures, prompts rendered by a template that is not
split here.
"""

from __future__ import annotations

import json
import re
from typing import Any, cast

from secondnature.importers.rows import Refused, Turn

__all__ = [
    "answer_text",
    "as_object",
    "conversation",
    "num_thoughts",
    "prompt_turns",
    "rating_of",
    "text_of",
]

ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "model": "assistant", "ai": "assistant",
}  # fmt: skip
TOOL_ROLES = frozenset({"tool", "function", "function_call", "observation", "ipython"})
NO_TOOLS = "a conversation with tools, which cannot be taught yet"
TEXT_PARTS = frozenset({"text", "input_text", "output_text"})
RENDERED = {
    "[INST]": "Llama 2 or Mistral", "<|start_header_id|>": "Llama 3", "<start_of_turn>": "Gemma",
    "<｜User｜>": "DeepSeek", "<|user|>": "Phi or Zephyr", "<|system|>": "Phi or Zephyr",
    "<|im_start|>": "ChatML",
}  # fmt: skip
"""How a text begins that a template rendered. In the middle of a text these words are what somebody wrote."""
CUES = {"### Response:": "Alpaca", "### Assistant:": "Vicuna", "ASSISTANT:": "Vicuna"}
"""How a text ends in which a template without tokens of its own asks for an answer."""
BEGINNINGS = ("<s>", "<bos>", "<|begin_of_text|>", "<｜begin▁of▁sentence｜>", "<|endoftext|>")
"""What templates write before that."""
THOUGHTS = ("thinking", "reasoning_content", "reasoning")
"""Fields of a message that hold what the model thought before it answered."""
UP = frozenset({"1", "1.0", "+1", "true", "yes", "up", "good", "like", "liked", "positive", "👍", "thumbs_up",
                "thumbsup", "thumb_up", "thumbs up", "desirable", "chosen"})  # fmt: skip
DOWN = frozenset({"-1", "-1.0", "0.0", "false", "no", "down", "bad", "dislike", "disliked", "negative", "👎",
                  "thumbs_down", "thumbsdown", "thumb_down", "thumbs down", "undesirable", "rejected"})  # fmt: skip
_HUMAN = re.compile(r"\n\n(Human|Assistant):[ ]?")
_CHATML = re.compile(r"\s*<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>\s*|\Z)", re.DOTALL)


def as_object(value: Any) -> dict[str, Any]:
    """The value if it is an object, else an empty one."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def text_of(content: Any) -> str:
    """The text of a content: a string, or parts of which all are text.

    Raises:
        Refused: there is something else in it.
    """
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if isinstance(content, list):
        return "".join(_part_text(p) for p in cast("list[Any]", content))
    for key in ("text", "value"):
        if isinstance(as_object(content).get(key), str):
            return as_object(content)[key]
    raise Refused(f"the content of a message is {type(cast('object', content)).__name__}; expected text")


def _part_text(part: Any) -> str:
    if isinstance(part, str):
        return part
    piece = as_object(part)
    kind = piece.get("type", "text")
    text = piece.get("text", piece.get("content"))
    if kind in TEXT_PARTS and isinstance(text, str):
        return text
    if kind in ("tool_use", "tool_result", "tool_call", "tool_call_response"):
        raise Refused(NO_TOOLS)
    raise Refused(f"a message with a part of the type {str(kind)[:40]!r}; only text can be taught")


def conversation(messages: Any, *, role: str = "role", content: str = "content") -> list[Turn]:
    """Messages as turns; blank system turns are left out.

    Raises:
        Refused: no list, an unknown role, tools, or a content that is no text.
    """
    if not isinstance(messages, list) or not messages:
        raise Refused("the conversation is not a list of messages, or is empty")
    turns: list[Turn] = []
    for one in cast("list[Any]", messages):
        message = as_object(one)
        name = str(message.get(role, "")).lower()
        if name in TOOL_ROLES or message.get("tool_calls") or message.get("function_call"):
            raise Refused(NO_TOOLS)
        if name not in ROLES:
            raise Refused(
                f"a message of the role {str(message.get(role))[:40]!r}; expected system, user or assistant"
            )
        raw = message.get(content)
        text = raw if isinstance(raw, str) else text_of(message.get("parts") if raw is None else raw)
        if text or name not in ("system", "developer"):
            turns.append({"role": ROLES[name], "content": text})
    return turns


def prompt_turns(prompt: Any) -> list[Turn]:
    """A prompt as turns: text, messages, or text that a template rendered (HH and ChatML are split).

    Raises:
        Refused: rendered by another template, or nothing in it.
    """
    if not isinstance(prompt, str):
        return conversation(prompt)
    if _HUMAN.match("\n\n" + prompt.lstrip()) and "\n\nAssistant:" in prompt:
        return split_hh(prompt)
    chatml = _split_chatml(prompt)
    if chatml:
        return conversation(chatml)
    begins = prompt.lstrip()
    for token in BEGINNINGS:
        begins = begins.removeprefix(token).lstrip()
    found = next((m for m in RENDERED if begins.startswith(m)), None)
    found = found or next((c for c in CUES if prompt.rstrip().endswith(c)), None)
    if found is not None:
        whose = RENDERED.get(found) or CUES[found]
        raise Refused(
            f"a prompt that was rendered already ({whose}: {found}); expected messages, or plain text"
        )
    if not prompt.strip():
        raise Refused("the prompt is empty")
    return [{"role": "user", "content": prompt}]


def _split_chatml(text: str) -> list[Turn]:
    """The turns of a text that is ChatML from its beginning to its end; none: it is not."""
    turns: list[Turn] = []
    at = 0
    while at < len(text):
        found = _CHATML.match(text, at)
        if found is None:
            return []
        turns.append({"role": found[1], "content": found[2]})
        at = found.end()
    if turns and turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip():
        turns.pop()
    return turns


def num_thoughts(row: dict[str, Any]) -> int:
    """How many messages of a row bring thoughts beside their content, which is all that is read of them."""
    found = 0
    for value in row.values():
        if isinstance(value, list):
            messages = [as_object(m) for m in cast("list[Any]", value)]
            found += sum(any(isinstance(m.get(k), str) and m[k] for k in THOUGHTS) for m in messages)
    return found


def split_hh(text: str) -> list[Turn]:
    """A transcript of `\\n\\nHuman:` and `\\n\\nAssistant:` as turns; an empty last turn is the cue to answer."""
    pieces = _HUMAN.split("\n\n" + text.lstrip())
    turns = [
        {"role": ROLES[who.lower()], "content": said.strip()}
        for who, said in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    if turns and turns[-1]["role"] == "assistant" and not turns[-1]["content"]:
        turns.pop()
    return turns


def answer_text(answer: Any) -> str | None:
    """An answer: text, one assistant message, or a list of exactly that. None where there is none.

    Raises:
        Refused: several messages, or one that is not the assistant's.
    """
    if answer is None or answer == []:
        return None
    if isinstance(answer, str):
        return answer.removeprefix(" ") if answer.strip() else None
    if isinstance(answer, bool | int | float):
        raise Refused(f"an answer that is the value {json.dumps(answer)[:40]}; expected text, in quotes")
    found = cast("list[Any]", answer) if isinstance(answer, list) else [answer]
    if len(found) == 1 and isinstance(found[0], dict):
        message = cast("dict[str, Any]", found[0])
        speaker = message.get("role", message.get("from"))
        if speaker is not None:
            content = "content" if "content" in message or "parts" in message else "value"
            turns = conversation(found, role="role" if "role" in message else "from", content=content)
            if len(turns) == 1 and turns[0]["role"] == "assistant":
                return turns[0]["content"] or None
            raise Refused(f"an answer by {str(speaker)[:40]!r}; expected the assistant")
        if isinstance(message.get("content"), str):
            return message["content"] or None
    raise Refused("an answer that is neither text nor one message of the assistant")


def rating_of(value: Any) -> int | None:
    """-1, 0 or 1; None where nothing was said.

    Raises:
        Refused: a scale (stars, 0.8), which would have to be guessed.
    """
    if value is None or value == "" or (type(value) in (int, float) and value == 0):
        return None
    word = str(value).strip().lower().removesuffix("\ufe0f")
    if word in UP:
        return 1
    if word in DOWN:
        return -1
    raise Refused(
        f"the rating {str(value)[:40]!r} is of an unknown scale; expected -1, 1, true, false or a thumb"
    )
