"""How figures and verdicts are said, the same in the terminal and on the page (process D).

A verdict is a word and a mark, never a colour alone. `tone` only chooses the colour.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from secondnature.records import (
    Comparison,
    Decision,
    Evidence,
    KlSet,
    Lesson,
    LookMetric,
    Reach,
    Reaches,
    Side,
    Style,
)

Tone = Literal["good", "bad", "warn", "info", "quiet"]

MARKS: dict[Tone, str] = {"good": "✓", "bad": "✕", "warn": "?", "info": "…", "quiet": "–"}
ROLES = {"gain": "taught", "other": "its other side", "guard": "guard"}


SHOWN_TAG_P = 0.05
"""A tag is told where losses concentrate in it at this (adjusted) level, whether or not it undoes the lesson."""

SHOWN_LOST = 3
"""Answers to development probes that were lost."""


@dataclass(frozen=True)
class Said:
    """A verdict in a word or two, with its tone and mark."""

    word: str
    tone: Tone
    detail: str = ""

    @property
    def mark(self) -> str:
        """One character that says the tone without colour."""
        return MARKS[self.tone]


DECISIONS: dict[Decision, tuple[str, Tone]] = {
    "gained": ("improved", "good"),
    "held": ("held", "good"),
    "harmed": ("harmed", "bad"),
    "pin_lost": ("pinned probe lost", "bad"),
    "tag_harmed": ("harmed in a tag", "bad"),
    "no_gain": ("no gain", "bad"),
    "not_shown": ("not shown to hold", "warn"),
    "not_judged": ("not judged", "quiet"),
}


def judgement(c: Comparison) -> Said:
    """What the tests say about one probe set: the words for its decision, and nothing of its own."""
    word, tone = DECISIONS[c.decision]
    if c.role == "gain" and c.decision in ("harmed", "not_shown"):
        word = "got worse" if c.decision == "harmed" else "gain not shown"
    return Said(word, tone, c.note or (f"n ≥ {c.n_needed:,} would do" if c.n_needed else ""))


def reach(r: Reach) -> str:
    """What one probe set could show: `rules out a fall of 3.7 points at best, 5.9 usually (5 asked for)`."""
    if r.role != "gain" and r.pinned == r.n:
        return "one that is lost undoes the lesson"
    what = "shows a gain" if r.role == "gain" else "rules out a fall"
    if r.at_best is None:
        said = f"{what} of no size"
    else:
        said = f"{what} of {100 * r.at_best:.1f} points at best"
        said += f", {100 * r.usual:.1f} usually" if r.usual is not None else ""
    if r.margin is not None:
        said += f" ({100 * r.margin:g} must be ruled out)"
    if r.too_few:
        return f"too few for the gate's minimum; {said}"
    return said + (f"; passes with a chance of {_chance(r.chance)}" if r.chance is not None else "")


def reaches(found: Reaches) -> list[str]:
    """What the probes of a lesson could show, a line each, and what that means for the verdict."""
    lines: list[str] = []
    for r in found.sets:
        name = r.name if r.role == "gain" else f"{r.name} ({ROLES[r.role]})"
        scenarios = f" of {count(r.num_seeds, 'scenario')}" if r.num_seeds < r.n else ""
        lines.append(f"{name}, {count(r.n, 'probe')}{scenarios}: {reach(r)}")
    if all(r.role != "gain" for r in found.sets):
        lines.append("no probe asks for what is taught: no gain can be shown")
    if found.chance is None:
        lines.append("no guard: nothing is known of what else the lesson changes")
    elif any(r.too_few for r in found.sets):
        lines.append("with too few probes the lesson ends without a verdict, unless harm is shown or no gain")
    else:
        rate = found.sets[0].flip_rate
        lines.append(
            f"a lesson that changes nothing else passes all guards with a chance of {_chance(found.chance)}, "
            f"if {100 * rate:g} % of answers flip by themselves (`secondnature doctor --probes` measures that)"
        )
    return lines


def _chance(share: float | None) -> str:
    assert share is not None
    return (
        f"{100 * share:.0f} %" if 0.005 <= share <= 0.995 else ("under 1 %" if share < 0.5 else "over 99 %")
    )


def losses(c: Comparison) -> list[str]:
    """What the losses of one probe set have in common, a sentence each; empty where nothing was found."""
    if c.lost is None:
        return []
    label = f"the other side of {c.name}" if c.role == "other" else c.name
    of = f"of {count(c.lost.losses, 'loss').replace('losss', 'losses')} in {label}"
    where = "scenarios" if c.clusters else "probes"
    found = [
        f"{of}, {t.losses} are tagged {t.tag} ({t.losses} of its {t.before} {where}; {p_value(t.p_adjusted)})"
        for t in c.lost.tags
        if t.p_adjusted <= SHOWN_TAG_P
    ]
    for w in c.lost.shared:
        chance = "" if w.p_adjusted <= 0.05 else f", may be chance: {c.lost.num_sequences:,} looked at"
        found.append(
            f"{of}, {w.losses} have “{w.words}” ({w.losses} of {w.before} {where} that have it; "
            f"{p_value(w.p)}{chance})"
        )
    return found


def prompted(evidence: Evidence) -> str:
    """`prompting alone (6 corrections in the question): 43 of 60, the lesson: 58 of 60 (p = 0.001)`, or nothing."""
    p = evidence.prompted
    if p is None:
        return ""
    return (
        f"prompting alone ({count(p.num_corrections, 'correction')} in the question): {p.prompting} of {p.n} "
        f"({percent(p.prompting / p.n)}); the lesson: {p.lesson} ({percent(p.lesson / p.n)}; {p_value(p.p)})"
    )


def style(comparisons: Sequence[Comparison]) -> list[str]:
    """How the answers of each probe set sound now: `code: 25 -> 10 words an answer (p < 0.0001), ...`."""
    return [f"{c.name} ({ROLES[c.role]}): {_style(c.style)}" for c in comparisons if c.style is not None]


def _style(s: Style) -> str:
    said = f"{s.words_before:.3g} → {s.words_after:.3g} words an answer"
    said += f" ({s.shorter:,} shorter, {s.longer:,} longer, {p_value(s.length_p)})"
    if not s.openings:
        return f"{said}; they open as before"
    moved = ", ".join(f"“{o.words or '(nothing)'}” {o.before:,} → {o.after:,}" for o in s.openings)
    return f"{said}; {percent(s.openings_moved)} open otherwise: {moved}"


def outcome(lesson: Lesson, evidence: Evidence | None) -> Said:
    """How a lesson ended, or where it stands."""
    if lesson.state == "kept":
        return Said("Kept", "good", f"later taken back by {lesson.reverted_by}" if lesson.reverted_by else "")
    if lesson.state == "undone":
        if evidence is not None and evidence.verdict == "inconclusive":
            return Said("Inconclusive", "warn", "undone, as by default")
        return Said("Undone", "bad")
    if lesson.state == "failed":
        return Said("Failed", "bad", "every write was undone")
    if lesson.state == "cancelled":
        return Said("Cancelled", "quiet", "every write was undone")
    return Said({"queued": "Waiting", "running": "Running"}.get(lesson.state, "On trial"), "info")


def sentence(lesson: Lesson, evidence: Evidence | None) -> str:
    """The verdict in one sentence."""
    if lesson.error is not None:
        return f"The lesson ended without a result: {lesson.error.message.rstrip('.')}."
    if evidence is not None and evidence.sentence:
        return evidence.sentence
    if lesson.reason:
        return lesson.reason
    return {
        "queued": "The lesson waits for its turn.",
        "running": "The lesson is running; its weights already answer, on trial.",
        "on_trial": "The lesson is on trial: nothing was measured yet.",
        "kept": "The lesson was kept without evidence: no probes were asked.",
        "undone": "The lesson was undone.",
        "failed": "The lesson ended without a result.",
        "cancelled": "The lesson was cancelled.",
    }[lesson.state]


def undo(lesson: Lesson, options: Sequence[str] = ()) -> tuple[str, list[str]]:
    """What can be undone now: a sentence, and the commands that do it, with these options."""

    def command(what: str) -> str:
        return shlex.join(["secondnature", "lessons", what, lesson.id, *options])

    if lesson.reverted_by is not None:
        return f"Already taken back by {lesson.reverted_by}.", []
    if lesson.state == "kept":
        return (
            "This takes the lesson back to the byte: the weights, the optimizer's state and the version "
            "are what they were before.",
            [command("revert")],
        )
    if lesson.state == "on_trial":
        return (
            "The lesson is on trial and is undone when its lease ends. Decide now:",
            [command("keep"), command("revert")],
        )
    if lesson.state in {"queued", "running"}:
        return "The lesson has not ended; cancelling its job undoes it.", []
    version = f" {lesson.parent}" if lesson.parent else ""
    return f"Nothing is left to undo: the weights are again version{version}, to the byte.", []


def kl(means: Mapping[KlSet, float]) -> str:
    """How far a lesson moved the answers: `KL(before ‖ after) 0.31 on new prompts, ... nats per token`."""
    names: dict[KlSet, str] = {"new": "on new prompts", "replay": "on replay prompts"}
    said = ", ".join(f"{number(means[on])} {name}" for on, name in names.items() if on in means)
    return f"KL(before ‖ after) {said}, nats per token"


def looks(found: Sequence[LookMetric]) -> list[str]:
    """What passed at the last look at the development probes, beside the first, and what was lost; or nothing."""
    if not found or not found[-1].asked:
        return []
    first, last = found[0], found[-1]
    sides: dict[Side, str] = {"right": "development", "other": "other side"}
    parts = [
        f"{name} {round(num * (last.passed.get(side) or 0.0))} of {num} "
        f"({round(num * (first.passed.get(side) or 0.0))} before)"
        for side, name in sides.items()
        if (num := last.asked.get(side))
    ]
    lines = [f"{', '.join(parts)} after {count(last.step, 'step')}"]
    if last.lost:
        said = {a.probe: a.answer for a in last.answers}
        texts = [f"probe {i}: “{said[i]}”" for i in last.lost if i in said][:SHOWN_LOST]
        lines.append(
            f"{len(last.lost)} of the other side passed before and fail{'s' if len(last.lost) == 1 else ''} now"
            + (f", e.g. {'; '.join(texts)}" if texts else "")
        )
    return lines


def percent(share: float, n: int | None = None) -> str:
    """A share as a percentage; one decimal where `n` is large enough to mean it."""
    return f"{100 * share:.{1 if n is not None and n >= 200 and share not in (0, 1) else 0}f} %"


def interval(pair: tuple[float, float]) -> str:
    """An interval of shares: `[2, 12] %` without its unit."""
    return f"[{100 * pair[0]:.0f}, {100 * pair[1]:.0f}]"


def points(difference: float) -> str:
    """A difference of shares, in signed percentage points."""
    value = 100 * difference
    if round(value, 1) == 0:
        return "±0 pts"
    text = f"{value:+.0f}" if abs(value) >= 10 else f"{value:+.1f}"
    return f"{text.replace('-', '−')} pts"


def difference(c: Comparison) -> float:
    """After minus before, as a share."""
    return (c.after - c.before) / c.n if c.n else 0.0


def difference_interval(c: Comparison) -> str:
    """The limits of the difference in signed points, or nothing where none were computed.

    Rounded to a point where that moves no limit across 0 or across the margin, which is what they are there to say.
    """
    if c.difference_interval is None:
        return ""
    borders = (0.0,) if c.margin is None else (0.0, -c.margin)
    low, high = (_rounded(v, borders).replace("-", "−") for v in c.difference_interval)
    return f"[{low}, {high}]"


def _rounded(value: float, borders: tuple[float, ...]) -> str:
    for digits in (0, 1, 2, 3):
        text = f"{100 * value:+.{digits}f}"
        if all(
            (float(text) > 100 * b) == (value > b) and (float(text) < 100 * b) == (value < b) for b in borders
        ):
            return text
    return f"{100 * value:+.1e}"


def p_value(p: float | None) -> str:
    """`p = 0.013`, `p < 0.0001`, or a dash."""
    if p is None:
        return "–"
    return "p < 0.0001" if p < 0.0001 else f"p = {p:.2g}"


def number(value: float | None, digits: int = 3) -> str:
    """A plain number with few digits, true minus signs and no `e-05`."""
    if value is None or not math.isfinite(value):
        return "not finite" if value is not None else "–"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        text = f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:,.0f}"
        return text.replace("-", "−")
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}·10{_superscript(int(exponent))}".replace("-", "−")


def _superscript(exponent: int) -> str:
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def count(n: int, noun: str) -> str:
    """`1 step`, `12 steps`."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def seconds(value: float) -> str:
    """A duration: `42 s`, `3 min 20 s`, `1 h 5 min`."""
    if value < 120:
        return f"{value:.0f} s" if value >= 10 else f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def setting(value: Any) -> str:
    """A resolved setting as text."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value, 4)
    if isinstance(value, list | tuple):
        items: list[Any] = list(value)  # pyright: ignore[reportUnknownArgumentType]
        return ", ".join(setting(v) for v in items) or "none"
    return str(value)
