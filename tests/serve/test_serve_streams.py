"""0 failed requests, 0 pauses: clients stream during a whole lesson and its undo."""

from __future__ import annotations

import math
import threading
from typing import Any

from tiny_server import KEY, Running, teach

from secondnature.wire import Client


class Listener(threading.Thread):
    """A client that streams one answer after another until told to stop."""

    def __init__(self, url: str, number: int) -> None:
        super().__init__()
        self.url, self.number = url, number
        self.ending = threading.Event()
        self.answers: list[dict[str, Any]] = []
        self.logprobs: list[float] = []
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            with Client(self.url, KEY, timeout_s=60) as client:
                while not self.ending.is_set():
                    self.listen(client)
        except BaseException as e:  # noqa: BLE001  (the test's thread raises it)
            self.failure = e

    def listen(self, client: Client) -> None:
        message = [{"role": "user", "content": "Say iron. " * (1 + self.number)}]
        last: dict[str, Any] = {}
        options = {"max_tokens": 40, "temperature": 1.0, "seed": self.number, "logprobs": True}
        for last in client.chat_stream(message, **options):
            for choice in last["choices"]:
                tokens = (choice["logprobs"] or {}).get("content") or []
                self.logprobs += [t["logprob"] for t in tokens]
        self.answers.append(last)


def test_no_request_fails_during_a_lesson_and_its_undo(server: Running) -> None:
    before = server.state()
    listeners = [Listener(server.url, i) for i in range(4)]
    for listener in listeners:
        listener.start()
    try:
        lesson = server.lesson(teach(max_steps=12))
        assert lesson.state == "on_trial"
        counts = [len(x.answers) for x in listeners]
        server.client.revert(lesson.id)
        while any(len(x.answers) < n + 3 and x.is_alive() for x, n in zip(listeners, counts, strict=True)):
            listeners[0].join(0.05)
    finally:
        for listener in listeners:
            listener.ending.set()
        for listener in listeners:
            listener.join()

    assert [x.failure for x in listeners] == [None] * 4
    answers = [a for x in listeners for a in x.answers]
    assert all(a["choices"][0]["finish_reason"] in ("stop", "length") for a in answers)
    assert all(math.isfinite(p) and p <= 0 for x in listeners for p in x.logprobs)
    names = {a["weights_version"] for a in answers}
    spans = [a["weights_span"] for a in answers]
    assert all(s["first_epoch"] <= s["last_epoch"] for s in spans)
    assert any(a["trial"] for a in answers)
    assert any(s["changed"] for s in spans)
    assert any(str(v).startswith(f"{before[1]}+{lesson.number:04d}.") for v in names)  # while it was writing
    assert lesson.version in names  # on trial
    assert (answers[-1]["weights_version"], answers[-1]["trial"]) == (before[1], False)  # after the undo
    assert server.state() == before
