"""From a run to what the page shows: texts shortened, figures worded, charts drawn (process D).

The page is for reading, so long lists end early and say so; the JSON beside it has everything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from markupsafe import Markup

from secondnature.records import (
    STOPPED_BY,
    Comparison,
    Correction,
    Flip,
    Lesson,
    Message,
    Moved,
    SampleAnswer,
    Side,
)
from secondnature.report import svg, words
from secondnature.report.run import Run, finite

MAX_TEXT = 1200
"""Characters of one text on the page."""
MAX_LOSSES, MAX_GAINS, MAX_ANSWERS = 25, 8, 40
MAX_ROWS = 28
"""Kinds of tensors in the heat map."""

SIDES: dict[Side, str] = {"right": "where it should show", "other": "where it must not"}


@dataclass(frozen=True)
class Row:
    """One probe set of the before/after table."""

    name: str
    role: str
    n: str
    before: str
    before_interval: str
    after: str
    after_interval: str
    counts: str
    change: str
    change_interval: str
    p: str
    test: str
    said: words.Said
    plot: Markup | None
    harms: list[Flip]
    gains: list[Flip]
    harms_left: int
    gains_left: int
    losses: list[str]
    """What the losses have in common."""


@dataclass(frozen=True)
class Tile:
    """A figure large enough to be read first."""

    name: str
    before: str
    after: str
    note: str
    tone: words.Tone


@dataclass(frozen=True)
class Answer:
    """One prompt with the answers to it: (label, text, role) each."""

    prompt: str
    behaviour: str
    corrected: bool
    columns: list[tuple[str, str, str]]
    unchanged: bool


@dataclass(frozen=True)
class Figure:
    """A chart with what it means."""

    name: str
    picture: Markup
    caption: str


@dataclass(frozen=True)
class View:
    """Everything the template prints about one lesson, in the order of the page."""

    lesson: Lesson
    said: words.Said
    sentence: str
    facts: list[str]
    reason: str
    tiles: list[Tile]
    rows: list[Row]
    evidence_note: str
    d_prime: str
    prompted: str
    style: list[str]
    """How the answers to each probe set sound now."""
    curves: list[Figure]
    answers: list[Answer]
    answers_left: int
    kl: Figure | None
    heat: Figure | None
    most_moved: list[tuple[str, str, str, str]]
    settings: list[tuple[str, str]]
    provenance: list[tuple[str, str]]
    undo: str
    commands: list[str]


def view(run: Run, options: Sequence[str] = ()) -> View:
    """What the page says about `run`; `options`: of the commands that undo."""
    lesson, evidence = run.lesson, run.evidence
    undo, commands = words.undo(lesson, options)
    text = words.sentence(lesson, evidence)
    said = words.outcome(lesson, evidence)
    comparisons = evidence.comparisons if evidence else []
    answers = _answers(run)
    return View(
        lesson=lesson,
        said=said,
        sentence=_without_stamp(text, said.word),
        facts=_facts(run),
        reason=lesson.reason if lesson.reason not in text else "",
        tiles=_tiles(comparisons),
        rows=[_row(c, f"{lesson.id}-set{i}") for i, c in enumerate(comparisons)],
        evidence_note=_evidence_note(run),
        d_prime=_d_prime(run),
        prompted=words.prompted(evidence) if evidence else "",
        style=words.style(comparisons),
        curves=_curves(run),
        answers=answers[:MAX_ANSWERS],
        answers_left=max(0, len(answers) - MAX_ANSWERS),
        kl=_kl(run),
        heat=_heat(run.moved, lesson.id),
        most_moved=_most_moved(run.moved),
        settings=list(_flat(lesson.settings)),
        provenance=_provenance(run),
        undo=undo,
        commands=commands,
    )


def _without_stamp(text: str, word: str) -> str:
    """The sentence without the word that the stamp beside it says already."""
    head, colon, rest = text.partition(":")
    if not colon or head.strip().lower() != word.lower() or not rest.strip():
        return text
    rest = rest.strip()
    return rest[0].upper() + rest[1:]


def shorten(text: str, limit: int = MAX_TEXT) -> str:
    """The text, or its beginning and how much was left out."""
    if len(text) <= limit:
        return text
    return f"{text[:limit]}… ({len(text) - limit:,} more characters in the JSON)"


def _conversation(messages: list[Message]) -> str:
    if len(messages) == 1:
        return shorten(messages[0].content)
    return "\n".join(f"{m.role}: {shorten(m.content)}" for m in messages)


def _facts(run: Run) -> list[str]:
    lesson = run.lesson
    facts = [f"lesson {lesson.id}"]
    if run.corrections:
        facts.append(words.count(len(run.corrections), "correction"))
    if lesson.steps:
        facts.append(words.count(lesson.steps, "step"))
    if lesson.stopped_by:
        facts.append(f"stopped: {STOPPED_BY.get(lesson.stopped_by, lesson.stopped_by)}")
    if lesson.started_at and lesson.ended_at:
        facts.append(words.seconds((lesson.ended_at - lesson.started_at).total_seconds()))
    facts.append(f"{lesson.created_at:%Y-%m-%d %H:%M} {lesson.created_at.tzname() or ''}".strip())
    return facts


def _tiles(comparisons: list[Comparison]) -> list[Tile]:
    def tile(c: Comparison, name: str) -> Tile:
        said = words.judgement(c)
        before, after = (words.percent(k / c.n, c.n) if c.n else "–" for k in (c.before, c.after))
        return Tile(name, before, after, f"{said.mark} {said.word} · n = {c.n:,}", said.tone)

    tiles = [tile(c, c.name) for c in comparisons if c.role == "gain"]
    tiles += [tile(c, f"{c.name}: its other side") for c in comparisons if c.role == "other"]
    guards = [c for c in comparisons if c.role == "guard" and c.n]
    if guards:
        worst = min(guards, key=words.difference)
        tiles.append(tile(worst, f"guard {worst.name}" + (" (the worst)" if len(guards) > 1 else "")))
    return tiles


def _row(c: Comparison, key: str) -> Row:
    said = words.judgement(c)
    harms = [f for f in c.flips if not f.gained]
    gains = [f for f in c.flips if f.gained]
    before, after = (k / c.n if c.n else 0.0 for k in (c.before, c.after))
    plot = None
    if c.n:
        plot = svg.whisker(
            (before, c.before_interval),
            (after, c.after_interval),
            key=key,
            title=f"{c.name}: share that passes, before and after",
            text=f"Before {words.percent(before, c.n)}, 95 % interval {words.interval(c.before_interval)}; "
            f"after {words.percent(after, c.n)}, interval {words.interval(c.after_interval)}.",
            tone=said.tone,
        )
    margin = f"may lose less than {100 * c.margin:g} pts" if c.margin is not None else ""
    return Row(
        name=c.name,
        role=words.ROLES[c.role],
        n=f"{c.n:,} from {words.count(c.num_seeds, 'scenario')}",
        before=words.percent(before, c.n) if c.n else "–",
        before_interval=words.interval(c.before_interval),
        after=words.percent(after, c.n) if c.n else "–",
        after_interval=words.interval(c.after_interval),
        counts=f"{c.before:,} → {c.after:,} of {c.n:,}: {c.gains:,} gained, {c.losses:,} lost",
        change=words.points(words.difference(c)),
        change_interval=words.difference_interval(c),
        p=words.p_value(c.p),
        test=", ".join(t for t in (c.method, f"alpha {c.alpha:g}", margin) if t),
        said=said,
        plot=plot,
        harms=[_short_flip(f) for f in harms[:MAX_LOSSES]],
        gains=[_short_flip(f) for f in gains[:MAX_GAINS]],
        harms_left=max(0, len(harms) - MAX_LOSSES),
        gains_left=max(0, len(gains) - MAX_GAINS),
        losses=words.losses(c),
    )


def _short_flip(f: Flip) -> Flip:
    texts = {key: shorten(getattr(f, key)) for key in ("prompt", "before", "after")}
    return f.model_copy(update=texts)


def _evidence_note(run: Run) -> str:
    e = run.evidence
    if e is None:
        return "No probes were asked, so nothing is claimed about what this lesson did."
    retries = f", halved for each of {words.count(e.num_retries, 'retry').replace('retrys', 'retries')}"
    return (
        f"Every probe was asked once before and once after, greedily. "
        "Intervals of shares are Clopper–Pearson, 95 %; those of changes are the limits of the tests that decide. "
        f"The gate's alpha is {e.alpha:g}{retries if e.num_retries else ''}; seed {e.seed}; "
        f"probes sha256 {e.probes_sha256[:16]}."
    )


def _d_prime(run: Run) -> str:
    e = run.evidence
    if e is None or e.d_prime_before is None or e.d_prime_after is None:
        return ""
    before, after = words.number(e.d_prime_before), words.number(e.d_prime_after)
    return f"How well the two sides are told apart (d′): {before} before, {after} after."


def _curves(run: Run) -> list[Figure]:
    key = run.lesson.id
    figures: list[Figure] = []
    losses = [(float(s.step), s.loss) for s in run.metrics.steps if s.loss is not None]
    if losses:
        first, last = words.number(losses[0][1]), words.number(losses[-1][1])
        text = f"From {first} to {last} in {words.count(len(losses), 'step')}."
        line = svg.Series("loss", losses)
        picture = svg.chart([line], key=f"{key}-loss", title="Loss over steps", text=text)
        figures.append(Figure("Loss", picture, f"Nats per token. {text}"))
    smooth: list[svg.Series] = []
    jumps: list[svg.Series] = []
    for side, name in SIDES.items():
        margins = [(float(x.step), sorted(finite(x.margins.get(side, [])))) for x in run.metrics.looks]
        margins = [(x, values) for x, values in margins if values]
        means = [(x, fmean(values)) for x, values in margins]
        band = [(x, *_middle(values)) for x, values in margins]
        if means:
            smooth.append(svg.Series(name, means, css=side, band=band))
        passed = [(x.step, x.passed.get(side)) for x in run.metrics.looks]
        shares = [(float(step), 100 * share) for step, share in passed if share is not None]
        if shares:
            jumps.append(svg.Series(name, shares, css=side, jumps=True))
    if smooth:
        title = "Margins of the development probes over steps"
        picture = svg.chart(smooth, key=f"{key}-margin", title=title, text=_spoken(smooth, "nats"), zero=True)
        caption = "Smooth: log-probability of the wanted over the unwanted answer, in nats; mean, and the band of the middle 80 % of probes. Above zero the wanted answer is the likelier one."  # noqa: E501
        figures.append(Figure("Margin", picture, caption))
    if jumps:
        title = "Share of development probes that pass over steps"
        picture = svg.chart(
            jumps, key=f"{key}-rate", title=title, text=_spoken(jumps, "%"), y_range=(0, 100), unit=" %"
        )
        caption = (
            "Jumps: the share of probes that pass. It leaps where the margin crosses zero, so read both."
        )
        caption += "".join(f" {said[0].upper()}{said[1:]}." for said in words.looks(run.metrics.looks))
        figures.append(Figure("Yes or no", picture, caption))
    return figures


def _middle(values: list[float]) -> tuple[float, float]:
    """The 10th and 90th percentile of sorted values (nearest rank)."""
    last = len(values) - 1
    return values[round(0.1 * last)], values[round(0.9 * last)]


def _spoken(lines: list[svg.Series], unit: str) -> str:
    return " ".join(
        f"{s.name.capitalize()}: from {words.number(s.points[0][1])} to {words.number(s.points[-1][1])} {unit}."
        for s in lines
    )


def _answers(run: Run) -> list[Answer]:
    """Corrections first, then the other samples, in their order."""
    given = {_key(a.prompt): a for a in run.answers}
    taught = {_key(c.prompt) for c in run.corrections}
    shown = [_corrected(c, given.get(_key(c.prompt))) for c in run.corrections]
    return shown + [_sampled(a) for key, a in given.items() if key not in taught]


def _key(prompt: list[Message]) -> str:
    return "\0".join(f"{m.role}\0{m.content}" for m in prompt)


def _corrected(c: Correction, sample: SampleAnswer | None) -> Answer:
    columns: list[tuple[str, str, str]] = []
    if sample is not None:
        columns.append(("before", shorten(sample.before), "before"))
    elif c.answered is not None:
        columns.append(("what it said", shorten(c.answered[0].content), "before"))
    if c.chosen is not None:
        columns.append(("what was wanted", shorten(c.chosen[0].content), "wanted"))
    elif c.feedback is not None:
        columns.append(("what the user said", shorten(c.feedback), "wanted"))
    if sample is not None:
        columns.append(("after", shorten(sample.after), "after"))
    same = sample is not None and sample.before == sample.after
    return Answer(_conversation(c.prompt), c.behaviour or "", True, columns, same)


def _sampled(a: SampleAnswer) -> Answer:
    columns = [("before", shorten(a.before), "before"), ("after", shorten(a.after), "after")]
    if a.wanted is not None:
        columns.insert(1, ("what was wanted", shorten(a.wanted), "wanted"))
    return Answer(
        _conversation(a.prompt), a.behaviour or "", a.wanted is not None, columns, a.before == a.after
    )


def _kl(run: Run) -> Figure | None:
    latest = {m.on: m for m in run.metrics.kl}  # a later line replaces an earlier one
    rows = [(on, finite(latest[on].per_prompt), latest[on].mean) for on in ("new", "replay") if on in latest]
    if not rows:
        return None
    said = "; ".join(f"{name} prompts {words.number(mean)}" for name, _, mean in rows)
    title = "KL divergence of the answers before and after"
    picture = svg.strips(
        rows, key=f"{run.lesson.id}-kl", title=title, text=f"Means in nats per token: {said}."
    )
    caption = f"KL(before ‖ after) in nats per token, logarithmic; a dot is a prompt, the bar the mean: {said}. Large on new prompts is what was taught; on replay prompts it should be small."  # noqa: E501
    return Figure("How far the answers moved", picture, caption)


_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.\d+\.")


def kind_of(name: str) -> str:
    """The kind of a tensor: its name within its layer, without `.weight`: `mlp.up_proj`."""
    kind = name.removesuffix(".weight")
    found = _LAYER.search(kind)
    return kind[found.end() :] if found else kind.removeprefix("model.").removeprefix("language_model.")


def _heat(moved: list[Moved], key: str) -> Figure | None:
    if not moved:
        return None
    cells: dict[tuple[str, str], float] = {}
    for m in moved:
        place = (kind_of(m.name), str(m.layer) if m.layer is not None else "–")
        cells[place] = max(cells.get(place, 0.0), finite([m.relative])[0] if finite([m.relative]) else 0.0)
    kinds = sorted({kind for kind, _ in cells}, key=lambda k: (k.rpartition(".")[0], k))
    largest = {kind: max(v for (k, _), v in cells.items() if k == kind) for kind in kinds}
    kept = set(sorted(kinds, key=lambda k: -largest[k])[:MAX_ROWS])
    layers = sorted({m.layer for m in moved if m.layer is not None})
    columns = [str(layer) for layer in layers] + (["–"] if any(m.layer is None for m in moved) else [])
    top = max(cells, key=lambda place: cells[place])
    where = f"layer {top[1]}" if top[1] != "–" else "outside the layers"
    text = f"{len(cells)} tensors moved; the most: {top[0]}, {where}, by {words.number(1000 * cells[top])} ‰."
    rows = [k for k in kinds if k in kept]
    title = "Relative intended update by kind of tensor and layer"
    picture = svg.heat(rows, columns, cells, key=f"{key}-heat", title=title, text=text)
    more = f" {len(kinds) - len(rows)} kinds that moved less are left out." if len(rows) < len(kinds) else ""
    caption = f"Norm of the intended, un-rounded update over the norm of the tensor, in thousandths; columns are layers (– is outside them). {text}{more}"  # noqa: E501
    return Figure("Relative update, by kind of tensor and layer", picture, caption)


def _most_moved(moved: list[Moved]) -> list[tuple[str, str, str, str]]:
    largest = sorted(moved, key=lambda m: -m.relative)[:10]
    return [
        (m.name, words.number(m.relative), words.number(m.intended), words.number(m.written)) for m in largest
    ]


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")  # pyright: ignore[reportUnknownArgumentType]
        else:
            yield f"{prefix}{name}", shorten(words.setting(value), 300)


def _provenance(run: Run) -> list[tuple[str, str]]:
    lesson, cause = run.lesson, run.lesson.cause
    rows = [
        ("version before", lesson.parent or "–"),
        ("version after", lesson.version or "–"),
        ("job", lesson.job),
        ("taught", f"{words.count(cause.num_examples, 'example')}, with {cause.num_replay:,} of replay"),
        ("corrections", ", ".join(shorten(c, 16) for c in cause.corrections[:12]) or "–"),
        ("note", shorten(lesson.note, 400)),
        ("takes back", lesson.reverts or ""),
        ("taken back by", lesson.reverted_by or ""),
        ("delta sha256", lesson.delta_sha256 or ""),
        ("loss at the end", words.number(lesson.loss) if lesson.loss is not None else ""),
        ("moved", words.kl(lesson.kl) if lesson.kl else ""),
    ]
    if lesson.error is not None:
        rows.append(("error", f"{lesson.error.type}: {lesson.error.message} {lesson.error.hint}".strip()))
    speeds = finite([s.tokens_per_s for s in run.metrics.steps if s.tokens_per_s is not None])
    if speeds:
        rows.append(("speed", f"{fmean(speeds):,.0f} tokens per second"))
    return [(name, value) for name, value in rows if value]
