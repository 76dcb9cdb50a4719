"""Judges answers by the checks of their probes (process A).

`judge_all` takes a whole set at once, since code and regular expressions are judged in the sandbox (a caller's
pattern can backtrack for ever, and Python cannot interrupt it in a thread). `prefers` is judged by the margin
log p(A) - log p(B), which only the engine can measure, so it is passed in. What cannot be judged did not pass.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from secondnature.errors import BadInput
from secondnature.evidence.sandbox import CodeCheck, Limits, RegexCheck, Ruling, run_checks
from secondnature.records import Check, Outcome, Probe

_FENCE = "```"
_CODE_STARTS = re.compile(r"(?:async def |def |class |@|import |from \S+ import )")


@dataclass(frozen=True)
class Asked:
    """A check with the answer to be judged; `margin` (nats) is needed where the check is `prefers`."""

    check: Check
    answer: str
    margin: float | None = None


def extract_python(answer: str) -> str:
    """The code in an answer: its first fenced ```python block, else its first fenced block, else the text from the
    first line that starts a definition or an import, else all of it. A fence never closed ends with the text.
    """
    blocks: list[tuple[str, list[str]]] = []
    inside = False
    for line in answer.split("\n"):
        if line.lstrip().startswith(_FENCE):
            if not inside:
                blocks.append((line.lstrip().removeprefix(_FENCE).strip().lower(), []))
            inside = not inside
        elif inside:
            blocks[-1][1].append(line)
    if blocks:
        named = [body for language, body in blocks if language in ("python", "py", "python3")]
        return "\n".join(named[0] if named else blocks[0][1])
    lines = answer.split("\n")
    for i, line in enumerate(lines):
        if _CODE_STARTS.match(line):
            return "\n".join(lines[i:])
    return answer


def judge_all(asked: Sequence[Asked], limits: Limits | None = None) -> list[Ruling]:
    """One ruling per check, in order, with a reason where it did not pass.

    Raises:
        BadInput: a `prefers` check without its margin.
        SandboxFailed: the sandbox could not run.
    """
    rulings: list[Ruling] = [Ruling(False)] * len(asked)
    places: list[int] = []
    boxed: list[CodeCheck | RegexCheck] = []
    for i, one in enumerate(asked):
        pattern = one.check.matches if one.check.matches is not None else one.check.not_matches
        if one.check.prefers is not None:
            rulings[i] = _prefers(one)
            continue
        places.append(i)
        if pattern is not None:
            boxed.append(RegexCheck(pattern, one.answer))
        else:
            boxed.append(CodeCheck(extract_python(one.answer), one.check.python or ""))
    for i, ruling in zip(places, run_checks(boxed, limits) if boxed else [], strict=True):
        rulings[i] = _of_regex(asked[i].check, ruling)
    return rulings


def judge(check: Check, answer: str, margin: float | None = None) -> bool:
    """One answer. Starts a process for code and patterns: for many, `judge_all` is a hundred times faster."""
    return judge_all([Asked(check, answer, margin)])[0].passed


def judge_probes(
    probes: Sequence[Probe], answers: Sequence[str], margins: Sequence[float | None] | None = None
) -> list[Outcome]:
    """The outcomes of probes that were asked: `answers` and `margins` are in the probes' order."""
    margins = margins if margins is not None else [None] * len(probes)
    asked = [Asked(p.check, a, m) for p, a, m in zip(probes, answers, margins, strict=True)]
    return [
        Outcome(probe=p.digest(), passed=ruling.passed, answer=one.answer, margin=one.margin)
        for p, one, ruling in zip(probes, asked, judge_all(asked), strict=True)
    ]


def _prefers(one: Asked) -> Ruling:
    if one.margin is None:
        raise BadInput(
            "a `prefers` check came without its margin; expected log p(A) - log p(B) in nats",
            "let the engine score both answers",
        )
    return Ruling(one.margin > 0, "" if one.margin > 0 else f"the margin is {one.margin:.3g} nats")


def _of_regex(check: Check, ruling: Ruling | None) -> Ruling:
    if ruling is None:
        return Ruling(False, "the regular expression ran out of time or memory")
    if check.python is not None:
        return ruling
    wanted = check.matches is not None
    if ruling.passed == wanted:
        return Ruling(True)
    return Ruling(False, "the pattern is absent" if wanted else "the pattern occurs")
