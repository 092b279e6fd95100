"""Numbers for Prometheus: of requests as clients see them, and of the engine."""

import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from deepseek_jax.serve.answering import Piece

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_FAST = (0.001, 0.0025, *_SECONDS[:10])
# Of ``Continuous.metrics``: what only grows.
_COUNTED = ("prompt_tokens", "found_tokens", "tokens", "preemptions", "compiles", "steps", "seconds", "seconds_waited")


class Meters:
    """One set for each app."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        given: dict[str, Any] = {"namespace": "deepseek_jax", "registry": self.registry}
        self._requests = Counter("requests", "Requests that were answered or refused", ["path", "status"], **given)
        self._open = Gauge("answers_open", "Answers that are asked for and have not ended", **given)
        self._ended = Counter("answers", "Answers that have ended", ["finish_reason"], **given)
        self._first = Histogram("time_to_first_token_seconds", "From body to first token", buckets=_SECONDS, **given)
        help_between = "Seconds from one token to the next, those that come together sharing theirs"
        self._between = _Between("deepseek_jax_inter_token_seconds", help_between, _FAST)
        self.registry.register(self._between)
        self._whole = Histogram("request_seconds", "From body to last token", buckets=_SECONDS, **given)
        self._engine = _Engine()
        self.registry.register(self._engine)

    def request(self, path: str, status: int) -> None:
        self._requests.labels(path, str(status)).inc()

    def watch(self, count: int) -> "Watch":
        return Watch(self, count)

    def page(self, engine: dict[str, float]) -> bytes:
        """Prometheus' text, with what the engine says of itself."""
        self._engine.found = engine
        return generate_latest(self.registry)


class _Between(Collector):
    """A histogram that is told of many at once, as Prometheus' own is not: tokens come so."""

    def __init__(self, name: str, told: str, bounds: Sequence[float]):
        self._name, self._told, self._bounds = name, told, bounds
        self._counts, self._sum = [0] * (len(bounds) + 1), 0.0

    def observe(self, seconds: float, times: int) -> None:
        self._counts[bisect_left(self._bounds, seconds)] += times
        self._sum += seconds * times

    def collect(self) -> Iterator[Metric]:
        bounds = [*map(floatToGoString, self._bounds), "+Inf"]
        buckets = [*zip(bounds, accumulate(self._counts), strict=True)]
        yield HistogramMetricFamily(self._name, self._told, buckets=buckets, sum_value=self._sum)


class _Engine(Collector):
    """What ``Continuous.metrics`` said last: counters of what only grows, gauges of the rest."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    def collect(self) -> Iterator[Metric]:
        for name, value in self.found.items():
            kind = CounterMetricFamily if name in _COUNTED or name.startswith("drafts_") else GaugeMetricFamily
            yield kind(f"deepseek_jax_engine_{name}", f"Of the engine: {name.replace('_', ' ')}", value=value)


class Counting:
    """ASGI middleware around all routes: requests are counted."""

    def __init__(self, app: Any, meters: Meters):
        self._app, self._meters = app, meters

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 499  # nothing was answered: the client has gone

        def sent(message: Any) -> Any:
            nonlocal status
            status = message.get("status", status)
            return send(message)

        try:
            await self._app(scope, receive, sent)
        finally:
            self._meters.request(getattr(scope.get("route"), "path", "other"), status)


class Watch:
    """Of one request: when its tokens came."""

    def __init__(self, meters: Meters, count: int):
        self._meters, self._began, self._left = meters, time.perf_counter(), count
        self._last: dict[int, float] = {}
        meters._open.inc(count)

    def piece(self, piece: Piece) -> None:
        meters, now = self._meters, time.perf_counter()
        if piece.count:
            last = self._last.get(piece.index)
            if last is None:
                meters._first.observe(now - self._began)
            else:
                meters._between.observe((now - last) / piece.count, piece.count)
            self._last[piece.index] = now
        if piece.finish_reason:
            meters._ended.labels(piece.finish_reason).inc()
            meters._open.dec()
            self._left -= 1
            if not self._left:
                meters._whole.observe(now - self._began)

    def end(self, reason: str) -> None:
        """What has not ended ends now, for this reason."""
        self._meters._ended.labels(reason).inc(self._left)
        self._meters._open.dec(self._left)
