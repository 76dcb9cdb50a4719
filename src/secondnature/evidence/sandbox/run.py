"""Runs code that a model wrote, and regular expressions that a caller wrote, where they can do no harm (process A).

`run_checks` starts one small process (confine.py, then zygote.py) for a whole batch and waits; inside, one forked
and limited child per answer. Guaranteed by the kernel: a child opens no file and no socket, writes nothing, ends
within its time and memory; seccomp and a network namespace stand behind that where the system allows them (`walls`
says which do). Not guaranteed: that an answer which passes is honest. It shares an interpreter with the assertions
and with the harness: an audit hook and emptied modules stand in the way, but a pass can be forged, most easily by
an object that claims to equal everything. A pass says that an answer which did not set out to cheat is right.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secondnature.errors import SandboxFailed


@dataclass(frozen=True)
class Limits:
    """What one answer may use."""

    cpu_s: int = 2
    """CPU seconds; the limit that decides, since it does not depend on what else the machine does."""
    wall_s: float = 10.0
    memory_bytes: int = 512 * 2**20
    """Address space, the interpreter's own included."""
    workers: int = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class Ruling:
    """Whether a check held, and if not, why; the reason may be the answer's own words."""

    passed: bool
    reason: str = ""


@dataclass(frozen=True)
class CodeCheck:
    """Run `code`, then `tests` (assertions) in its namespace."""

    code: str
    tests: str


@dataclass(frozen=True)
class RegexCheck:
    """Does `pattern` occur in `text` (`re.search`)?"""

    pattern: str
    text: str


REGEXES_PER_CHILD = 64


def run_checks(checks: Sequence[CodeCheck | RegexCheck], limits: Limits | None = None) -> list[Ruling | None]:
    """One ruling per check, in order; None for a regular expression that ran out of time or memory.

    Raises:
        SandboxFailed: the sandbox itself could not run (not: an answer that failed).
    """
    rulings: list[Ruling | None] = [None] * len(checks)
    code = [i for i, c in enumerate(checks) if isinstance(c, CodeCheck)]
    regexes = [i for i, c in enumerate(checks) if isinstance(c, RegexCheck)]
    while code or regexes:
        groups = [regexes[i : i + REGEXES_PER_CHILD] for i in range(0, len(regexes), REGEXES_PER_CHILD)]
        jobs = [_job(checks[i]) for i in code]
        jobs += [{"regexes": [_pair(checks[i]) for i in group]} for group in groups]
        answers = _run(jobs, limits or Limits())["rulings"]
        for i, answer in zip(code, answers, strict=False):
            rulings[i] = Ruling(answer["passed"], answer["heard"])
        again: list[int] = []
        for group, answer in zip(groups, answers[len(code) :], strict=True):
            heard = answer["heard"] if set(answer["heard"]) <= set("01t") else ""
            for i, mark in zip(group, heard, strict=False):
                rulings[i] = None if mark == "t" else Ruling(mark == "1")
            again += group[len(heard) + 1 :]  # the one at which the child died has no ruling, the rest go on
        code, regexes = [], again
    return rulings


def walls() -> list[str]:
    """Which of the optional walls stand on this system: `network namespace`, `seccomp`, `not root` (or `ROOT`)."""
    return _run([], Limits())["walls"]


def _job(check: CodeCheck | RegexCheck) -> dict[str, Any]:
    assert isinstance(check, CodeCheck)
    return {"code": check.code, "tests": check.tests}


def _pair(check: CodeCheck | RegexCheck) -> list[str]:
    assert isinstance(check, RegexCheck)
    return [check.pattern, check.text]


def _run(jobs: list[dict[str, Any]], limits: Limits) -> dict[str, Any]:
    request = {
        "jobs": jobs,
        "limits": {
            "cpu_s": limits.cpu_s,
            "wall_s": limits.wall_s,
            "memory_bytes": limits.memory_bytes,
            "workers": limits.workers,
        },
    }
    patience_s = 60 + sum(5 * (len(job.get("regexes", ())) + 2) + limits.wall_s for job in jobs)
    first = Path(__file__).with_name("confine.py")
    devnull = os.open(os.devnull, os.O_RDWR)
    try:
        with tempfile.TemporaryDirectory(prefix="secondnature-") as empty:
            done = subprocess.run(
                [sys.executable, "-s", "-S", "-P", "-B", str(first), str(devnull)],
                input=json.dumps(request).encode(),
                capture_output=True,
                timeout=patience_s,
                cwd=empty,
                env={
                    "PYTHONHASHSEED": "0"
                },  # all of it: nothing of ours is inherited, and sets keep their order
                pass_fds=(devnull,),
                start_new_session=True,
                check=False,
            )
    except (OSError, subprocess.TimeoutExpired) as e:
        raise SandboxFailed(f"the sandbox did not run: {e}", "see `secondnature doctor`") from None
    finally:
        os.close(devnull)
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        tail = done.stderr.decode("utf-8", "replace").strip()[-500:]
        raise SandboxFailed(
            f"the sandbox ended with status {done.returncode} and no answer: {tail or 'no message'}",
            "is Python's standard library readable, and memory left?",
        ) from None
    return answer
