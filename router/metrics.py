"""What the router measures, in Prometheus' terms; `tandem_router_…` unless a well-known name exists."""

from __future__ import annotations

import asyncio
import logging
import operator
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from tandem.common.errors import TandemError
from tandem.common.metrics import create_registry, exposition
from tandem.common.worker_info import Load
from tandem.router.admission import Admission
from tandem.router.formats import Usage
from tandem.router.membership import Membership
from tandem.router.work import ParsedRequest

log = logging.getLogger("tandem.router")

BLOCK_STATES = ("free", "cached", "owned", "reserved", "quarantined")

FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)  # seconds
SLOW = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 600)


class RouterMetrics:
    """A registry of its own, so that several routers fit into one process."""

    def __init__(self, model_name: str) -> None:
        self.registry = registry = create_registry()
        self._model_name = model_name
        name = "tandem_router_"
        self.http_requests = Counter(
            "http_requests", "HTTP requests by route, method and status", ["handler", "method", "status"],
            registry=registry,
        )  # fmt: skip
        self.requests = Counter(
            name + "requests", "Requests by how they ended: finished, or an error's code", ["outcome"],
            registry=registry,
        )  # fmt: skip
        self.choices = Counter(
            name + "choices", "Finished choices by finish reason", ["finish_reason"], registry=registry
        )
        self.in_flight = Gauge(name + "requests_in_flight", "Requests being served", registry=registry)
        self.retries = Counter(name + "retries", "Attempts beyond a request's first", registry=registry)
        self.degraded_prefills = Counter(
            name + "degraded_prefills", "Prompts prefilled on a decode worker for want of a prefill worker, "
            "or of a hand-off that works",
            registry=registry,
        )  # fmt: skip
        self.disconnects = Counter(
            name + "client_disconnects", "Requests whose client left before the end", registry=registry
        )
        self.prompt_tokens = Counter(name + "prompt_tokens", "Prompt tokens of finished requests", registry=registry)
        self.cached_tokens = Counter(
            name + "cached_tokens", "Prompt tokens of finished requests found in a prefix cache", registry=registry
        )
        self.generation_tokens = Counter(name + "generation_tokens", "Tokens sent to clients", registry=registry)
        self.ttft = Histogram(
            name + "time_to_first_token_seconds", "From a request's arrival to its first token",
            buckets=SLOW, registry=registry,
        )  # fmt: skip
        self.itl = Histogram(
            name + "inter_token_latency_seconds", "Between tokens of a choice", buckets=FAST, registry=registry
        )
        self.e2e = Histogram(
            name + "e2e_request_latency_seconds", "From a request's arrival to its end", buckets=SLOW,
            registry=registry,
        )  # fmt: skip

    def watch_queue(self, admission: Admission) -> None:
        """Also report what waits for its first token."""
        name = "tandem_router_queued_"
        sequences = Gauge(name + "sequences", "Sequences that wait for their first token", registry=self.registry)
        sequences.set_function(lambda: admission.sequences)
        tokens = Gauge(name + "tokens", "Their prompt tokens", registry=self.registry)
        tokens.set_function(lambda: admission.tokens)

    def follow(self, membership: Membership) -> None:
        """Also report what the workers tell on their Watch streams."""
        self.registry.register(_WorkerCollector(membership))

    def text(self) -> bytes:
        """Prometheus' format; the same numbers also under vLLM's names, which dashboards know."""
        return exposition(self.registry, self._model_name)

    @contextmanager
    def request(self, request: ParsedRequest) -> Generator[RequestTimeline]:
        """Count a request from here to its one end, whatever that is."""
        timeline = RequestTimeline(self, request.arrival)
        self.in_flight.inc()
        outcome, why = "internal_error", ""
        try:
            yield timeline
            outcome = "finished"
        except TandemError as exc:
            outcome, why = exc.code, exc.message
            raise
        except asyncio.CancelledError:
            outcome = "client_disconnected"
            self.disconnects.inc()
            raise
        finally:
            self.in_flight.dec()
            self.requests.labels(outcome).inc()
            seconds = time.monotonic() - request.arrival
            self.e2e.observe(seconds)
            level = logging.DEBUG if outcome == "finished" else logging.INFO
            log.log(level, "%s ended as %s after %.3f s. %s", request.id, outcome, seconds, why)


class RequestTimeline:
    """When the tokens of one request came."""

    def __init__(self, metrics: RouterMetrics, arrival: float) -> None:
        self._metrics = metrics
        self._arrival = arrival
        self._last: dict[int, float] = {}  # choice → when its last token came

    def token(self, choice: int) -> None:
        now = time.monotonic()
        if not self._last:
            self._metrics.ttft.observe(now - self._arrival)
        elif choice in self._last:
            self._metrics.itl.observe(now - self._last[choice])
        self._last[choice] = now
        self._metrics.generation_tokens.inc()

    def finished(self, reasons: Sequence[str], usage: Usage) -> None:
        for reason in reasons:
            self._metrics.choices.labels(reason).inc()
        self._metrics.prompt_tokens.inc(usage.prompt_tokens)
        self._metrics.cached_tokens.inc(usage.cached_tokens)


class _WorkerCollector(Collector):
    """Gauges read off the membership when Prometheus asks, so none of a dead worker stays behind."""

    def __init__(self, membership: Membership) -> None:
        self._membership = membership

    def collect(self) -> Iterable[GaugeMetricFamily]:
        loads = self._loads()
        gauges = {"running": "running", "waiting": "waiting", "kv_usage_ratio": "kv_usage"}
        for name, attribute in gauges.items():
            family = GaugeMetricFamily(f"tandem_worker_{name}", "As last told to the router", labels=["worker", "role"])
            for labels, load in loads.items():
                family.add_metric(labels, getattr(load, attribute))
            yield family
        yield _blocks(loads)
        up = GaugeMetricFamily("tandem_router_registry_up", "1 while Redis answers")
        up.add_metric([], float(bool(self._membership.registry_up)))
        yield up

    def _loads(self) -> dict[tuple[str, str], Load]:
        """By name and role. Two incarnations of a name, as while one replaces the other, are one series: their sum."""
        loads: dict[tuple[str, str], Load] = {}
        for worker in self._membership.all_workers():
            labels = (worker.name, worker.description.role)
            loads[labels] = Load(*map(operator.add, astuple(loads.get(labels, Load())), astuple(worker.load)))
        return loads


def _blocks(loads: Mapping[tuple[str, str], Load]) -> GaugeMetricFamily:
    """The invariant to watch: the states of a worker sum up to its pool; at rest all are free or cached."""
    family = GaugeMetricFamily("tandem_worker_blocks", "KV blocks by state", labels=["worker", "role", "state"])
    for labels, load in loads.items():
        for state in BLOCK_STATES:
            family.add_metric([*labels, state], getattr(load, f"blocks_{state}"))
    return family
