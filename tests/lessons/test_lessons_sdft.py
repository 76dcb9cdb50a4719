"""Self-distillation on the embedded model, through the server: six comments change what it does elsewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tiny_server import running

from secondnature.records import Correction, Probe, read_jsonl
from secondnature.wire import TrainRequest

LISTENING = Path(__file__).parents[2] / "examples" / "listening"


@pytest.mark.slow
def test_comments_without_a_written_answer_teach_the_behaviour(tmp_path: Path) -> None:
    """Held-out directions are taken afterwards, wrong ones still refused; nobody said what the answer should be."""
    rows = [json.loads(line) for line in (LISTENING / "corrections.jsonl").read_text().splitlines()]
    comments = [Correction.model_validate({k: v for k, v in r.items() if k != "chosen"}) for r in rows]
    assert all(c.chosen is None and c.feedback for c in comments)
    probes = [p for p in read_jsonl(LISTENING / "probes.jsonl", Probe) if p.behaviour == "listening"]
    sides = {side: [p for p in probes if p.side == side][::4] for side in ("right", "other")}
    with running(tmp_path / "home", Path("embedded")) as server:

        def passed() -> dict[str, int]:
            found: dict[str, int] = {}
            for side, asked in sides.items():
                assert len(asked) == 30
                said = [server.client.chat([m.model_dump() for m in p.prompt], temperature=0) for p in asked]
                texts = [str(s["choices"][0]["message"]["content"]) for s in said]
                found[side] = sum(
                    p.check.matches is not None and re.search(p.check.matches, t) is not None
                    for p, t in zip(asked, texts, strict=True)
                )
            return found

        before = passed()
        request = {
            "corrections": comments,
            "objective": "sdft",
            "sdft": {"samples": 1},
            "batch_size": 6,
            "max_steps": 40,
            "until_passed": 0.9,
            "development": read_jsonl(LISTENING / "development.jsonl", Probe),
            "replay": {"share": 0.0},
            "optimizer": {"lr": 3e-4},
        }
        lesson = server.lesson(TrainRequest.model_validate(request), "on_trial")
        after = passed()
        assert before == {"right": 0, "other": 30}
        assert after["right"] >= 24, after
        assert after["other"] >= 28, after
        assert lesson.stopped_by == "until_passed"
        assert lesson.kl["new"] > 0.1
        server.client.revert(lesson.id)
