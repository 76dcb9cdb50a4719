"""Logs of coding agents: Claude Code, Codex, aider: what the user said to a wrong answer (client).

Of a session only the words of the user and of the assistant are read: tools, reasoning, side chains and what
the program put into the user's mouth are left out. An answer to which the user objects becomes a candidate,
with the objection as `feedback`; nobody says in a log what would have been right, so nothing is wanted yet.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

from secondnature.importers.objections import objects
from secondnature.importers.rows import Context, Draft, Place, Row, Turn
from secondnature.importers.turns import as_object

MAX_TURNS = 200
PUT_THERE = ("<environment_context>", "<user_instructions>", "# AGENTS.md", "<INSTRUCTIONS>", "<command-",
             "<local-command", "<system-reminder>", "Caveat: ", "[Request interrupted", "<turn_aborted>",
             "<permissions", "<bash-", "<user-memory-input>", "This session is being continued")  # fmt: skip
"""How a turn begins that the program wrote, not the user."""
NOT_SPOKEN = ("isMeta", "isCompactSummary", "isVisibleInTranscriptOnly", "isApiErrorMessage", "toolUseResult")
"""Marks of Claude Code's events that nobody said."""


WRAPPED = re.compile(r"<([a-z][\w-]*)[ >].*</\1>", re.DOTALL)
"""A turn that is one element of markup: whatever its name, the program made it."""


@dataclass(frozen=True, slots=True)
class Said:
    """A turn, and what came before it."""

    before: Said | None
    role: str
    text: str


@dataclass
class Session:
    """One session so far; an answer in pieces is one turn."""

    id: str | None = None
    end: Said | None = None
    """The last turn."""
    after: dict[str, Said | None] = field(default_factory=dict[str, "Said | None"])
    """The last turn after each event, by its id: who goes back and asks anew begins a branch."""
    linked: bool = False
    """Events name those before them."""

    def follow(self, parent: Any) -> None:
        """Go on after an event; None: from the beginning, in a session whose events name those before them."""
        if isinstance(parent, str) and parent in self.after:
            self.end, self.linked = self.after[parent], True
        elif parent is None and self.linked:
            self.end = None

    def hear(self, text: str, place: Place, key: str | None = None) -> Iterator[Draft]:
        """The user's turn; a candidate if it objects to the answer before it."""
        text = text.strip()
        if not text or text.startswith(PUT_THERE) or WRAPPED.fullmatch(text):
            return
        answer = self.end
        if answer is not None and answer.role == "assistant" and answer.before is not None and objects(text):
            yield Draft(
                self._turns(answer.before), answer.text, feedback=text, candidate=True, place=place,
                foreign_id=key or self.id,
            )  # fmt: skip
        self._add("user", text)

    def say(self, text: str) -> None:
        """The assistant's words."""
        if text.strip():
            self._add("assistant", text.strip())

    def take_back(self, num_turns: int) -> None:
        """The user's last turns, and all that was said after them, count no more."""
        while self.end is not None and num_turns > 0:
            num_turns -= self.end.role == "user"
            self.end = self.end.before

    def _turns(self, end: Said | None) -> list[Turn]:
        found: list[Turn] = []
        while end is not None and len(found) < MAX_TURNS:
            found.append({"role": end.role, "content": end.text})
            end = end.before
        return found[::-1]

    def _add(self, role: str, text: str) -> None:
        end = self.end
        if end is not None and end.role == role:
            self.end = Said(end.before, role, end.text + "\n\n" + text)
        elif end is not None or role == "user":  # else an answer to nobody: the log begins in the middle
            self.end = Said(end, role, text)


def _texts(content: Any, kinds: tuple[str, ...] = ("text", "input_text", "output_text")) -> str:
    if isinstance(content, str):
        return content
    pieces = [as_object(p) for p in cast("list[Any]", content)] if isinstance(content, list) else []
    return "\n\n".join(str(p.get("text", "")) for p in pieces if p.get("type") in kinds and p.get("text"))


def read_claude_code(rows: Iterator[Row], context: Context) -> Iterator[Draft | Row]:
    """A transcript of Claude Code (~/.claude/projects/*/*.jsonl): one event a line, each with the one before it."""
    sessions: dict[str, Session] = {}
    for row in rows:
        event = as_object(row.value)
        if row.problem or not event:
            yield row if row.problem else Row(row.place, problem="not an event of a session")
            continue
        name = str(event.get("sessionId", ""))
        session = sessions.setdefault(name, Session(name or None))
        if event.get("isSidechain"):
            context.pass_over("turns of side chains")
            continue
        session.follow(event.get("parentUuid"))
        message = as_object(event.get("message"))
        spoken = not any(event.get(mark) for mark in NOT_SPOKEN) and message.get("model") != "<synthetic>"
        by_hand = as_object(event.get("origin")).get("kind", "human") == "human"
        key = str(event["uuid"]) if event.get("uuid") else None
        if event.get("type") == "user" and spoken and by_hand:
            yield from session.hear(_texts(message.get("content")), row.place, key)
        elif event.get("type") == "assistant" and spoken:
            session.say(_texts(message.get("content")))
        if key is not None:
            session.after[key] = session.end


def read_codex(rows: Iterator[Row], context: Context) -> Iterator[Draft | Row]:
    """A rollout of Codex (~/.codex/sessions): `response_item` events, or the items themselves (older versions)."""
    session = Session()
    for row in rows:
        event = as_object(row.value)
        if row.problem or not event:
            yield row if row.problem else Row(row.place, problem="not an event of a session")
            continue
        item = as_object(event.get("payload")) or event
        if event.get("type") == "session_meta":
            session.id = str(item.get("id") or "") or None
        elif item.get("type") == "message" and event.get("type") in ("response_item", "message"):
            text = _texts(item.get("content"))
            if item.get("role") == "user":
                key = f"{session.id}:{row.place.number}" if session.id else None
                yield from session.hear(text, row.place, key)
            elif item.get("role") == "assistant":
                session.say(text)
        elif item.get("type") == "thread_rolled_back" and isinstance(item.get("num_turns"), int):
            session.take_back(item["num_turns"])
        elif event.get("type") == "compacted":
            context.pass_over("beginnings of sessions that the agent summed up", session.end is not None)
            session.end = None


_AIDER_START = re.compile(r"^# aider chat started at (.*)$")


def read_aider(rows: Iterator[Row], context: Context) -> Iterator[Draft | Row]:
    """`.aider.chat.history.md`: `####` begins the user's lines, `>` the program's, the rest is the answer."""
    del context
    for row in rows:
        if row.problem or not isinstance(row.value, str):
            yield row if row.problem else Row(row.place, problem="not a chat history of aider")
            continue
        session, answer, asked, asked_at, fenced = Session(), list[str](), list[str](), 1, False
        for number, line in enumerate([*row.value.splitlines(), "# aider chat started at the end"], start=1):
            start = _AIDER_START.match(line)
            user = line.startswith("#### ") and not fenced
            if asked and not user and line.strip():
                yield from session.hear("\n".join(asked), Place(row.place.source, asked_at))
                asked = []
            if start:
                session, answer, fenced = Session(start[1]), [], False
            elif user:
                session.say("\n".join(answer))
                answer = []
                asked_at = asked_at if asked else number
                if not line.startswith("#### /"):  # a command of aider, not a request
                    asked.append(line.removeprefix("#### ").rstrip())
            elif not line.startswith("> ") or fenced:
                fenced ^= line.startswith("```")
                answer.append(line)
