"""`secondnature chat`: talk to the model; `/no WHAT I WANTED` records a correction (process D).

Answers are streamed and greedy (temperature 0), the way probes are asked, so that what was learned can be seen.
Works on a terminal (with line editing) and on piped input. After `/no` the conversation goes on as if the model had
said what was wanted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from secondnature.cli.connect import Server, Where, open_server
from secondnature.cli.output import Output
from secondnature.errors import ContextOverflow, SecondnatureError, Unreachable
from secondnature.wire import FeedbackRequest

MAX_TOKENS = 512
"""Of an answer; where the model reads fewer, the server's own limit."""
HELP = """\
/no TEXT    the last answer was wrong; TEXT is what you wanted instead
/why TEXT   say what was wrong with the last answer, in your own words
/good       the last answer was right
/learn      how to teach what you have recorded
/new        start a new conversation
/help       this list
/quit       leave (or ctrl-D)"""


def chat(where: Where, out: Output) -> int:
    """The conversation, until `/quit` or the end of the input; the exit code."""
    with open_server(where, out) as server:
        if sys.stdin.isatty():
            import readline  # noqa: F401  # pyright: ignore[reportUnusedImport]  # line editing for input()

            out.note(
                f"{server.health.model}, weights {server.health.weights_version}; /help for the commands"
            )
        talk = Conversation(server, out)
        for line in _lines():
            if line == "/quit":
                break
            try:
                talk.take(line)
            except Unreachable:
                raise
            except SecondnatureError as e:
                out.note(f"{e.type}: {e}", style="bold red")
    return 0


def _lines() -> Iterator[str]:
    """What the user types, without empty lines."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if line:
            yield line


class Conversation:
    """The turns so far, and the last answer's id."""

    def __init__(self, server: Server, out: Output) -> None:
        self._server = server
        self._out = out
        self._turns: list[dict[str, str]] = []
        self._last: str | None = None

    def take(self, line: str) -> None:
        """One line of the user: a command, or something for the model."""
        word, _, text = line.partition(" ")
        if not word.startswith("/"):
            self._say(line)
        elif word in ("/no", "/why", "/good"):
            self._feedback(word, text.strip())
        elif word == "/learn":
            self._out.say(f"in another terminal: {self._server.command('learn')}")
        elif word == "/new":
            self._turns, self._last = [], None
        else:
            self._out.say(HELP)

    def _say(self, text: str) -> None:
        turns = [*self._turns, {"role": "user", "content": text}]
        answer, completion, version, trial = "", None, None, False
        try:
            for chunk in self._chunks(turns):
                completion = chunk.get("id", completion)
                version, trial = chunk.get("weights_version") or version, bool(chunk.get("trial", trial))
                for choice in chunk.get("choices", []):
                    piece = choice.get("delta", {}).get("content") or ""
                    answer += piece
                    self._out.say(piece, end="")
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            self._out.say("")
            if completion is None or not answer:
                self._out.note("stopped; there is no answer")
                return
            self._out.note("stopped; /no and /why are about what it said so far")
            self._turns, self._last = [*turns, {"role": "assistant", "content": answer}], completion
            return
        self._out.say("")
        self._out.note(f"[weights {version}{', on trial' if trial else ''}]", style="dim")
        self._turns, self._last = [*turns, {"role": "assistant", "content": answer}], completion

    def _chunks(self, turns: list[dict[str, str]]) -> Iterator[dict[str, Any]]:
        try:
            yield from self._server.client.chat_stream(turns, temperature=0, max_tokens=MAX_TOKENS)
        except ContextOverflow:  # refused before the first chunk
            yield from self._server.client.chat_stream(turns, temperature=0)

    def _feedback(self, word: str, text: str) -> None:
        if self._last is None:
            self._out.note("nothing to correct yet: ask something first")
            return
        if word != "/good" and not text:
            self._out.note(
                f"{word} needs a text: {word} {'WHAT I WANTED' if word == '/no' else 'WHAT WAS WRONG'}"
            )
            return
        said = {
            "/no": {"rating": -1, "corrected": text},
            "/why": {"rating": -1, "text": text},
            "/good": {"rating": 1},
        }
        reply = self._server.client.feedback(
            FeedbackRequest.model_validate({"completion_id": self._last, **said[word]})
        )
        if word == "/no":
            self._turns[-1] = {"role": "assistant", "content": text}
        self._out.note(
            f"recorded as {reply.id}" + ("" if word == "/good" else "; /learn says how to teach it")
        )
