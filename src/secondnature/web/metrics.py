"""What Prometheus reads: the engine's counters, the weights, the lessons (server)."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from secondnature.engines.base import Histogram
from secondnature.engines.local.engine import Engine
from secondnature.engines.stamps import Clock
from secondnature.lessons.runner import Runner


class _Teaching(Collector):
    """The weights and the lessons; of either engine."""

    def __init__(self, runner: Runner, clock: Clock) -> None:
        self._runner, self._clock = runner, clock

    def collect(self) -> Iterator[Metric]:
        """The families, as they stand."""
        stamp = self._clock.read()
        yield CounterMetricFamily("secondnature_weight_writes", "In-place writes of the weights", stamp.epoch)
        yield GaugeMetricFamily(
            "secondnature_on_trial", "1 while a lesson runs or is on trial", int(stamp.trial)
        )
        yield InfoMetricFamily("secondnature_weights", "The weights in force", {"version": stamp.version})
        lessons = GaugeMetricFamily("secondnature_lessons", "Entries of the log by state", labels=["state"])
        states = [x.state for x in self._runner.log.all()]
        for state in sorted(set(states)):
            lessons.add_metric([state], states.count(state))
        yield lessons


class _Local(Collector):
    """The counters of the local engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """The families, as they stand."""
        numbers = self._engine.metrics
        ended = CounterMetricFamily(
            "secondnature_requests", "Ended requests by finish reason", labels=["reason"]
        )
        for reason, count in numbers.requests.items():
            ended.add_metric([reason], count)
        yield ended
        yield CounterMetricFamily("secondnature_requests_refused", "Refused: queue full", numbers.refused)
        yield CounterMetricFamily("secondnature_prompt_tokens", "Prompt tokens read", numbers.prompt_tokens)
        yield CounterMetricFamily(
            "secondnature_completion_tokens", "Tokens generated", numbers.completion_tokens
        )
        yield CounterMetricFamily(
            "secondnature_requests_set_back", "Rows given back for a while: no memory", numbers.set_back
        )
        yield GaugeMetricFamily("secondnature_rows_running", "Rows being decoded", numbers.running)
        yield GaugeMetricFamily(
            "secondnature_requests_waiting", "Requests waiting for a row", numbers.waiting
        )
        yield _histogram("secondnature_time_per_token_seconds", "Between two tokens", numbers.time_per_token)
        yield _histogram(
            "secondnature_time_to_first_token_seconds", "To the first", numbers.time_to_first_token
        )


def _histogram(name: str, text: str, histogram: Histogram) -> HistogramMetricFamily:
    buckets: list[tuple[str, float]] = []
    total = 0
    for bound, count in zip([*map(str, histogram.bounds), "+Inf"], list(histogram.counts), strict=True):
        total += count
        buckets.append((bound, total))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=histogram.total_s)


def exposition(engine: Engine, runner: Runner, clock: Clock) -> bytes:
    """All metrics in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Local(engine))
    registry.register(_Teaching(runner, clock))
    return generate_latest(registry)


def register(runner: Runner, clock: Clock) -> None:
    """Add the weights and the lessons to what another server of this process answers at its own `/metrics`."""
    REGISTRY.register(_Teaching(runner, clock))
