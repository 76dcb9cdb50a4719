"""Breaks each law on purpose and sees the tests turn red: `python tests/mutants/run.py [NAME...]`.

A mutant is a small diff with two lines above it: what it breaks, and the tests that must notice. Each is applied
to a copy of the tree, and only its tests are run there. A mutant that survives, a patch that no longer applies, or
tests that cannot even start, end this with status 1. Run it where the tests pass: it does not tell red from red.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATCHES = Path(__file__).resolve().parent
COPIED = ("src", "tests", "examples", "docs", "pyproject.toml", "Makefile")
TIMEOUT_S = 600


@dataclass(frozen=True)
class Mutant:
    """One patch and what its header says."""

    path: Path
    breaks: str
    tests: list[str]

    @property
    def name(self) -> str:
        return self.path.stem


def read(path: Path) -> Mutant:
    """A patch with its header; an error names what is missing."""
    lines = path.read_text(encoding="utf-8").splitlines()[:2]
    if len(lines) < 2 or not lines[0].startswith("# breaks: ") or not lines[1].startswith("# tests: "):
        raise SystemExit(f"{path}: expected `# breaks: ...` and `# tests: ...` above the diff")
    return Mutant(path, lines[0].removeprefix("# breaks: "), shlex.split(lines[1].removeprefix("# tests: ")))


def mutants() -> list[Mutant]:
    """All of them, by name."""
    return [read(p) for p in sorted(PATCHES.glob("*.patch"))]


def applies(mutant: Mutant, directory: Path) -> bool:
    """Whether the patch fits the tree in `directory`."""
    command = ["git", "apply", "--check", str(mutant.path)]
    return subprocess.run(command, cwd=directory, env=_outside_git(), check=False).returncode == 0


def _outside_git() -> dict[str, str]:
    """In a directory that is no repository, `git apply` works on plain files."""
    return {**os.environ, "GIT_CEILING_DIRECTORIES": str(ROOT.parent)}


def copy_tree(target: Path) -> None:
    """The parts of the project that the tests need."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.is_file():
            shutil.copy2(source, target / name)


def killed(mutant: Mutant) -> tuple[str, float]:
    """("red" | what went wrong instead, seconds)."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        tree = Path(name)
        copy_tree(tree)
        if not applies(mutant, tree):
            return "DOES NOT APPLY", time.monotonic() - began
        subprocess.run(["git", "apply", str(mutant.path)], cwd=tree, env=_outside_git(), check=True)
        environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *mutant.tests]
        try:
            done = subprocess.run(
                command,
                cwd=tree,
                env=environment,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return "TOOK TOO LONG", time.monotonic() - began
    seconds = time.monotonic() - began
    if done.returncode == 1:
        return "red", seconds
    if done.returncode == 0:
        return "SURVIVED", seconds
    return f"TESTS DID NOT RUN: {done.stdout[-300:]}{done.stderr[-300:]}", seconds


def main(names: list[str]) -> int:
    """Print a row per mutant; the exit status."""
    chosen = [m for m in mutants() if not names or m.name in names]
    if not chosen:
        raise SystemExit(f"no such mutant: {', '.join(names)}")
    bad = 0
    print(f"{'mutant':32} {'tests':6} {'s':>5}  what it breaks")
    for mutant in chosen:
        result, seconds = killed(mutant)
        bad += result != "red"
        print(f"{mutant.name:32} {result:6} {seconds:5.0f}  {mutant.breaks}", flush=True)
    print(f"{len(chosen) - bad} of {len(chosen)} mutants turned the tests red")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
