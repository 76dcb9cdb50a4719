"""Every shape that is read: how it is recognised by its content, and who reads it (client).

A detector looks at one row and says what it saw. The shape that most of a file's first rows have is the file's;
where two have as many, nothing is guessed: the candidates are named, and `--format` chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from secondnature.importers import agents, datasets, traces, trees
from secondnature.importers.rows import Context, Draft, Row
from secondnature.importers.turns import as_object
from secondnature.records import Correction

__all__ = ["BY_NAME", "OWN_FIELDS", "SHAPES", "Shape", "not_taught"]

Rowwise = Callable[[dict[str, Any], Context], list[Draft]]
Whole = Callable[[Iterator[Row], Context], Iterator[Draft | Row]]


@dataclass(frozen=True)
class Shape:
    """One shape."""

    name: str
    title: str
    sees: Callable[[Any], bool]
    """Whether a row has it."""
    row: Rowwise | None = None
    whole: Whole | None = None
    """For logs: all rows in their order."""
    kind: str = "written"
    """Of provenance."""
    used: frozenset[str] = frozenset()
    """Columns that are read; others are named once. Empty: a format of its own, in which nothing is named."""


def _first_of(row: dict[str, Any], column: str) -> dict[str, Any]:
    """The first object of a list."""
    found = row.get(column)
    items = cast("list[Any]", found) if isinstance(found, list) else []
    return as_object(items[0]) if items else {}


def _messages_of(row: dict[str, Any]) -> dict[str, Any]:
    return _first_of(row, "messages")


def _first_key(row: dict[str, Any], column: str, key: str) -> bool:
    return key in _first_of(row, column)


OWN_ONLY = {
    "said",
    "behaviour",
    "provenance",
    "completion_id",
    "weights_version",
    "schema_version",
    "finish_reason",
}


OWN_FIELDS = frozenset(Correction.model_fields) | {"label", "messages", "completion", "schema_version"}


def _is_own(row: dict[str, Any]) -> bool:
    return "prompt" in row and bool(OWN_ONLY & row.keys()) and not isinstance(row["prompt"], dict)


def _is_messages(row: dict[str, Any]) -> bool:
    plain = not {"chosen", "rejected", "rejected_response", "prompt"} & row.keys()
    return plain and "role" in _messages_of(row) and "messageId" not in _messages_of(row)


def _is_preference(row: dict[str, Any]) -> bool:
    others = {"conversations", "instruction", "rejected_response", "completion"} & row.keys()
    pair = "chosen" in row and ("rejected" in row or isinstance(row.get("prompt"), list))
    return pair and not others and not _is_own(row)


def _is_completion(row: dict[str, Any]) -> bool:
    return {"prompt", "completion"} <= row.keys() and "chosen" not in row and not _is_own(row)


def _is_alpaca(row: dict[str, Any]) -> bool:
    return "instruction" in row and bool({"output", "chosen", "rejected"} & row.keys())


def _is_phoenix(row: dict[str, Any]) -> bool:
    marks = ("llm.", "input.value", "output.value", "openinference.")
    names = [*row, *(f"attributes.{k}" for k in traces.flat(row.get("attributes")))]
    return any(n.removeprefix("attributes.").startswith(marks) for n in names if n.startswith("attributes."))


def _is_otel(row: dict[str, Any]) -> bool:
    attributes = row.get("attributes")
    if isinstance(attributes, list):
        return any(str(as_object(a).get("key")).startswith("gen_ai.") for a in cast("list[Any]", attributes))
    return any(k == "gen_ai" or k.startswith("gen_ai.") for k in as_object(attributes))


def _is_claude_code(row: dict[str, Any]) -> bool:
    spoken = "sessionId" in row and isinstance(row.get("type"), str)
    return (spoken and "payload" not in row) or (row.get("type") == "summary" and "leafUuid" in row)


def _is_codex(row: dict[str, Any]) -> bool:
    if isinstance(row.get("payload"), dict):
        return row.get("type") in ("session_meta", "response_item", "event_msg", "turn_context", "compacted")
    if row.get("record_type") == "state" or (
        row.get("type") == "message" and isinstance(row.get("content"), list)
    ):
        return True
    return {"id", "timestamp", "instructions"} <= row.keys() or row.get("type") in (
        "function_call", "function_call_output", "reasoning",
    )  # fmt: skip


def _is_claude(row: dict[str, Any]) -> bool:
    return isinstance(row.get("chat_messages"), list)


def _is_vote(row: dict[str, Any]) -> bool:
    return {"rating", "conversation_id"} <= row.keys() and not {
        "prompt",
        "messages",
        "data",
        "mapping",
    } & row.keys()


def _is_sheet(row: dict[str, Any]) -> bool:
    columns = datasets.columns_of(row, {})
    told = {"said", "chosen", "rejected", "feedback"} & columns.keys()
    return "prompt" in columns and bool(told) and not any(isinstance(v, dict | list) for v in row.values())


_RATED = frozenset(
    {*datasets.RATING_COLUMNS, *datasets.COMMENT_COLUMNS, "system", "id", "prompt_id", "uuid", "tools",
     "chat_template_kwargs"}
)  # fmt: skip
_PAIR = frozenset({"chosen", "rejected", "prompt", "input", "question"}) | _RATED
SHAPES = (
    Shape("corrections", "this project's own records", _is_own, datasets.from_own, used=OWN_FIELDS),
    Shape(
        "messages",
        "conversations (`messages`)",
        _is_messages,
        datasets.from_messages,
        used=_RATED | {"messages"},
    ),
    Shape(
        "preference",
        "preferences (`chosen` and `rejected`)",
        _is_preference,
        datasets.from_preference,
        used=_PAIR | {"messages"},
    ),
    Shape(
        "completion",
        "`prompt` and `completion`",
        _is_completion,
        datasets.from_completion,
        used=_RATED | {"prompt", "completion"},
    ),
    Shape(
        "alpaca",
        "alpaca (`instruction` and `output`)",
        _is_alpaca,
        datasets.from_alpaca,
        used=_PAIR | {"instruction", "output", "history"},
    ),
    Shape(
        "sharegpt",
        "ShareGPT (`conversations`)",
        lambda r: _first_key(r, "conversations", "from"),
        datasets.from_sharegpt,
        used=_PAIR | {"conversations"},
    ),
    Shape(
        "openai-preference",
        "OpenAI's preferences",
        lambda r: {"input", "preferred_output", "non_preferred_output"} <= r.keys(),
        datasets.from_openai_preference,
        used=frozenset({"input", "preferred_output", "non_preferred_output", "id"}),
    ),
    Shape(
        "ms-swift",
        "ms-swift (`messages` and `rejected_response`)",
        lambda r: {"messages", "rejected_response"} <= r.keys(),
        datasets.from_rejected_response,
        used=_RATED | {"messages", "rejected_response"},
    ),
    Shape(
        "oasst",
        "OpenAssistant's trees",
        lambda r: "replies" in as_object(r.get("prompt")),
        datasets.from_oasst,
    ),
    Shape(
        "langfuse",
        "Langfuse's observations with scores",
        lambda r: (
            {"input", "output"} <= r.keys()
            and (
                isinstance(r.get("scores"), list)
                or "correctedOutput" in r
                or bool({"trace_id", "traceId"} & r.keys())
            )
        ),
        traces.from_langfuse,
        kind="observed",
    ),
    Shape(
        "langfuse-scores",
        "Langfuse's scores",
        lambda r: (
            bool({"trace_id", "traceId"} & r.keys())
            and bool({"data_type", "dataType"} & r.keys())
            and "name" in r
        ),
        traces.read_judgement,
        kind="observed",
    ),
    Shape(
        "langsmith",
        "LangSmith's runs",
        lambda r: (
            {"inputs", "outputs"} <= r.keys() and bool({"run_type", "feedback", "feedback_stats"} & r.keys())
        ),
        traces.from_langsmith,
        kind="observed",
    ),
    Shape(
        "langsmith-feedback",
        "LangSmith's feedback",
        lambda r: {"run_id", "key"} <= r.keys() and bool({"score", "correction", "comment"} & r.keys()),
        traces.read_judgement,
        kind="observed",
    ),
    Shape("phoenix", "Phoenix's spans", _is_phoenix, traces.from_phoenix, kind="observed"),
    Shape(
        "helicone",
        "Helicone's requests",
        lambda r: (
            bool({"request_body", "request"} & r.keys())
            and bool({"response_body", "response"} & r.keys())
            and "prompt" not in r
        ),
        traces.from_helicone,
        kind="observed",
    ),
    Shape("otel", "OpenTelemetry's GenAI spans", _is_otel, traces.from_otel, kind="observed"),
    Shape(
        "promptfoo",
        "promptfoo's results",
        lambda r: (
            {"prompt", "response"} <= r.keys() and bool({"success", "gradingResult", "pass"} & r.keys())
        ),
        traces.from_promptfoo,
        kind="observed",
    ),
    Shape(
        "lm-eval",
        "lm-eval's samples",
        lambda r: {"doc", "arguments", "resps"} <= r.keys(),
        traces.from_lm_eval,
        kind="observed",
    ),
    Shape(
        "chatgpt",
        "ChatGPT's conversations",
        lambda r: isinstance(r.get("mapping"), dict),
        trees.from_chatgpt,
        kind="observed",
    ),
    Shape("chatgpt-feedback", "ChatGPT's message_feedback.json", _is_vote, trees.read_vote, kind="observed"),
    Shape(
        "open-webui-feedback",
        "Open WebUI's feedback",
        lambda r: isinstance(r.get("data"), dict) and "meta" in r,
        trees.from_open_webui_feedback,
        kind="observed",
    ),
    Shape(
        "open-webui-chats",
        "Open WebUI's chats",
        lambda r: "history" in as_object(r.get("chat")) and "data" not in r,
        trees.from_open_webui_chat,
        kind="observed",
    ),
    Shape(
        "librechat",
        "LibreChat's conversations",
        lambda r: "messageId" in _messages_of(r),
        trees.from_librechat,
        kind="observed",
    ),
    Shape("claude", "Claude's conversations", _is_claude, trees.from_claude, kind="observed"),
    Shape(
        "claude-code",
        "a session of Claude Code",
        _is_claude_code,
        whole=agents.read_claude_code,
        kind="observed",
    ),
    Shape("codex", "a session of Codex", _is_codex, whole=agents.read_codex, kind="observed"),
    Shape(
        "aider",
        "a chat history of aider",
        lambda r: isinstance(r, str),
        whole=agents.read_aider,
        kind="observed",
    ),
    Shape("sheet", "a table with named columns", _is_sheet, datasets.from_sheet),
)
"""In the order of the documentation; `sheet` counts only where no other does."""
BY_NAME = {shape.name: shape for shape in SHAPES}


def not_taught(row: Any) -> tuple[str, str] | None:
    """(What a row is that is known and cannot become a correction, what to do with it); None: it is not known."""
    keys = as_object(row).keys()
    if "input_ids" in keys:
        return "tokenised examples (`input_ids`)", "send them as `examples` of POST /v1/train"
    if "segments" in keys:
        return "axolotl's input_output (`segments`)", "send token ids as `examples` of POST /v1/train"
    if {"prompt", "completions"} <= keys:
        return "stepwise supervision (`completions`), which judges steps, not answers", "give whole answers"
    if "parent_id" in keys and "role" in keys:
        return "OpenAssistant's single messages", "give its trees (the file `..._trees.jsonl.gz`)"
    if "text" in keys and not {"prompt", "messages"} & keys:
        return "plain text (`text`): nobody answers anybody in it", "split it into `prompt` and `completion`"
    if "prompt" in keys and not {"chosen", "rejected", "completion"} & keys:
        return (
            "prompts without answers",
            "`secondnature learn --replay-prompts` takes them, against forgetting",
        )
    return None
