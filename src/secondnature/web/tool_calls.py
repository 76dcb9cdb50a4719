"""Calls of tools in what a model wrote: found, taken out of the text, given as OpenAI's clients expect (server).

Models write calls as they were trained to. Known here: `<tool_call>` around JSON (Hermes, Qwen 2.5 and 3, SmolLM3),
around `<function=...>` with `<parameter=...>` (Qwen3-Coder, Qwen 3.5) and around `<arg_key>` (GLM); `[TOOL_CALLS]`
(Mistral, old and new); `<|python_tag|>` and bare JSON (Llama 3); `<function=NAME>{...}</function>` (Llama 3.1);
`<|tool_call|>` (Phi-4, Granite); `<｜tool▁calls▁begin｜>` (DeepSeek V3, R1, V3.1); `call:NAME{...}` (FunctionGemma,
Gemma 4). What begins like a call and is none stays text: nothing that was said is lost.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

__all__ = ["MARKS", "Call", "CallScanner", "find_calls"]

GEMMA = {"<start_function_call>": "<escape>", "<|tool_call>": '<|"|>'}
"""What a call of FunctionGemma's or of Gemma 4's begins with, and what stands around its texts."""
DEEPSEEK = ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>")
MARKS = (
    *("<tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "<|tool_call|>", "<function="),
    *DEEPSEEK,
    *GEMMA,
)
"""What a call begins with. Bare JSON has no mark: it is a call only if it is the whole answer."""
SPECIAL = (
    *MARKS,
    *("</tool_call>", "<|/tool_call|>", "[ARGS]", "[CALL_ID]", "<|eom_id|>"),
    *("<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
    *("<end_function_call>", "<tool_call|>", *GEMMA.values()),
)
"""Some tokenizers count these as special tokens, which are not shown otherwise."""
_TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_FUNCTION = re.compile(r"<function=([\w.:/-]+)>(.*?)(?:</function>|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>(.*?)(?:</parameter>|(?=<parameter=)|\Z)", re.DOTALL)
_ARGUMENT = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
_NEW_MISTRAL = re.compile(r"\[TOOL_CALLS\]\s*([\w.:/-]+)(?:\[CALL_ID\]([\w-]+))?\s*(?:\[ARGS\])?\s*(?=\{)")
_DEEPSEEK = re.compile(
    r"<｜tool▁call▁begin｜>\s*(?:function<｜tool▁sep｜>)?([\w.:/-]+)\s*(?:<｜tool▁sep｜>)?\s*(?:```json)?\s*(?=\{)"
)
_GEMMA = re.compile(r"call:\s*([\w.:/-]+)\s*(?=\{)")
_NAME = re.compile(r"[\w.:/-]{1,200}")
"""What a tool may be called."""
_BARE = re.compile(r"[^,\]}]*")
_BLANK = re.compile(r"[\s;,]*")


@dataclass(frozen=True)
class Call:
    """One call, with its arguments as JSON."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: "call_" + secrets.token_hex(12))


Parameters = Mapping[str, Mapping[str, Any]]
"""The JSON schema of the arguments of each tool that was offered, by its name."""


def find_calls(text: str, offered: Parameters) -> tuple[str, list[Call]]:
    """What an answer says and what it calls: the text before the first call, and the calls in order.

    Where nothing that begins like a call is one, all of it is text.
    """
    at = min((i for mark in MARKS if (i := text.find(mark)) >= 0), default=-1)
    if at < 0:
        calls = [call for call in _json_calls(text.strip()) if call.name in offered]
        return ("", calls) if calls else (text, [])
    calls = _marked(text[at:], offered)
    if not calls or not all(_NAME.fullmatch(call.name) for call in calls):
        return text, []
    return text[:at].rstrip(), calls


def _written(arguments: Any) -> str:
    """Arguments as JSON; half a surrogate pair, which no encoding takes, stays escaped."""
    text = json.dumps(arguments, ensure_ascii=False)
    return text if _is_unicode(text) else json.dumps(arguments)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _marked(text: str, offered: Parameters) -> list[Call]:
    if text.startswith("<tool_call>"):
        return [call for part in _TAGGED.findall(text) for call in _tagged(part, offered)]
    if text.startswith("<function="):
        return _functions(text, offered)
    new = [
        Call(found[1], arguments, found[2]) if found[2] else Call(found[1], arguments)
        for found, arguments in _named_objects(_NEW_MISTRAL, text)
    ]
    if new:
        return new
    if text.startswith(DEEPSEEK):
        return [Call(found[1], arguments) for found, arguments in _named_objects(_DEEPSEEK, text)]
    mark = next(m for m in MARKS if text.startswith(m))
    if mark in GEMMA:
        return _gemma(text, GEMMA[mark])
    rest = text.removeprefix(mark).removesuffix("<|/tool_call|>").removesuffix("<|eom_id|>")
    return _json_calls(rest.strip())


def _tagged(part: str, offered: Parameters) -> list[Call]:
    """The inside of `<tool_call>`, in one of three forms."""
    functions = _functions(part, offered)
    if functions:
        return functions
    found = _json_calls(part.strip())
    if found:
        return found
    name = part.strip().split("<arg_key>")[0].strip()
    pairs = _ARGUMENT.findall(part)
    return [_typed(name, pairs, offered)] if re.fullmatch(r"[\w.:/-]+", name) else []


def _functions(text: str, offered: Parameters) -> list[Call]:
    calls: list[Call] = []
    for name, body in _FUNCTION.findall(text):
        whole = _object(body.strip()) if body.strip().startswith("{") else None
        if whole is not None:
            calls.append(Call(name, _written(whole)))
        else:
            calls.append(_typed(name, _PARAMETER.findall(body), offered))
    return calls


def _typed(name: str, pairs: Sequence[tuple[str, str]], offered: Parameters) -> Call:
    """A call whose arguments are texts: each becomes what its schema says, a text where that is no JSON."""
    properties: Any = offered.get(name, {}).get("properties") or {}
    arguments: dict[str, Any] = {}
    for key, given in pairs:
        value = given.removeprefix("\n").removesuffix("\n")
        kind = properties.get(key.strip(), {})
        if isinstance(kind, dict) and cast("dict[str, Any]", kind).get("type") == "string":
            arguments[key.strip()] = value
            continue
        try:
            arguments[key.strip()] = json.loads(value)
        except (ValueError, RecursionError):
            arguments[key.strip()] = value
    return Call(name, _written(arguments))


def _named_objects(name: re.Pattern[str], text: str) -> Iterator[tuple[re.Match[str], str]]:
    """Whatever gives a call its name, with the JSON object behind it."""
    decoder = json.JSONDecoder()
    for found in name.finditer(text):
        try:
            arguments, _ = decoder.raw_decode(text, found.end())
        except (ValueError, RecursionError):
            continue
        yield found, _written(arguments)


def _gemma(text: str, quote: str) -> list[Call]:
    calls: list[Call] = []
    for found in _GEMMA.finditer(text):
        try:
            arguments, _ = _gemma_value(text, found.end(), quote)
        except (ValueError, IndexError, RecursionError):
            continue
        calls.append(Call(found[1], _written(arguments)))
    return calls


def _gemma_value(text: str, at: int, quote: str) -> tuple[Any, int]:
    """A value as Gemma writes it, and where it ends: `{key:value,...}`, `[value,...]`, a text between quotes of its
    own, or anything else up to the next comma. Raises ValueError, IndexError."""
    if text.startswith(quote, at):
        end = text.index(quote, at + len(quote))
        return text[at + len(quote) : end], end + len(quote)
    if text[at] not in "{[":
        bare = cast("re.Match[str]", _BARE.match(text, at))
        try:
            return json.loads(bare[0]), bare.end()
        except ValueError:
            return bare[0].strip(), bare.end()
    pairs: list[tuple[str, Any]] = []
    ends = "}" if text[at] == "{" else "]"
    at += 1
    while text[at] != ends:
        key = ""
        if ends == "}":
            colon = text.index(":", at)
            key, at = text[at:colon].replace(quote, "").strip(), colon + 1
        value, at = _gemma_value(text, at, quote)
        pairs.append((key, value))
        at += text[at] == ","
    return (dict(pairs) if ends == "}" else [value for _, value in pairs]), at + 1


def _object(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return cast("dict[str, Any]", found) if isinstance(found, dict) else None


def _json_calls(text: str) -> list[Call]:
    """One call, a list of calls, or several one after the other; empty if anything else is in the text."""
    if not text.startswith(("{", "[")):
        return []
    decoder = json.JSONDecoder()
    calls: list[Call] = []
    at = 0
    while at < len(text):
        try:
            found, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return []
        for one in cast("list[Any]", found if isinstance(found, list) else [found]):
            call = _call(one)
            if call is None:
                return []
            calls.append(call)
        at = cast("re.Match[str]", _BLANK.match(text, at)).end()
    return calls


def _call(found: Any) -> Call | None:
    """`{"name": ..., "arguments": {...}}`, with the names that models are trained on."""
    if not isinstance(found, dict):
        return None
    given = cast("dict[str, Any]", found)
    if isinstance(given.get("function"), dict):
        given = given["function"]
    name = given.get("name")
    arguments = given.get("arguments", given.get("parameters", {}))
    if not isinstance(name, str) or not name:
        return None
    if isinstance(arguments, str):
        whole = _object(arguments)
        return Call(name, _written(whole)) if whole is not None else None
    return Call(name, _written(arguments)) if isinstance(arguments, dict) else None


class CallScanner:
    """A streamed answer: text goes on as it comes until a call may have begun; then all waits for the end."""

    def __init__(self, offered: Parameters) -> None:
        self._offered = offered
        self._sent = ""
        self._held = ""
        self._holding = False

    def feed(self, text: str) -> str:
        """The text that is no call and not the beginning of one."""
        self._held += text
        if self._holding:
            return ""
        if not self._sent.strip() and self._held.lstrip()[:1] in ("", "{", "["):
            self._holding = bool(self._held.strip())
            return ""
        at = min((i for mark in MARKS if (i := self._held.find(mark)) >= 0), default=-1)
        if at >= 0:
            self._holding = True
            out = self._held[:at].rstrip()
            self._held = self._held[len(out) :]
        else:
            kept = max((n for m in MARKS for n in range(1, len(m)) if self._held.endswith(m[:n])), default=0)
            kept = len(self._held) - len(self._held[: len(self._held) - kept].rstrip())
            out, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        self._sent += out
        return out

    def end(self) -> tuple[str, list[Call]]:
        """At the end of the answer: the text that was held back after all, and the calls."""
        text, calls = find_calls(self._held, self._offered)
        self._held = ""
        return text, calls
