"""Development probes whose answers are checked: the serving engine is asked while the trainer stands between steps.

On the tiny talker: "Use x." learns to be answered "Done.", "Say x." is the other side.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny_server import Running, correction, running, say_probes, teach, use_probes, wait_for

from secondnature.engines.generation import GenerationResult
from secondnature.lessons import trained
from secondnature.lessons.prober import Prober
from secondnature.records import STOPPED_BY, LookMetric, Probe
from secondnature.wire import JobStatus

TAUGHT = ["tea", "oak", "red", "kite"]
ASKED = ["mud", "ink", "jam", "hats", "gold", "foam"]


def probe(text: str, check: dict[str, Any], side: str = "right", **fields: Any) -> Probe:
    return Probe.model_validate(
        {"prompt": text, "behaviour": "use", "check": check, "side": side, **fields}
    )


def development() -> list[Probe]:
    """Six of each side, by text checks of every kind that the engine can answer."""
    right = [probe(f"Use {w}.", {"matches": "(?i)^done"}, max_tokens=8) for w in ASKED[:4]]
    right += [probe(f"Use {w}.", {"not_matches": "Why"}) for w in ASKED[4:]]
    return right + [probe(f"Say {w}.", {"matches": f"^{w}!"}, "other") for w in ASKED]


def looks(server: Running, lesson: str) -> list[LookMetric]:
    metrics = server.client.lesson(lesson).metrics
    return [LookMetric.model_validate(m) for m in metrics if m["kind"] == "look"]


def test_it_stops_where_the_answers_pass(server: Running) -> None:
    """At the first look at which they do; though the answer that is taught is never the greedy one there.

    "Done, as you like it." is taught; a look that reads the answers token by token sees that it is not given yet.
    """
    wordy = "Done now."
    spoken = [probe(f"Use {w}.", {"matches": "(?i)^d"}) for w in ASKED]
    written = [probe(f"Use {w}.", {"prefers": [wordy, "Why not ink?"]}) for w in ASKED]
    fields: dict[str, Any] = {
        "corrections": [correction(w, wordy) for w in TAUGHT],
        "max_steps": 40,
        "optimizer": {"lr": 1e-3},
    }
    lesson = server.lesson(teach(**fields, development=spoken, until_passed=0.8))
    assert (lesson.state, lesson.stopped_by) == ("on_trial", "until_passed"), lesson
    seen = looks(server, lesson.id)
    assert [x.step for x in seen] == list(range(lesson.steps + 1))
    shares = [x.passed["right"] for x in seen]
    assert all(s is not None and s < 0.8 for s in shares[:-1])
    assert (shares[-1] or 0) >= 0.8
    assert seen[-1].asked == {"right": len(ASKED)}
    answers = {a.probe: a for a in seen[-1].answers}
    assert len(answers) == len(ASKED)
    for i, word in enumerate(ASKED):  # the weights are those of the last look
        assert server.say(f"Use {word}.").startswith(answers[i].answer)
        assert answers[i].passed == server.say(f"Use {word}.").lower().startswith("d")
    server.client.revert(lesson.id)
    token_by_token = server.lesson(teach(**fields, development=written, until_passed=0.8))
    assert token_by_token.steps > lesson.steps
    server.client.revert(token_by_token.id)
