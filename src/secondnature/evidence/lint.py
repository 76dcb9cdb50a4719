"""What may be wrong with corrections and probes, found by reading them, before a model is loaded (any process).

Five corrections written "Ankara.", taught to a model that says "The capital of Turkey is Ankara.", cost it 18 of 55
other answers; written as it speaks they cost 4. What the answers look like decides the damage, and nobody sees it
in a file of correct answers. Nothing here refuses anything: each finding names its lines and what to do.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from statistics import median

from secondnature.evidence.texts import opening, words
from secondnature.records import Correction, Probe

__all__ = ["Finding", "is_bare", "lint", "lint_form"]

SHINGLE_WORDS = 8
NEAR = 0.8
"""Jaccard index of the words of two prompts from which on they are near copies."""
SKEW = 3.0
"""One side so many times as long as the other teaches length."""
UNIFORM = 0.8
BARE_WORDS = 3
MIN_FOR_FORM = 3
"""Fewer answers have no form."""
MAX_LINES = 8


@dataclass(frozen=True)
class Finding:
    """One thing to look at."""

    kind: str
    """`contradiction`, `repeated`, `near copy`, `length skew`, `uniform answers`, `bare answers`, `answer form`."""
    where: str
    """Lines, as `lines 3, 7`."""
    found: str
    hint: str

    def __str__(self) -> str:
        return f"{self.kind} ({self.where}): {self.found}; {self.hint}"


def lint(
    corrections: Sequence[Correction],
    probes: Sequence[Probe] = (),
    *,
    lines: Sequence[int] | None = None,
    probe_lines: Sequence[int] | None = None,
) -> list[Finding]:
    """Everything that may be wrong, contradictions first.

    Args:
        lines, probe_lines: of the files, from 1 on; None: in order.
    """
    numbers = list(lines) if lines is not None else list(range(1, len(corrections) + 1))
    asked = list(probe_lines) if probe_lines is not None else list(range(1, len(probes) + 1))
    taught = [(number, c) for number, c in zip(numbers, corrections, strict=True) if c.chosen is not None]
    return [
        *_contradictions(taught),
        *_near_copies(taught, list(zip(asked, probes, strict=True))),
        *_skew(taught),
        *_uniform(taught),
        *_form(taught),
    ]


def lint_form(
    wanted: Sequence[str], own: Sequence[str], where: str, full: Mapping[int, str] | None = None
) -> list[Finding]:
    """The form of wanted answers beside the model's own answers to the same prompts.

    Args:
        full: of some of them, by their place, the wanted answer as the model would say it.
    """
    if len(wanted) < MIN_FOR_FORM:
        return []
    found = [x for look in (_lengths, _bareness, _ends, _capitals, _openings) for x in look(wanted, own)]
    if not found:
        return []
    place, text = next(iter((full or {}).items()), (0, ""))
    instead = f"; “{_short(wanted[place])}” would be “{_short(text)}”" if text else ""
    return [
        Finding(
            "answer form",
            where,
            "; ".join(found),
            "a form that is not the model's own is learned too, and shows in other answers: unless it is the "
            f"lesson, write them as it speaks (it says “{_short(own[place])}”{instead})",
        )
    ]


def is_bare(text: str) -> bool:
    """Whether an answer is a word or three, and no sentence."""
    return 0 < _length(text) <= BARE_WORDS


def _lengths(wanted: Sequence[str], own: Sequence[str]) -> list[str]:
    ratio = median(_length(w) / max(1, _length(o)) for w, o in zip(wanted, own, strict=True))
    if 1 / SKEW < ratio < SKEW:
        return []
    lengths = f"{median(map(_length, wanted)):g} words, the model's own {median(map(_length, own)):g}"
    return [f"the wanted answers have {lengths} (medians)"]


def _apart(
    wanted: Sequence[str], own: Sequence[str], has: Callable[[str], bool], theirs: str, its: str
) -> list[str]:
    """What most of the wanted answers are and few of the model's own."""
    here, there = (sum(map(has, texts)) for texts in (wanted, own))
    num = len(wanted)
    if here < UNIFORM * num or there > (1 - UNIFORM) * num:
        return []
    return [f"{here} of {num} {theirs}, {num - there} of {num} of the model's own {its}"]


def _bareness(wanted: Sequence[str], own: Sequence[str]) -> list[str]:
    return _apart(wanted, own, is_bare, f"are {BARE_WORDS} words or fewer", "are not")


def _ends(wanted: Sequence[str], own: Sequence[str]) -> list[str]:
    """Whether answers end as sentences do."""
    return _apart(wanted, own, lambda t: not _is_ended(t), "end without a full stop", "end with one")


def _is_ended(text: str) -> bool:
    return text.rstrip().rstrip("\"'”’»)*").endswith((".", "!", "?", "…", "。", "！", "？", ":"))


def _capitals(wanted: Sequence[str], own: Sequence[str]) -> list[str]:
    return _apart(wanted, own, lambda t: t.lstrip()[:1].islower(), "begin with a small letter", "do not")


def _openings(wanted: Sequence[str], own: Sequence[str]) -> list[str]:
    """Whether the model opens its answers alike, and the wanted ones open otherwise."""
    first, count = Counter(map(opening, own)).most_common(1)[0]
    if " " not in first or count < UNIFORM * len(own) or any(opening(w) == first for w in wanted):
        return []
    return [f"the model begins {count} of {len(own)} with “{first}”, and no wanted answer begins so"]


def _length(text: str) -> int:
    return len(words(text))


def _short(text: str, limit: int = 60) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else f"{flat[:limit]}…"


def _where(numbers: Iterable[int]) -> str:
    found = sorted(set(numbers))
    shown = ", ".join(map(str, found[:MAX_LINES]))
    more = f" and {len(found) - MAX_LINES} more" if len(found) > MAX_LINES else ""
    return f"line{'s'[: len(found) != 1]} {shown}{more}"


def _key(c: Correction | Probe) -> tuple[str, ...]:
    return tuple(f"{m.role} {' '.join(words(m.content)) or m.content}" for m in c.prompt)


def _answer(c: Correction) -> str:
    assert c.chosen is not None, "only those with a wanted answer are looked at"
    return " ".join(c.chosen[0].content.split())


def _contradictions(taught: Sequence[tuple[int, Correction]]) -> list[Finding]:
    """The same context with different wanted answers; the same correction twice."""
    groups: dict[tuple[str, ...], list[tuple[int, Correction]]] = defaultdict(list)
    for number, c in taught:
        groups[_key(c)].append((number, c))
    against, twice = list[Finding](), list[Finding]()
    for group in groups.values():
        answers = list(dict.fromkeys(_answer(c) for _, c in group))
        lines = _where(n for n, _ in group)
        asked = _short(group[0][1].prompt[-1].content)
        if len(answers) > 1:
            both = " and ".join(f"“{_short(a, 40)}”" for a in answers[:2])
            more = f" and {len(answers) - 2} more" if len(answers) > 2 else ""
            hint = "keep one, unless any of them will do"
            against.append(Finding("contradiction", lines, f"“{asked}” is to be answered {both}{more}", hint))
        elif len(group) > 1:
            hint = "it weighs that much more; leave it once, unless that is meant"
            twice.append(
                Finding("repeated", lines, f"“{asked}” with the same answer, {len(group)} times", hint)
            )
    return against + twice


def _near_copies(
    taught: Sequence[tuple[int, Correction]], asked: Sequence[tuple[int, Probe]]
) -> list[Finding]:
    """Probes that ask nearly what is taught: they measure memory, not what was meant."""
    texts = [words(c.prompt[-1].content) for _, c in taught]
    index = _Near(texts)
    pairs: list[tuple[int, int]] = []
    for number, probe in asked:
        found = index.nearest(words(probe.prompt[-1].content))
        if found is not None:
            pairs.append((number, taught[found][0]))
    if not pairs:
        return []
    probe, line = pairs[0]
    return [
        Finding(
            "near copy",
            f"probe {_where(p for p, _ in pairs)}",
            f"{len(pairs)} of {len(asked)} probes ask nearly what a correction asks (the first: probe line "
            f"{probe}, correction line {line})",
            "they would show what was learned by heart: ask other things, or in other words",
        )
    ]


class _Near:
    """Finds texts with a long run of words in common, or nearly the same words.

    Two sets with a Jaccard index of 0.8 share one of the rarest fifth of their words: only those are indexed.
    """

    def __init__(self, texts: Sequence[list[str]]) -> None:
        self._sets = [frozenset(t) for t in texts]
        self._count = Counter(w for s in self._sets for w in s)
        self._shingles = {s: i for i, t in enumerate(texts) for s in _shingles(t)}
        self._rare: dict[str, list[int]] = defaultdict(list)
        for i, found in enumerate(self._sets):
            for word in self._rarest(found):
                self._rare[word].append(i)

    def _rarest(self, found: frozenset[str]) -> list[str]:
        ranked = sorted(found, key=lambda w: (self._count[w], w))
        return ranked[: len(ranked) - ceil(NEAR * len(ranked)) + 1]

    def nearest(self, text: list[str]) -> int | None:
        for shingle in _shingles(text):
            if shingle in self._shingles:
                return self._shingles[shingle]
        asked = frozenset(text)
        candidates = {i for w in self._rarest(asked) for i in self._rare.get(w, ())}
        near = [i for i in candidates if len(asked & self._sets[i]) >= NEAR * len(asked | self._sets[i])]
        return min(near, default=None)


def _shingles(text: list[str]) -> list[tuple[str, ...]]:
    return [tuple(text[i : i + SHINGLE_WORDS]) for i in range(len(text) - SHINGLE_WORDS + 1)]


def _skew(taught: Sequence[tuple[int, Correction]]) -> list[Finding]:
    """Wanted and rejected answers whose lengths differ: then length is what is learned."""
    pairs = [
        (n, _length(_answer(c)), _length(c.rejected[0].content)) for n, c in taught if c.rejected is not None
    ]
    if len(pairs) < MIN_FOR_FORM:
        return []
    longer = [n for n, wanted, rejected in pairs if wanted >= SKEW * max(1, rejected)]
    shorter = [n for n, wanted, rejected in pairs if rejected >= SKEW * max(1, wanted)]
    found = max((longer, shorter), key=len)
    if len(found) < UNIFORM * len(pairs):
        return []
    side = "longer" if found is longer else "shorter"
    return [
        Finding(
            "length skew",
            _where(found),
            f"{len(found)} of {len(pairs)} wanted answers are {SKEW:g} times {side} than the rejected ones",
            "length tells them apart, so length is learned: bring the two nearer, or add pairs the other way",
        )
    ]


def _uniform(taught: Sequence[tuple[int, Correction]]) -> list[Finding]:
    """One answer, or one opening, for nearly all."""
    if len(taught) < MIN_FOR_FORM:
        return []
    whole = Counter(_answer(c) for _, c in taught)
    answer, same = whole.most_common(1)[0]
    hint = "it is learned for other prompts too: add corrections where it is not wanted, and probe the other side"
    if same >= max(MIN_FOR_FORM, UNIFORM * len(taught)):
        lines = _where(n for n, c in taught if _answer(c) == answer)
        return [Finding("uniform answers", lines, f"{same} of {len(taught)} are “{_short(answer)}”", hint)]
    first, count = Counter(opening(_answer(c)) for _, c in taught).most_common(1)[0]
    if first and count >= max(MIN_FOR_FORM, UNIFORM * len(taught)):
        lines = _where(n for n, c in taught if opening(_answer(c)) == first)
        found = f"{count} of {len(taught)} wanted answers begin with “{first}”"
        return [Finding("uniform answers", lines, found, hint)]
    return []


def _form(taught: Sequence[tuple[int, Correction]]) -> list[Finding]:
    """Beside what the model itself said, where that was recorded; else whether answers are bare."""
    known = [(n, _answer(c), c.said[0].content) for n, c in taught if c.said is not None]
    if len(known) >= MIN_FOR_FORM:
        return lint_form([w for _, w, _ in known], [o for _, _, o in known], _where(n for n, _, _ in known))
    asked = [(n, c) for n, c in taught if _length(c.prompt[-1].content) > BARE_WORDS]
    bare = [n for n, c in asked if 0 < _length(_answer(c)) <= BARE_WORDS]
    if len(taught) < MIN_FOR_FORM or len(bare) < UNIFORM * len(taught):
        return []
    return [
        Finding(
            "bare answers",
            _where(bare),
            f"{len(bare)} of {len(taught)} wanted answers have {BARE_WORDS} words or fewer",
            "bare answers teach a style, which costs other answers: write the sentence that the model would say, "
            "unless brevity is the lesson",
        )
    ]
