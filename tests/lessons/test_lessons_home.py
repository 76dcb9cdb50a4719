"""The home belongs to one model, and its lessons to one engine's weights."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path

import pytest

from secondnature.errors import BadCheckpoint, HomeInUse
from secondnature.lessons.home import Home


@pytest.fixture
def home(tmp_path: Path) -> Generator[Home]:
    found = Home(tmp_path / "home")
    yield found
    found.close()


MODEL = Path("/models/one")


def test_the_same_model_may_come_back(home: Home) -> None:
    for _ in range(2):
        home.bind(MODEL, "print", "wone", "vllm")
    known = json.loads((home.path / "home.json").read_text())
    assert known == {"model": str(MODEL), "fingerprint": "print", "base_version": "wone", "engine": "vllm"}


def test_another_engine_with_other_bytes_is_told_what_to_do(home: Home) -> None:
    home.bind(MODEL, "print", "wbf16", "local")
    with pytest.raises(BadCheckpoint, match=r"of the local engine.*other dtypes.*vllm engine") as caught:
        home.bind(MODEL, "print", "wfp32", "vllm")
    assert "--engine local" in caught.value.hint
    assert f"{home.model_root}/current" in caught.value.hint


def test_another_engine_with_the_same_bytes_is_welcome(home: Home) -> None:
    """A dense model is bf16 in both: its lessons are the same differences of the same bytes."""
    home.bind(MODEL, "print", "wone", "local")
    home.bind(MODEL, "print", "wone", "vllm")


def test_a_home_of_an_older_version_is_the_local_engines(home: Home) -> None:
    old = {"model": str(MODEL), "fingerprint": "print", "base_version": "wone"}
    (home.path / "home.json").write_text(json.dumps(old))
    home.bind(MODEL, "print", "wone")
    with pytest.raises(BadCheckpoint, match="of the local engine"):
        home.bind(MODEL, "print", "wtwo", "vllm")


@pytest.mark.parametrize(
    ("fingerprint", "version", "what"), [("other", "wone", "architecture"), ("print", "wtwo", "weights")]
)
def test_another_model_is_refused(home: Home, fingerprint: str, version: str, what: str) -> None:
    home.bind(MODEL, "print", "wone")
    with pytest.raises(BadCheckpoint, match=f"its {what}"):
        home.bind(MODEL, fingerprint, version)


def test_a_second_server_is_refused_until_the_first_one_ends(home: Home) -> None:
    home.announce("http://127.0.0.1:1")
    with pytest.raises(HomeInUse, match=r"in use by another server \(process \d+, http://127\.0\.0\.1:1\)"):
        Home(home.path)
    home.close()
    Home(home.path).close()
