"""How far something is, shown: a bar for each phase on a terminal, a few plain lines elsewhere (process D).

Both are told the same: the name of the phase, and its count where there is one. A phase has a line when it ends,
with how long it took (not one that is over in a moment and counts nothing); without a terminal also one when it
begins, and some in between, never more than one in `EVERY_S`. Looks between the steps of a training do not end it.
Always on stderr.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn

from secondnature.cli.output import Output
from secondnature.wire import PhaseProgress

__all__ = ["Display", "amount", "counting", "display", "waiting"]

EVERY_S = 5.0
"""No phase says more than one line in so many seconds."""
AT_LEAST_EVERY_S = 60.0
"""And one at least, however slowly it goes on."""
SHARE = 0.1
"""Of a phase, between two lines about it."""
QUIET_S = 2.0
"""What takes less says nothing."""
MAY_END_EARLY = ("training",)
"""What may reach its aim before all that was asked for is done."""
INSIDE = {"looking at development probes": "training"}
"""Phases that come again and again in the middle of another."""


@dataclass
class _Shown:
    """A phase that has begun."""

    name: str
    begun: float
    now: PhaseProgress | None = None
    said_at: float = 0.0
    said: int = 0
    """The count of the last line."""
    pause_s: float = 0.0


class Display:
    """Plain lines."""

    def __init__(self, out: Output) -> None:
        self._out = out
        self._phase: _Shown | None = None
        self._around: _Shown | None = None
        """The phase in whose middle the present one is."""

    def show(
        self, name: str, now: PhaseProgress | None, extra: str = "", *, begun: float | None = None
    ) -> None:
        """The phase of this name is so far.

        Args:
            name: another one than the last, or a lower count: that one has ended.
            now: None where nothing can be counted.
            extra: what else is to be said of it.
            begun: when it began (`time.monotonic`), where that was before it is shown first.
        """
        last = self._phase
        if last is None or last.name != name or _began_anew(last.now, now):
            self._enter(name, now, extra)
            if begun is not None and self._phase is not None:
                self._phase.begun = begun
        assert self._phase is not None, "it was entered"
        self._phase.now = now or self._phase.now
        self._go_on(self._phase, extra)

    def close(self, *, whole: bool = True) -> None:
        """The last phase has ended; not `whole`: before all of it was done."""
        for shown in (self._phase, self._around):
            if shown is not None:
                self._end(shown, whole)
        self._phase = self._around = None

    def _enter(self, name: str, now: PhaseProgress | None, extra: str) -> None:
        last, around = self._phase, self._around
        if last is not None and INSIDE.get(name) == last.name:
            self._around = last
        elif around is not None and name == around.name:
            self._phase, self._around = around, None
            return
        elif around is None or name not in INSIDE:
            self.close(whole=name != "undoing")
        self._phase = _Shown(
            name, time.monotonic(), now=now, said=now.done if now is not None else 0, said_at=time.monotonic()
        )
        if self._around is None:
            self._begin(self._phase, extra)

    # ---------------------------------------------------------------------------- what a terminal does otherwise

    def _begin(self, shown: _Shown, extra: str) -> None:
        total = f": {_things(shown.now.total, shown.now.unit)}" if shown.now is not None else ""
        self._out.note(f"{shown.name}{total}{extra}")

    def _go_on(self, shown: _Shown, extra: str) -> None:
        since = time.monotonic() - shown.said_at
        if not shown.pause_s:
            shown.pause_s = EVERY_S
        if shown.now is None:
            if since >= shown.pause_s:
                shown.said_at, shown.pause_s = time.monotonic(), min(AT_LEAST_EVERY_S, 2 * shown.pause_s)
                took = time.monotonic() - shown.begun
                self._out.note(f"{shown.name}: {_duration(took)} so far{extra}")
            return
        far = shown.now.done - shown.said >= SHARE * shown.now.total
        ended = shown.now.done >= shown.now.total  # the line of its end says more
        if not ended and ((far and since >= EVERY_S) or since >= AT_LEAST_EVERY_S):
            shown.said, shown.said_at = shown.now.done, time.monotonic()
            self._out.note(f"{shown.name}: {amount(shown.now)}{extra}")

    def _end(self, shown: _Shown, whole: bool) -> None:
        if self._around is not None and shown is not self._around:
            return  # a look in the middle: its time is in the phase around it
        took = time.monotonic() - shown.begun
        now = shown.now
        if now is None:
            if took >= QUIET_S:
                self._out.note(f"{shown.name} done in {_duration(took)}")
        elif now.done < now.total and (not whole or shown.name in MAY_END_EARLY):
            self._out.note(f"{shown.name}: {now.done:,} of {now.total:,} {now.unit} in {_duration(took)}")
        else:  # the last look at it was before its end
            self._out.note(f"{shown.name}: {_things(now.total, now.unit)} done in {_duration(took)}")


class _Bars(Display):
    """A bar for the phase that goes on, and one for what is in the middle of it; a line for each that has ended."""

    def __init__(self, out: Output, progress: Progress) -> None:
        super().__init__(out)
        self._progress = progress
        self._bars: dict[str, TaskID] = {}

    def _begin(self, shown: _Shown, extra: str) -> None:
        """The bar says it."""

    def _go_on(self, shown: _Shown, extra: str) -> None:
        for name in [n for n in self._bars if n != shown.name]:
            if self._around is None or name != self._around.name:
                self._progress.remove_task(self._bars.pop(name))
        if shown.name not in self._bars:
            self._bars[shown.name] = self._progress.add_task(shown.name, total=None, far="")
        far = amount(shown.now) if shown.now else _duration(time.monotonic() - shown.begun)
        self._progress.update(
            self._bars[shown.name],
            total=shown.now.total if shown.now is not None else None,
            completed=shown.now.done if shown.now is not None else 0,
            far=far + extra,
        )


def _began_anew(last: PhaseProgress | None, now: PhaseProgress | None) -> bool:
    return last is not None and now is not None and now.done < last.done


def amount(now: PhaseProgress) -> str:
    """`120/300 probes, 4.1/s, about 44 s left`."""
    parts = [f"{now.done:,}/{now.total:,} {now.unit}".rstrip()]
    if now.per_s is not None:
        parts.append(f"{now.per_s:.3g}/s" if now.per_s >= 1 else f"{1 / now.per_s:.3g} s each")
    if now.eta_s is not None and now.done < now.total:
        parts.append(f"about {_duration(now.eta_s)} left")
    return ", ".join(parts)


def _things(number: int, unit: str) -> str:
    return f"{number:,} {unit.removesuffix('s') if number == 1 else unit}".rstrip()


def _duration(seconds: float) -> str:
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


@contextmanager
def display(out: Output) -> Generator[Display]:
    """What shows the phases of a `with` block."""
    if not out.err.is_terminal:
        lines = Display(out)
        yield lines
        lines.close()
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[far]}", markup=False),
    )
    with Progress(*columns, console=out.err, transient=True) as progress:
        bars = _Bars(out, progress)
        yield bars
        bars.close()


@contextmanager
def waiting(out: Output, name: str, ask: Callable[[], PhaseProgress | None] | None = None) -> Generator[None]:
    """Show a call that blocks, once it takes longer than `QUIET_S`. `ask`: how far it is, where somebody knows."""
    ended = threading.Event()

    def watch() -> None:
        begun = time.monotonic()
        if ended.wait(QUIET_S):
            return
        with display(out) as shown:
            shown.show(name, None, begun=begun)
            while not ended.wait(0.25):
                shown.show(name, ask() if ask is not None else None)

    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def counting(out: Output, name: str, total: int, unit: str) -> Generator[Callable[[], None]]:
    """As `waiting`, for what we count ourselves; gives what to call, from any thread, after each item."""
    begun, ticks = time.monotonic(), itertools.count()
    done = [0]

    def tick() -> None:
        done[0] = next(ticks) + 1

    def ask() -> PhaseProgress:
        took = time.monotonic() - begun
        rate = done[0] / took if done[0] else None
        left = (total - done[0]) / rate if rate else None
        return PhaseProgress(done=done[0], total=total, unit=unit, per_s=rate, eta_s=left)

    with waiting(out, name, ask):
        yield tick
