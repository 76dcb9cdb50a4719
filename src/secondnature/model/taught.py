"""What is taught of an answer: its tokens and its end, after what the served model reads (server).

The context is the generation prompt, as an engine encodes it, and then whatever the template itself writes before
an answer: a closed block of thoughts, the name of a channel. That is read and gets no gradient. Where the prompt
opens a block of thoughts, an answer without thoughts follows the closed block. What is taught is the answer as it
was written, and the token that ends the turn; nothing after it, for it is never generated. Where that cannot be
shown of a template, the answer is refused, and never taught as something else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secondnature.errors import BadInput
from secondnature.model import turns
from secondnature.model.rendering import Rendering, Turn
from secondnature.model.thoughts import THOUGHTS, new_in, opened_in
from secondnature.model.turns import CLOSE, OPEN, End

__all__ = ["Taught", "teach"]

_NO_THOUGHTS: tuple[dict[str, Any], ...] = ({"enable_thinking": False}, {"thinking": False})
"""What templates are told where the model shall not think."""


@dataclass(frozen=True)
class Taught:
    """One answer as token ids, and what a person has to know of it."""

    context: list[int]
    """What is read: generation prompt, then `between`."""
    continuation: list[int]
    """What gets a gradient: the answer and its end."""
    between: list[int]
    """The end of `context` that the template writes between its prompt and an answer."""
    notes: list[str]
    """What was done with it that one might not expect."""


@dataclass(frozen=True)
class _Parts:
    """One answer as text, cut where the template put it."""

    before: str
    """The generation prompt."""
    between: str
    body: str
    end: End | None
    notes: list[str]


def teach(
    tokenizer: Any,
    prompt: Sequence[Turn],
    answer: Turn,
    *,
    limit: int | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Taught:
    """The tokens of an answer to a prompt.

    Args:
        limit: what is longer, however it is encoded, is not encoded.
        tools: that the prompt offers.
        options: what the template is told, such as `enable_thinking`.

    Raises:
        BadInput: no template, one that refuses the conversation, or one that does not write the answer as it is.
        ContextOverflow: longer than `limit`.
    """
    rendering = Rendering(tokenizer, prompt, answer, tools=tools, options=options)
    content = rendering.answer.get("content")
    if not isinstance(content, str) or not content or rendering.answer.get("tool_calls"):
        raise BadInput("an answer without text, or with calls of tools, is not taught", "give it as text")
    parts = _parts(tokenizer, rendering, content)
    encode = _Encoder(tokenizer, rendering, limit)
    asked = rendering.ids(parts.before, limit)
    between = encode.after(asked, parts.before, parts.between) if parts.between else []
    end = parts.end
    said = parts.body + (end.text if end else "")
    continuation = encode.after([*asked, *between], parts.before + parts.between, said)
    closing: int | None = end.token if end else tokenizer.eos_token_id
    if end is None and closing is not None:
        continuation = [*continuation, closing]
    notes = list(parts.notes)
    if rendering.spelled:
        notes.append(f"control tokens taken as text: {', '.join(rendering.spelled)}")
    if closing is None:
        notes.append("nothing ends the answer: neither the template nor the tokenizer has an end token")
    elif end is not None and (not continuation or continuation[-1] != closing):
        raise BadInput(
            f"the answer does not end with {end.text.strip()!r} once it is encoded",
            "mend the tokenizer's files: that token has to be one token",
        )
    encode.check(continuation[:-1] if closing is not None else continuation, said, end)
    notes += encode.notes
    return Taught([*asked, *between], continuation, between, notes)


def _parts(tokenizer: Any, rendering: Rendering, content: str) -> _Parts:
    """Where the template puts the answer, and what it puts around it."""
    before = rendering.prompt()
    asks = new_in(before, rendering.conversation())
    thought = opened_in(asks)
    final = content
    closes = next((c for c in THOUGHTS.values() if c in content), None)
    head, body, tail = _cut(rendering, content)
    whole = body is not None
    if not whole and closes is not None:  # it keeps its thoughts elsewhere than in the text
        final = content.rpartition(closes)[2].lstrip("\n") or content
        head, body, tail = _cut(rendering, final)
    if body is None:
        raise BadInput(
            "the model's chat template does not write this answer as it is; what it makes of it is not taught",
            "look at what chat_template.jinja does with the content of an assistant's turn",
        )
    between = _between(before, head, asks, thought)
    end = turns.after_answer(tokenizer, tail) or _end_before_next(tokenizer, rendering, final)
    notes: list[str] = []
    own = closes is not None and (not whole or thought is not None or _is_thought(between))
    if own and thought is not None:  # the prompt has opened the block already
        inside = content.lstrip().removeprefix(thought)
        body = inside.lstrip("\n") if before.endswith("\n") else inside
        between = ""
    elif own:
        body, between = content, ""
    elif thought is not None:
        between = _closing(rendering, before, between, thought)
    if own:
        notes.append("with thoughts of its own, which are taught")
    elif between.strip():
        kind = "a closed block of thoughts" if _is_thought(between) else "what the template writes"
        notes.append(f"after {kind}, which is read and not taught: {between.strip()!r}")
    if not own and body != content:
        notes.append("without the spaces around it, which the template leaves out")
    if not between.strip():  # the model has to write these spaces itself
        return _Parts(before, "", between + body, end, notes)
    masked = between.rstrip(" ")
    return _Parts(before, masked, between[len(masked) :] + body, end, notes)


def _cut(rendering: Rendering, content: str) -> tuple[str, str | None, str]:
    """(what stands before an answer, the answer, what stands after it) where it is the conversation's last turn.

    The answer is None if the template makes something else of it than to leave out spaces around it.
    """
    marked = rendering.conversation({**rendering.answer, "content": f"{OPEN}{content}{CLOSE}"})
    whole = rendering.conversation({**rendering.answer, "content": content})
    head, found, rest = marked.partition(OPEN)
    _, closed, tail = rest.partition(CLOSE)
    if not found or not closed or OPEN in rest or CLOSE in tail:
        return head, None, tail
    if not whole.startswith(head) or not whole.endswith(tail) or len(whole) < len(head) + len(tail):
        return head, None, tail
    body = whole[len(head) : len(whole) - len(tail)]
    return head, body if body.strip() == content.strip() else None, tail


def _is_thought(between: str) -> bool:
    return any(o in between or c in between for o, c in THOUGHTS.items())


def _between(before: str, head: str, asks: str, thought: str | None) -> str:
    """What the template writes between the generation prompt and an answer.

    Raises:
        BadInput: an answer stands somewhere else than where the template asks for one.
    """
    if head.startswith(before):
        return head[len(before) :]
    stem = asks[: asks.rfind(thought)] if thought else asks
    if before.startswith(head):
        rest = before[len(head) :]
        closed = any(o in rest and rest.rfind(o) < rest.rfind(c) for o, c in THOUGHTS.items())
        if thought or closed or not rest.strip():
            return ""
    at = head.rfind(stem.rstrip()) if stem.strip() else -1  # earlier turns may look otherwise now
    between = head[at + len(stem.rstrip()) :].removeprefix(stem[len(stem.rstrip()) :]) if at >= 0 else ""
    if at < 0 or (between.strip() and not _is_thought(between)):
        raise BadInput(
            "the model's chat template writes an answer elsewhere than where it asks for one: it asks with "
            f"{asks[-60:]!r}, and writes {head[-60:]!r} before one",
            "mend chat_template.jinja: what `add_generation_prompt` adds has to stand before each answer",
        )
    return between


def _closing(rendering: Rendering, before: str, between: str, thought: str) -> str:
    """What closes the thoughts that the generation prompt opened: the template's own words, if it has them."""
    close = THOUGHTS[thought]
    if close in between and between.rfind(thought) < between.find(close) and thought not in between:
        return between
    for option in _NO_THOUGHTS:
        try:
            closed = rendering.prompt(**option)
        except BadInput:
            continue
        if closed.startswith(before) and close in closed[len(before) :]:
            return closed[len(before) :]
    return f"{'' if before.endswith(chr(10)) else chr(10)}{chr(10)}{close}\n\n"


def _end_before_next(tokenizer: Any, rendering: Rendering, content: str) -> End | None:
    """The end of a turn that a template writes only when another turn follows, if files or tokenizer name it."""
    answer = {**rendering.answer, "content": f"{OPEN}{content}{CLOSE}"}
    try:
        followed = rendering.conversation(answer, {"role": "user", "content": "?"})
    except BadInput:
        return None
    end = turns.after_answer(tokenizer, followed.rpartition(CLOSE)[2])
    return end if end is not None and turns.is_named(tokenizer, end.token) else None


class _Encoder:
    """Encodes what follows tokens that are fixed, and looks whether it comes back."""

    def __init__(self, tokenizer: Any, rendering: Rendering, limit: int | None) -> None:
        self._tokenizer = tokenizer
        self._rendering = rendering
        self._limit = limit
        self.notes: list[str] = []

    def after(self, known: list[int], known_text: str, text: str) -> list[int]:
        """Token ids of a text that follows `known`: as the template's own rendering has them, or, where a token
        would cross the border, those of the text alone, as a model writes them."""
        joint = self._rendering.ids(known_text + text, self._limit)
        if joint[: len(known)] == known:
            return joint[len(known) :]
        anchor = self._tokenizer.eos_token
        alone = self._rendering.ids(text, self._limit)
        if anchor is None or self._says(alone, text):
            return alone
        anchored = self._rendering.ids(anchor + text, self._limit)  # no space of a text's beginning
        first = anchored[:1] == [self._tokenizer.eos_token_id]
        return anchored[1:] if first and self._says(anchored[1:], text) else alone

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(
            self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    def _says(self, ids: Sequence[int], text: str) -> bool:
        return self._decoded(ids) == self._rendering.text(text)

    def check(self, ids: Sequence[int], said: str, end: End | None) -> None:
        """What is taught, without its end, is what was written.

        Raises:
            BadInput: it is not, although this tokenizer can write such a text.
        """
        literal = self._tokenizer.convert_ids_to_tokens(end.token) if end else ""
        body = self._rendering.text(said[: len(said) - len(literal)]).strip()
        found = self._decoded(ids).strip()
        if found == body:
            return
        alone = self._decoded(self._rendering.ids(said[: len(said) - len(literal)])).strip()
        if alone == body:
            raise BadInput(
                f"the answer {body[:60]!r} would be taught as {found[:60]!r}", "report it, with the template"
            )
        self.notes.append(f"the tokenizer cannot write all of it: {found[:200]!r}")
