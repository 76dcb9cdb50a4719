"""The pages that people read, and the blocks of code in them: what is run, and what is not and why."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
REFERENCE = sorted((ROOT / "docs" / "reference").glob("*.md"))
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "decisions").glob("*.md")),
    *sorted((ROOT / "docs" / "experiments").glob("*.md")),
]
VLLMS_OWN = frozenset({"--max-model-len"})
"""Options of vLLM that pages show behind `secondnature serve --engine vllm`, which passes them on."""
_BLOCK = re.compile(
    r"(?:<!-- not run: (?P<why>[^>]+?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    language: str
    text: str
    not_run: str | None
    """Why it is not executed; None: it is."""


def blocks(page: Path) -> list[Block]:
    """The fenced blocks, in order."""
    return [Block(m["language"], m["text"], m["why"]) for m in _BLOCK.finditer(page.read_text())]


def name_of(page: Path) -> str:
    """The page's path, for the names of tests."""
    return str(page.relative_to(ROOT))
