"""Data sets: messages, preferences, alpaca, ShareGPT, sheets, thumbs, OASST: one row, some drafts (client).

Each reader gets a row of which its detector said that it has this shape, and the columns that it read are in
`USED`. No wanted answer is invented: an answer under a false label, or rated down, is what the model said, and
only that.
"""

from __future__ import annotations

from typing import Any, cast

from secondnature.importers.rows import Context, Draft, Refused, Turn
from secondnature.importers.turns import (
    NO_TOOLS,
    answer_text,
    as_object,
    conversation,
    prompt_turns,
    rating_of,
    split_hh,
)

RATING_COLUMNS = ("rating", "label", "kto_tag")
COMMENT_COLUMNS = ("feedback", "comment")


def _verdict(row: dict[str, Any]) -> int | None:
    """What a row says of its answer. Raises Refused: two columns that contradict each other."""
    found: set[int] = set()
    for column in RATING_COLUMNS:
        value = row.get(column)
        if isinstance(value, bool | int | float | str):
            rating = -1 if column == "label" and value in (0, "0") else rating_of(value)
            found |= {rating} if rating is not None else set()
    if len(found) > 1:
        raise Refused(f"{', '.join(c for c in RATING_COLUMNS if c in row)} say different things")
    return found.pop() if found else None


def _comment(row: dict[str, Any]) -> str | None:
    for column in COMMENT_COLUMNS:
        if isinstance(row.get(column), str) and row[column].strip():
            return row[column]
    return None


def identifier(row: dict[str, Any]) -> str | None:
    """The row's id, where it has one."""
    for key in ("id", "prompt_id", "uuid", "message_id"):
        if isinstance(row.get(key), str | int) and row[key] != "":
            return str(row[key])[:1000]
    return None


def rated(
    prompt: list[Turn], answer: str | None, rating: int | None, comment: str | None, key: str | None
) -> Draft:
    """One answer and what was thought of it: rated down, or commented on, it was said, and not wanted."""
    if answer is None:
        raise Refused("there is no answer")
    if rating is None and comment is None:
        return Draft(prompt, chosen=answer, foreign_id=key)
    wanted = answer if (rating or 0) > 0 else None
    return Draft(prompt, said=answer, chosen=wanted, rating=rating, feedback=comment, foreign_id=key)


def from_messages(row: dict[str, Any], context: Context) -> list[Draft]:
    """`messages`: one draft for each assistant turn that is taught (`weight` 0 and `train: false` are context)."""
    turns = _with_system(row, conversation(row["messages"]))
    raw = [m for m in cast("list[Any]", row["messages"]) if _counts(as_object(m))]
    taught = [_is_taught(as_object(m)) for m in raw]
    taught = [True] * (len(turns) - len(taught)) + taught
    return _each_turn(row, turns, taught, context)


def _counts(message: dict[str, Any]) -> bool:
    """Whether `conversation` made a turn of it."""
    return bool(message.get("content")) or message.get("role") not in ("system", "developer")


def _is_taught(message: dict[str, Any]) -> bool:
    return (
        message.get("weight", 1) not in (0, 0.0)
        and message.get("train") is not False
        and (message.get("training") is not False)
    )


def _with_system(row: dict[str, Any], turns: list[Turn]) -> list[Turn]:
    if row.get("tools"):
        raise Refused(NO_TOOLS)
    system = row.get("system")
    if isinstance(system, str) and system and turns[0]["role"] != "system":
        return [{"role": "system", "content": system}, *turns]
    return turns


def _each_turn(row: dict[str, Any], turns: list[Turn], taught: list[bool], context: Context) -> list[Draft]:
    rating, comment, key = _verdict(row), _comment(row), identifier(row)
    places = [
        i for i, t in enumerate(turns)
        if t["role"] == "assistant" and t["content"] and i > 0 and turns[i - 1]["role"] != "assistant"
    ]  # fmt: skip
    if not places:
        raise Refused("no turn of the assistant that answers somebody")
    if rating is not None or comment is not None:
        if turns[-1]["role"] != "assistant":
            raise Refused("a rating, and the last turn is not the assistant's")
        return [rated(turns[:-1], turns[-1]["content"] or None, rating, comment, key)]
    if context.options.turns == "last":
        context.pass_over("earlier turns of the assistant (--turns last)", len(places) - 1)
        places = places[-1:]
    left = [i for i in places if taught[i]]
    context.pass_over("turns that the file marks as not to be trained", len(places) - len(left))
    return [Draft(turns[:i], chosen=turns[i]["content"], foreign_id=key) for i in left]


def from_sharegpt(row: dict[str, Any], context: Context) -> list[Draft]:
    """`conversations` of `from` and `value`, with `chosen` and `rejected` or without."""
    turns = _with_system(row, conversation(row["conversations"], role="from", content="value"))
    if "chosen" in row or "rejected" in row:
        return [_pair(turns, row)]
    return _each_turn(row, turns, [True] * len(turns), context)


def _pair(prompt: list[Turn], row: dict[str, Any]) -> Draft:
    chosen, rejected = answer_text(row.get("chosen")), answer_text(row.get("rejected"))
    if chosen is None and rejected is None:
        raise Refused("neither `chosen` nor `rejected` has text")
    if chosen is None:
        raise Refused("a rejected answer without a wanted one")
    if chosen == rejected:
        raise Refused("`chosen` and `rejected` are the same")
    rating = _verdict(row)
    if rating is not None and (rating > 0 or rejected is None):
        raise Refused("a rating beside `chosen`: of which answer? Call what the model said `said`")
    comment, key = _comment(row), identifier(row)
    return Draft(prompt, chosen=chosen, rejected=rejected, feedback=comment, rating=rating, foreign_id=key)


def from_preference(row: dict[str, Any], context: Context) -> list[Draft]:
    """`chosen` and `rejected`, each an answer or the whole conversation; `prompt` or none."""
    del context
    if row.get("tools"):
        raise Refused(NO_TOOLS)
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if _is_list(chosen) and _is_list(rejected) and max(len(chosen), len(rejected)) > 1:  # pyright: ignore[reportArgumentType]
        return [_whole_pair(conversation(chosen), conversation(rejected), row)]
    prompt = next((row[k] for k in ("prompt", "input", "question", "instruction") if row.get(k)), None)
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        if "\n\nHuman:" in "\n\n" + chosen.lstrip()[:8]:
            return [_whole_pair(split_hh(chosen), split_hh(rejected), row)]
        raise Refused("no prompt, and the answers are no transcripts: what was asked is not known")
    if prompt is None:
        raise Refused("no prompt")
    return [_pair(_with_system(row, prompt_turns(prompt)), row)]


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _whole_pair(chosen: list[Turn], rejected: list[Turn], row: dict[str, Any]) -> Draft:
    """Two conversations that differ in the last turn only."""
    if not chosen or not rejected or chosen[:-1] != rejected[:-1]:
        raise Refused("`chosen` and `rejected` differ before the last turn: not two answers to one prompt")
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant" or len(chosen) < 2:
        raise Refused("`chosen` or `rejected` does not end with the assistant's answer")
    pair = {**row, "chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"]}
    return _pair(_with_system(row, chosen[:-1]), pair)


def from_completion(row: dict[str, Any], context: Context) -> list[Draft]:
    """`prompt` and `completion`, with `label`, `rating` or `feedback` or without."""
    del context
    prompt = _with_system(row, prompt_turns(row["prompt"]))
    return [rated(prompt, answer_text(row["completion"]), _verdict(row), _comment(row), identifier(row))]


def from_own(row: dict[str, Any], context: Context) -> list[Draft]:
    """This project's own records: taken as they are."""
    del context
    return [Draft(prompt=[], whole=row)]


def from_alpaca(row: dict[str, Any], context: Context) -> list[Draft]:
    """`instruction`, `input`, `output`, `system`, `history`; or `chosen` and `rejected`; or `kto_tag`."""
    del context
    asked = "\n".join(str(row[k]) for k in ("instruction", "input") if row.get(k))
    turns: list[Turn] = []
    for pair in cast("list[Any]", row.get("history") or []):
        if not isinstance(pair, list) or len(cast("list[Any]", pair)) != 2:
            raise Refused("`history` is not a list of [question, answer]")
        question, answer = cast("list[Any]", pair)
        turns += [{"role": "user", "content": str(question)}, {"role": "assistant", "content": str(answer)}]
    prompt = _with_system(row, [*turns, *prompt_turns(asked)])
    if "chosen" in row or "rejected" in row:
        return [_pair(prompt, row)]
    return [rated(prompt, answer_text(row.get("output")), _verdict(row), _comment(row), identifier(row))]


def from_openai_preference(row: dict[str, Any], context: Context) -> list[Draft]:
    """`input.messages`, `preferred_output`, `non_preferred_output` (OpenAI, Together, Fireworks)."""
    del context
    asked = as_object(row["input"])
    if asked.get("tools"):
        raise Refused(NO_TOOLS)
    pair = {"chosen": row["preferred_output"], "rejected": row["non_preferred_output"], "id": row.get("id")}
    return [_pair(conversation(asked.get("messages")), pair)]


def from_rejected_response(row: dict[str, Any], context: Context) -> list[Draft]:
    """`messages` whose last turn is wanted, and `rejected_response` (ms-swift)."""
    del context
    turns = _with_system(row, conversation(row["messages"]))
    if turns[-1]["role"] != "assistant":
        raise Refused("`messages` does not end with the assistant's answer")
    pair = {**row, "chosen": turns[-1]["content"], "rejected": row["rejected_response"]}
    return [_pair(turns[:-1], pair)]


def from_oasst(row: dict[str, Any], context: Context) -> list[Draft]:
    """A tree of OpenAssistant: at each question the best-ranked answer against the worst."""
    found: list[Draft] = []
    waiting: list[tuple[list[Turn], dict[str, Any]]] = [([], as_object(row["prompt"]))]
    while waiting:
        path, node = waiting.pop()
        here = [*path, *conversation([node], content="text")]
        replies = [as_object(r) for r in cast("list[Any]", node.get("replies") or [])]
        waiting += [(here, r) for r in reversed(replies)]
        ranked = sorted(
            (r for r in replies if isinstance(r.get("rank"), int | float) and not r.get("deleted")),
            key=lambda r: float(r["rank"]),
        )
        if here[-1]["role"] == "user" and len(ranked) > 1:
            pair = {"chosen": ranked[0].get("text"), "rejected": ranked[-1].get("text")}
            found.append(_pair(here, {**pair, "id": node.get("message_id")}))
        elif here[-1]["role"] == "user" and replies:
            context.pass_over("answers without a second, ranked one")
    return found


PROMPT_NAMES = ("prompt", "question", "instruction", "user", "input", "query", "ask")
ANSWER_NAMES = (
    "answer",
    "output",
    "response",
    "model answer",
    "model_answer",
    "said",
    "bot",
    "reply",
    "completion",
)
WANTED_NAMES = ("correction", "corrected", "correct answer", "correct_answer", "expected", "wanted", "chosen",
                "ideal", "better answer", "better_answer", "edited", "corrected answer")  # fmt: skip
NOTE_NAMES = ("comment", "comments", "feedback", "note", "notes", "reason", "why")
RATE_NAMES = ("rating", "label", "thumb", "thumbs", "vote", "kto_tag")
MEANINGS = {
    **dict.fromkeys(PROMPT_NAMES, "prompt"), **dict.fromkeys(ANSWER_NAMES, "said"),
    **dict.fromkeys(WANTED_NAMES, "chosen"), **dict.fromkeys(NOTE_NAMES, "feedback"),
    **dict.fromkeys(RATE_NAMES, "rating"), "rejected": "rejected", "system": "system", "id": "id",
}  # fmt: skip
"""Columns of a sheet, in lower case -> what they mean."""


def columns_of(row: dict[str, Any], mapped: dict[str, str]) -> dict[str, str]:
    """Field -> the column of a sheet that holds it; `mapped` (of --map) comes first."""
    found = {meaning: column for column, meaning in mapped.items() if column in row}
    for column in row:
        meaning = MEANINGS.get(column.strip().lower())
        if meaning is not None and column not in mapped:
            found.setdefault(meaning, column)
    return found


def from_sheet(row: dict[str, Any], context: Context) -> list[Draft]:
    """A table's row: what was asked, answered, wanted, said about it, each in a column of its own."""
    where = columns_of(row, context.options.columns)
    cell = {meaning: row[column] for meaning, column in where.items() if row[column] not in (None, "")}
    if "prompt" not in cell:
        raise Refused(f"the column {where.get('prompt', '`prompt`')} is empty: what was asked is not known")
    prompt = _with_system({"system": cell.get("system")}, prompt_turns(cell["prompt"]))
    said, chosen = answer_text(cell.get("said")), answer_text(cell.get("chosen"))
    rejected, rating = answer_text(cell.get("rejected")), rating_of(cell.get("rating"))
    comment, key = cell.get("feedback"), cell.get("id")
    key = str(key) if key is not None else None
    if chosen is None and rejected is None and "chosen" not in where:
        return [rated(prompt, said, rating, comment, key)]
    if chosen is None and comment is None and rating is None:
        raise Refused("no wanted answer, no comment and no rating in this row")
    if chosen is None and (rating or 0) > 0:
        chosen = said
    if (
        chosen is not None
        and (rating or 0) < 0
        and said is None
        and rejected is None
        and where["chosen"] == "chosen"
    ):
        raise Refused("a wanted answer that is rated down: if the model said it, --map chosen=said")
    return [Draft(prompt, said, chosen, rejected, str(comment) if comment is not None else None, rating, key)]
