"""What is shown of how far a lesson is: by a real server, without a terminal and with one."""

from __future__ import annotations

import io
import re
import time
from collections import defaultdict
from pathlib import Path

import pytest
from rich.console import Console
from tiny_server import KEY, LOW_GATE, WORDS, Running, say_probes, teach, use_probes

from secondnature.cli import follow, main, progress
from secondnature.cli.output import Output
from secondnature.records import Probe
from secondnature.wire import PhaseProgress

TAUGHT = ["tea", "oak", "red", "kite"]
LINE = re.compile(r"(?P<phase>[^:]+): (?P<done>[\d,]+)/(?P<total>[\d,]+) (?P<unit>\w+)(?P<rest>.*)")


def code_probes(words: list[str]) -> list[Probe]:
    """Guards whose answers are run: none of them passes, before and after."""
    found = [
        {"prompt": f"Say {w} in code.", "behaviour": "code", "check": {"python": f"assert said == {w!r}"}}
        for w in words
    ]
    return [Probe.model_validate(p) for p in found]


def test_every_phase_of_a_lesson_is_counted_in_plain_lines(
    server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SECONDNATURE_API_KEY", KEY)
    monkeypatch.setattr(follow, "POLL_S", 0.01)
    monkeypatch.setattr(progress, "EVERY_S", 0.02)
    held = [w for w in WORDS if w not in TAUGHT]
    probes = [*use_probes(held), *say_probes(held), *code_probes(held)]
    request = teach(TAUGHT, probes=probes, gate=LOW_GATE, development=[], max_steps=12)
    file = tmp_path / "lesson.json"
    file.write_text(request.model_dump_json(exclude_none=True))
    code = main(["train", str(file), "--url", server.url])
    captured = capsys.readouterr()
    if code == 0:
        server.client.revert(server.client.lessons().lessons[-1].id)

    lines = captured.err.splitlines()
    counts: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for line in lines:
        found = LINE.fullmatch(line)
        if found:
            counts[found["phase"]].append((int(found["done"].replace(",", "")), found["rest"]))
    for phase in ("measuring before", "training", "writing down the change", "measuring after"):
        said = [line for line in lines if line.startswith(f"{phase}: ")]
        if phase != "writing down the change" or said:  # which may be over between two looks
            assert any(" done in " in line for line in said), (phase, lines)
    for phase in ("measuring before", "training", "measuring after"):
        assert [line for line in lines if line.startswith(phase)][1].startswith(f"{phase}: "), lines
        done = [n for n, _ in counts[phase]]
        assert done == sorted(done), lines
        assert len(set(done)) >= 2, lines
        assert all("about" in rest and "left" in rest for _, rest in counts[phase][1:]), lines
    assert f"measuring before: {len(probes)} probes done in " in captured.err
    assert "training stopped after 12 steps: all steps that were asked for were made" in captured.err
    assert "trained: 12 steps, then all steps that were asked for were made" in captured.out


def test_lines_are_few_and_looks_between_steps_end_no_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with progress.display(Output()) as shown:
        for step in range(1, 1001):
            shown.show("training", PhaseProgress(done=step, total=1000, unit="steps", per_s=1, eta_s=9))
            shown.show("looking at development probes", PhaseProgress(done=1, total=9, unit="probes"))
            clock[0] += 1.0
        shown.show("measuring the KL", PhaseProgress(done=0, total=3, unit="prompts"))
        clock[0] += 30.0
        shown.show("measuring the KL", PhaseProgress(done=1, total=3, unit="prompts", per_s=1 / 30, eta_s=60))
        shown.show("judging", None)
        for _ in range(600):
            clock[0] += 1.0
            shown.show("judging", None)
    lines = capsys.readouterr().err.splitlines()
    training = [line for line in lines if line.startswith("training")]
    assert not [line for line in lines if line.startswith("looking")]
    assert training[0] == "training: 1,000 steps"
    assert training[-1] == "training: 1,000 steps done in 17 min"
    assert 16 <= len(training) <= 20, training  # one in 60 s, although a tenth takes 100
    assert lines[lines.index(training[-1]) + 1 :][:3] == [
        "measuring the KL: 3 prompts",
        "measuring the KL: 1/3 prompts, 30 s each, about 60 s left",
        "measuring the KL: 3 prompts done in 30 s",
    ]
    judging = [line for line in lines if line.startswith("judging")]
    assert judging[:3] == ["judging", "judging: 5.0 s so far", "judging: 15 s so far"]
    assert judging[-1] == "judging done in 10 min"
    assert len(judging) < 20


def test_a_terminal_sees_each_phase_as_a_bar_that_fills() -> None:
    out = Output()
    out.err = Console(file=io.StringIO(), force_terminal=True, width=100, record=True)
    with progress.display(out) as shown:
        for done in (0, 150):
            shown.show(
                "measuring before", PhaseProgress(done=done, total=300, unit="probes", per_s=5, eta_s=30)
            )
        shown._progress.refresh()  # pyright: ignore
        bar = out.err.export_text(clear=False).splitlines()[-1]
        shown.show("training", PhaseProgress(done=1, total=4, unit="steps"), ", loss 0.5")
    text = out.err.export_text()
    assert "measuring before" in bar
    assert "150/300 probes, 5/s, about 30 s left" in bar
    assert "measuring before: 300 probes done in" in text
