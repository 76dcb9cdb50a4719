"""What tools of observability and evaluation keep: traces with judgements, failed tests (client).

Langfuse, LangSmith, Phoenix, Helicone, OpenTelemetry; promptfoo, lm-eval. Langfuse's corrected output and
LangSmith's `feedback.correction` are this project's record in other words: the output is what was said, the
correction what was wanted, the comment what was said about it. A trace that nobody judged is passed over and
counted.
"""

from __future__ import annotations

import json
from typing import Any, cast

from secondnature.importers.rows import Context, Draft, Refused, Turn
from secondnature.importers.turns import (
    answer_text,
    as_object,
    conversation,
    prompt_turns,
    rating_of,
    text_of,
)

UNJUDGED = "traces without a judgement"


def _list(value: Any) -> list[Any]:
    return cast("list[Any]", value) if isinstance(value, list) else []


def _decoded(value: Any) -> Any:
    """A value, or the JSON that a text holds."""
    if isinstance(value, str) and value[:1] in "[{":
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _asked(value: Any) -> list[Turn]:
    """The input of a trace: text, messages, or an object around them."""
    value = _decoded(value)
    inner = as_object(value)
    for key in ("messages", "input", "prompt", "question", "text", "query"):
        if inner.get(key):
            value = inner[key]
            break
    if isinstance(value, list) and len(cast("list[Any]", value)) == 1 and isinstance(value[0], list):
        value = cast("Any", value[0])  # LangChain: a batch of one conversation
    if isinstance(value, list):
        value = [_plain_message(m) for m in cast("list[Any]", value)]
    return prompt_turns(value)


LANGCHAIN = {"human": "user", "ai": "assistant", "system": "system"}


def _plain_message(value: Any) -> Any:
    """LangChain's messages have `type`, or their fields under `kwargs` or `data`."""
    message = as_object(value)
    inner = as_object(message.get("kwargs") or message.get("data"))
    kind = str(inner.get("type") or message.get("type") or "")
    if inner and not kind.islower():
        kind = str(_list(message.get("id"))[-1:] or [""])[2:-2].removesuffix("Message").lower()
    if "role" not in message and kind in LANGCHAIN:
        return {"role": LANGCHAIN[kind], "content": inner.get("content", message.get("content"))}
    return message


def _answered(value: Any) -> str | None:
    """The output of a trace: text, a message, choices, or an object around them."""
    value = _decoded(value)
    for _ in range(4):
        inner = as_object(value)
        if "role" in inner or not inner:
            break
        for key in (
            "choices",
            "generations",
            "output",
            "answer",
            "content",
            "text",
            "message",
            "response",
            "messages",
        ):
            if inner.get(key):
                value = inner[key]
                break
        else:
            break
        if isinstance(value, list) and value and key in ("choices", "generations", "messages"):
            items = cast("list[Any]", value)
            value = items[0] if key == "choices" else items[-1]
            if isinstance(value, list) and value:
                value = cast("Any", value[0])
            if "message" in as_object(value) and key == "choices":
                value = as_object(value)["message"]
    return answer_text([_plain_message(value)] if isinstance(value, dict) else value)


def _judged(
    row: dict[str, Any], context: Context, said: Any, asked: Any, *, wanted: str | None, rating: int | None,
    comments: list[str], key: Any,
) -> list[Draft]:  # fmt: skip
    """A trace with what was thought of it."""
    del row
    comment = "\n".join(c for c in comments if c.strip()) or None
    if wanted is None and rating is None and comment is None:
        context.pass_over(UNJUDGED)
        return []
    answer = _answered(said)
    if wanted is None and (rating or 0) > 0:
        wanted = answer
    if wanted is not None and wanted == answer and rating is None:
        rating = 1
    return [Draft(_asked(asked), answer, wanted, None, comment, rating, str(key) if key else None)]


def from_langfuse(row: dict[str, Any], context: Context) -> list[Draft]:
    """An observation or trace with its scores; the score CORRECTION is the corrected output."""
    wanted, rating, comments = None, None, list[str]()
    others = context.judgements_of(row.get("id"))
    if (
        _either(row, "parent_observation_id", "parentObservationId") is None
    ):  # the root, which stands for the trace
        others = [*others, *context.judgements_of(_either(row, "trace_id", "traceId"))]
    for one in [*_list(row.get("scores")), *others]:
        score = as_object(one)
        name = str(score.get("name", "")).lower()
        value = _either(score, "stringValue", "string_value")
        if value is None:
            value = score.get("value")
        kind = str(_either(score, "dataType", "data_type")).upper()
        if kind == "CORRECTION" or name in ("correction", "output"):
            corrected = _either(score, "longStringValue", "long_string_value") or value
            wanted = _answered(corrected) if corrected is not None else None
        elif name in ("thumbs", "user-feedback", "user_feedback", "user-thumbs", "feedback", "user-rating"):
            low = kind == "BOOLEAN" and score.get("value") in (0, "0", False)
            rating = -1 if low else rating_of(value)
        if isinstance(score.get("comment"), str):
            comments.append(score["comment"])
    corrected = row.get("correctedOutput", row.get("corrected_output"))
    wanted = _answered(corrected) if corrected is not None else wanted
    return _judged(
        row, context, row.get("output"), row.get("input"),
        wanted=wanted, rating=rating, comments=comments, key=row.get("id"),
    )  # fmt: skip


def _either(row: dict[str, Any], *names: str) -> Any:
    """The first of these fields that says something."""
    return next((row[n] for n in names if row.get(n) not in (None, "")), None)


def read_judgement(row: dict[str, Any], context: Context) -> list[Draft]:
    """A line of Langfuse's scores or of LangSmith's feedback: noted for the trace that it belongs to."""
    about = _either(row, "observation_id", "observationId", "run_id") or _either(row, "trace_id", "traceId")
    if about is None:
        raise Refused("a judgement that does not say of what")
    context.judgements.setdefault(str(about), []).append(row)
    return []


def from_langsmith(row: dict[str, Any], context: Context) -> list[Draft]:
    """A run with its feedback: `correction` is what was wanted."""
    wanted, rating, comments = None, None, list[str]()
    feedback = row.get("feedback")
    given = _list(feedback) or ([feedback] if isinstance(feedback, dict) else [])
    for one in [*given, *context.judgements_of(row.get("id"))]:
        said = as_object(one)
        if said.get("correction"):
            wanted = _answered(said["correction"])
        elif said.get("score") is not None:
            low = said["score"] in (0, 0.0, False)
            rating = -1 if low else rating_of(said["score"])
        if isinstance(said.get("comment"), str):
            comments.append(said["comment"])
    return _judged(
        row, context, row.get("outputs"), row.get("inputs"),
        wanted=wanted, rating=rating, comments=comments, key=row.get("id"),
    )  # fmt: skip


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested objects as one object of dotted names."""
    found: dict[str, Any] = {}
    for key, inner in as_object(value).items():
        name = f"{prefix}{key}"
        if isinstance(inner, dict):
            found |= flat(inner, name + ".")
        found[name] = inner
    return found


def _phoenix_messages(value: Any) -> list[Any]:
    found: list[Any] = []
    for one in _list(_decoded(value)):
        message = as_object(one)
        message = as_object(message.get("message", message))
        role, content = message.get("message.role"), message.get("message.content")
        found.append({"role": role, "content": content} if role else message)
    return found


def from_phoenix(row: dict[str, Any], context: Context) -> list[Draft]:
    """A span with annotations: `label`, `score`, `explanation`; an annotation `correction` says what was wanted."""
    names = flat(row)

    def get(key: str) -> Any:
        return names.get("attributes." + key, names.get(key))

    asked = _phoenix_messages(get("llm.input_messages")) or get("input.value")
    answers = _phoenix_messages(get("llm.output_messages"))
    said = answers[-1] if answers else get("output.value")
    wanted, rating, comments = None, None, list[str]()
    for one in _list(row.get("annotations") or row.get("span_annotations")):
        note = as_object(one)
        result = as_object(note.get("result")) or note
        if str(note.get("name", "")).lower() in ("correction", "corrected", "corrected_output"):
            wanted = answer_text(result.get("explanation") or result.get("label"))
            continue
        label, score = result.get("label"), result.get("score")
        if str(label).lower() in ("correct", "incorrect"):
            rating = 1 if str(label).lower() == "correct" else -1
        elif label is not None or score is not None:
            rating = rating_of(label) if label is not None else -1 if score in (0, -1) else rating_of(score)
        if isinstance(result.get("explanation"), str):
            comments.append(result["explanation"])
    key = names.get("context.span_id", names.get("span_id", row.get("id")))
    return _judged(row, context, said, asked, wanted=wanted, rating=rating, comments=comments, key=key)


def from_helicone(row: dict[str, Any], context: Context) -> list[Draft]:
    """A request with its response, and the user's thumb."""
    feedback = row.get("feedback_rating")
    if feedback is None:
        feedback = as_object(row.get("feedback")).get("rating", row.get("rating"))
    comment = as_object(row.get("properties") or row.get("request_properties")).get("comment")
    return _judged(
        row, context,
        row.get("response_body", row.get("response")), row.get("request_body", row.get("request")),
        wanted=None, rating=rating_of(feedback), comments=[comment] if isinstance(comment, str) else [],
        key=row.get("request_id", row.get("id")),
    )  # fmt: skip


def from_otel(row: dict[str, Any], context: Context) -> list[Draft]:
    """A span of OpenTelemetry's GenAI conventions with `gen_ai.evaluation.result` events."""
    names = flat(row.get("attributes")) | _listed_attributes(row.get("attributes"))
    system = names.get("gen_ai.system_instructions")
    asked = conversation(_decoded(names.get("gen_ai.input.messages")))
    if system:
        asked = [{"role": "system", "content": text_of(_decoded(system))}, *asked]
    answers = _list(_decoded(names.get("gen_ai.output.messages")))
    said = conversation(answers[:1])[0]["content"] if answers else None
    rating, comments = None, list[str]()
    for one in _list(row.get("events")):
        event = as_object(one)
        about = flat(event.get("attributes")) | _listed_attributes(event.get("attributes"))
        if event.get("name") == "gen_ai.evaluation.result":
            label = about.get("gen_ai.evaluation.score.label")
            score = about.get("gen_ai.evaluation.score.value")
            low = score is not None and float(score) <= 0
            rating = _label(label) if label is not None else -1 if low else rating_of(score)
            if isinstance(about.get("gen_ai.evaluation.explanation"), str):
                comments.append(about["gen_ai.evaluation.explanation"])
    key = row.get("span_id", row.get("spanId"))
    return _judged(row, context, said, asked, wanted=None, rating=rating, comments=comments, key=key)


def _label(label: Any) -> int | None:
    word = str(label).lower()
    return {"fail": -1, "incorrect": -1, "pass": 1, "correct": 1}.get(word) or rating_of(label)


def _listed_attributes(value: Any) -> dict[str, Any]:
    """OTLP's JSON: `[{"key": ..., "value": {"stringValue": ...}}]`."""
    found: dict[str, Any] = {}
    for one in _list(value):
        item = as_object(one)
        inner = as_object(item.get("value"))
        found[str(item.get("key"))] = next(iter(inner.values()), None) if inner else item.get("value")
    return found


def from_promptfoo(row: dict[str, Any], context: Context) -> list[Draft]:
    """A failed test: the output was said; an `equals` says what was wanted, the grader's reason what was wrong."""
    if row.get("success") is not False and row.get("pass") is not False:
        context.pass_over("evaluations that passed")
        return []
    prompt = row["prompt"]
    asked = _decoded(prompt if isinstance(prompt, str) else as_object(prompt).get("raw"))
    asserts = _list(row.get("assert")) or _list(as_object(row.get("testCase")).get("assert"))
    equal = [as_object(a).get("value") for a in asserts if as_object(a).get("type") == "equals"]
    wanted = equal[0] if equal and isinstance(equal[0], str) else None
    said = _answered(row.get("response"))
    reason = as_object(row.get("gradingResult")).get("reason")
    if said is None:
        raise Refused("a failed test without an output: the provider failed, not the model")
    comment = reason if isinstance(reason, str) and reason and wanted is None else None
    key = row.get("id")
    return [Draft(prompt_turns(asked), said, wanted, None, comment, -1, str(key) if key else None)]


def from_lm_eval(row: dict[str, Any], context: Context) -> list[Draft]:
    """A generated answer that missed a target that is text; multiple choice has no answer to teach."""
    arguments = row["arguments"]
    first = as_object(arguments).get("gen_args_0", arguments)
    pairs = _list(first)
    asked: Any = as_object(first).get("arg_0") if not pairs else (_list(pairs[0]) or [None])[0]
    answers = _list(
        row.get("resps") or row.get("filtered_resps")
    )  # what was said, not what a filter found in it
    said = answers[0] if answers else None
    while isinstance(said, list) and said:
        said = cast("Any", said[0])
    target = row.get("target")
    if not isinstance(said, str) or not isinstance(target, str) or not isinstance(asked, str):
        raise Refused("no generated answer with a target that is text (multiple choice?)")
    scores = [
        row[k]
        for k in ("exact_match", "acc", "em", "pass@1", "contains")
        if isinstance(row.get(k), int | float)
    ]
    if not scores:
        raise Refused("no score that says whether the answer was right (exact_match, acc)")
    if max(scores) > 0:
        context.pass_over("evaluations that passed")
        return []
    wanted = answer_text(target)
    return [
        Draft(
            prompt_turns(_decoded(asked)),
            answer_text(said),
            wanted,
            None,
            None,
            None,
            str(row.get("doc_id", "")) or None,
        )
    ]
