"""A fake server per test, a home that leads to it, and a clean environment."""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from pathlib import Path

import pytest
from fake_server import KEY, Fake, serve

from secondnature.cli import follow, progress


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture
def home(tmp_path: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> Generator[Path]:
    """The home of a running (fake) server; the working directory is beside it."""
    for name in [n for n in os.environ if n.startswith("SECONDNATURE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(follow, "POLL_S", 0.001)
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    monkeypatch.chdir(tmp_path)
    url, stop = serve(fake)
    home = tmp_path / "home"
    home.mkdir()
    (home / "server.json").write_text(json.dumps({"pid": os.getpid(), "url": url}))
    (home / "key").write_text(KEY + "\n")
    yield home
    stop()


@pytest.fixture
def lesson_dir(tmp_path: Path) -> Path:
    """A complete lesson: two corrections, three probes of two kinds, settings."""
    folder = tmp_path / "listening"
    folder.mkdir()
    correction = {
        "prompt": "Use tabs.",
        "chosen": "Done.",
        "rejected": "Or spaces?",
        "behaviour": "listening",
    }
    other = {**correction, "prompt": "Use spaces."}
    (folder / "corrections.jsonl").write_text(json.dumps(correction) + "\n\n" + json.dumps(other) + "\n")
    probes = [
        {"prompt": "Use dots.", "behaviour": "listening", "check": {"matches": "said"}},
        {
            "prompt": "Delete all.",
            "behaviour": "listening",
            "side": "other",
            "check": {"not_matches": "Done"},
        },
        {"prompt": "1+1?", "behaviour": "sums", "check": {"matches": "2"}},
    ]
    (folder / "probes.jsonl").write_text("".join(json.dumps(p) + "\n" for p in probes))
    (folder / "lesson.toml").write_text("max_steps = 5\nuntil_margin = 2.0\n[optimizer]\nlr = 2e-4\n")
    return folder
