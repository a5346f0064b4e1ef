"""What /metrics tells, in Prometheus' text format."""

import dataclasses
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from ernie_model.inference.server.gate import Gate

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600)


class Outcome(Enum):
    """How a request ended."""

    DONE = "done"
    REFUSED = "refused"
    """The client's mistake: 4xx."""
    BUSY = "busy"
    """429 and, while draining, 503."""
    GONE = "gone"
    """The client left."""
    LAGGING = "lagging"
    """The client took nothing for `Limits.lag_s`."""
    TIMEOUT = "timeout"
    FAILED = "failed"


class Metrics:
    """Of one server.

    Args:
        engine_stats: returns a dataclass; its numbers are shown as they are at the moment.
    """

    def __init__(self, gate: Gate, engine_stats: Callable[[], Any] | None):
        self.registry = CollectorRegistry()
        self.requests = Counter("ernie_requests", "Requests by how they ended", ["outcome"], registry=self.registry)
        for outcome in Outcome:
            self.requests.labels(outcome.value)
        self.prompt_tokens = Counter("ernie_prompt_tokens", "Tokens of prompts answered", registry=self.registry)
        self.cached_tokens = Counter("ernie_cached_tokens", "Of them, found in the cache", registry=self.registry)
        self.sampled_tokens = Counter("ernie_sampled_tokens", "Tokens of answers", registry=self.registry)
        self.seconds = Histogram(
            "ernie_request_seconds", "First byte to last byte", buckets=_SECONDS, registry=self.registry
        )
        self.first_seconds = Histogram(
            "ernie_first_token_seconds", "Until the first token", buckets=_SECONDS, registry=self.registry
        )
        self.registry.register(_Now(gate, engine_stats))

    def count(self, outcome: Outcome) -> None:
        self.requests.labels(outcome.value).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Now:
    """Gauges that are read when asked for. A collector of prometheus_client."""

    def __init__(self, gate: Gate, engine_stats: Callable[[], Any] | None):
        self.gate = gate
        self.engine_stats = engine_stats

    def collect(self) -> Iterator[GaugeMetricFamily]:
        yield GaugeMetricFamily("ernie_requests_inside", "Requests being answered", value=self.gate.inside)
        yield GaugeMetricFamily("ernie_requests_waiting", "Requests that wait to be read", value=self.gate.waiting)
        if self.engine_stats is None:
            return
        stats = self.engine_stats()
        for field in dataclasses.fields(stats):
            value = getattr(stats, field.name)
            if isinstance(value, int | float):
                name = f"ernie_engine_{field.name}"
                yield GaugeMetricFamily(name, f"EngineStats.{field.name}", value=float(value))
