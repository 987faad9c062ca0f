"""What a process measures, in Prometheus' terms: `tandem_…`, and the same numbers again under vLLM's names.

Every process has a registry of its own, never prometheus_client's global one. Names follow promtool's rules, which
forbid vLLM's colon: `exposition` can leave that family out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from tandem.common.request import LegStats
from tandem.common.worker_info import Load

STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # seconds
WAIT_BUCKETS = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

SEQUENCE_STATES = ("running", "waiting")
BLOCK_STATES = ("free", "cached", "owned", "reserved", "quarantined")


def create_registry() -> CollectorRegistry:
    disable_created_metrics()  # a second series per counter that nobody reads
    return CollectorRegistry()


class WorkerMetrics:
    """One worker's numbers. Thread-safe. Labels `worker` and `role` are on every series."""

    def __init__(self, worker: str, role: str, model_name: str) -> None:
        self.registry = create_registry()
        self._model_name = model_name
        self._labels = {"worker": worker, "role": role}
        self._sequences = self._gauge("sequences", "Sequences by state", "state")
        self._waiting_tokens = self._gauge("waiting_tokens", "Prompt tokens not yet computed")
        self._blocks = self._gauge("blocks", "KV blocks by state", "state")
        self._kv_usage = self._gauge("kv_cache_usage_ratio", "Share of KV blocks that cannot be had, 0 to 1")
        self._prefix_queried = self._counter("prefix_cache_queried_tokens", "Prompt tokens looked up")
        self._prefix_hit = self._counter("prefix_cache_hit_tokens", "Prompt tokens found in the prefix cache")
        self._preemptions = self._counter("preemptions", "Sequences put back because memory ran out")
        self._tokens = self._counter("computed_tokens", "Tokens run through the model", "phase")
        self._steps = self._histogram("step_seconds", "Duration of one engine step", STEP_BUCKETS)
        self._legs = self._counter("legs", "Legs by how they ended: finished, or an error's code", "outcome")
        self._queued = self._histogram("queue_seconds", "From a leg's arrival to its first chunk", WAIT_BUCKETS)
        self._computed = self._histogram("prefill_seconds", "From the first chunk to the first token", WAIT_BUCKETS)
        self._transfers = self._counter("transfers", "KV hand-offs: finished, or an error's code", "outcome")
        self._transfer_bytes = self._counter("transfer_bytes", "KV bytes handed off")
        self._transfer_seconds = self._histogram("transfer_seconds", "From first token to Ack", WAIT_BUCKETS)

    def set_load(self, load: Load) -> None:
        for state in SEQUENCE_STATES:
            self._sequences.labels(**self._labels, state=state).set(getattr(load, state))
        for state in BLOCK_STATES:
            self._blocks.labels(**self._labels, state=state).set(getattr(load, f"blocks_{state}"))
        self._waiting_tokens.labels(**self._labels).set(load.waiting_tokens)
        self._kv_usage.labels(**self._labels).set(load.kv_usage)

    def step(self, seconds: float, prefill_tokens: int, decode_tokens: int) -> None:
        """One engine step and the tokens it computed."""
        self._steps.labels(**self._labels).observe(seconds)
        self._tokens.labels(**self._labels, phase="prefill").inc(prefill_tokens)
        self._tokens.labels(**self._labels, phase="decode").inc(decode_tokens)

    def prefix_lookup(self, queried: int, hit: int) -> None:
        """A prompt of `queried` tokens of which `hit` were cached."""
        self._prefix_queried.labels(**self._labels).inc(queried)
        self._prefix_hit.labels(**self._labels).inc(hit)

    def preempted(self, count: int = 1) -> None:
        self._preemptions.labels(**self._labels).inc(count)

    def leg_ended(self, outcome: str, stats: LegStats | None = None) -> None:
        """`outcome` is "finished" or the code of its error."""
        self._legs.labels(**self._labels, outcome=outcome).inc()
        if stats is not None:
            self._queued.labels(**self._labels).observe(stats.queued)
            self._computed.labels(**self._labels).observe(stats.computed)

    def transfer_ended(self, outcome: str, num_bytes: int, seconds: float) -> None:
        """A hand-off of `num_bytes` that took `seconds`; `outcome` as for a leg."""
        self._transfers.labels(**self._labels, outcome=outcome).inc()
        self._transfer_bytes.labels(**self._labels).inc(num_bytes)
        self._transfer_seconds.labels(**self._labels).observe(seconds)

    def render(self, vllm_names: bool = True) -> bytes:
        return exposition(self.registry, self._model_name if vllm_names else None)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"tandem_worker_{name}", text, [*self._labels, *labels], registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"tandem_worker_{name}", text, [*self._labels, *labels], registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"tandem_worker_{name}", text, [*self._labels], buckets=buckets, registry=self.registry)


@dataclass(frozen=True, slots=True)
class Alias:
    """The family `source` (only samples with label `only`, if given) is also shown as `target`."""

    source: str
    target: str
    only: tuple[str, str] | None = None
    rename: tuple[tuple[str, str], ...] = ()  # labels to keep, under the name vLLM gives them


# Grafana boards, KEDA recipes and the Gateway API inference extension read these.
VLLM_NAMES: tuple[Alias, ...] = (
    Alias("tandem_router_time_to_first_token_seconds", "vllm:time_to_first_token_seconds"),
    Alias("tandem_router_inter_token_latency_seconds", "vllm:inter_token_latency_seconds"),
    Alias("tandem_router_e2e_request_latency_seconds", "vllm:e2e_request_latency_seconds"),
    Alias("tandem_router_prompt_tokens", "vllm:prompt_tokens"),
    Alias("tandem_router_generation_tokens", "vllm:generation_tokens"),
    Alias("tandem_router_choices", "vllm:request_success", rename=(("finish_reason", "finished_reason"),)),
    Alias("tandem_worker_running", "vllm:num_requests_running"),
    Alias("tandem_worker_waiting", "vllm:num_requests_waiting"),
    Alias("tandem_worker_kv_usage_ratio", "vllm:kv_cache_usage_perc"),
    Alias("tandem_worker_sequences", "vllm:num_requests_running", only=("state", "running")),
    Alias("tandem_worker_sequences", "vllm:num_requests_waiting", only=("state", "waiting")),
    Alias("tandem_worker_kv_cache_usage_ratio", "vllm:kv_cache_usage_perc"),
    Alias("tandem_worker_prefix_cache_queried_tokens", "vllm:prefix_cache_queries"),
    Alias("tandem_worker_prefix_cache_hit_tokens", "vllm:prefix_cache_hits"),
    Alias("tandem_worker_preemptions", "vllm:num_preemptions"),
    Alias("tandem_worker_queue_seconds", "vllm:request_queue_time_seconds"),
    Alias("tandem_worker_prefill_seconds", "vllm:request_prefill_time_seconds"),
)


def exposition(registry: CollectorRegistry, model_name: str | None = None) -> bytes:
    """Prometheus' text format; with a `model_name` also the family under vLLM's names."""
    text = generate_latest(registry)
    if model_name is None:
        return text
    aliases = CollectorRegistry()
    aliases.register(_Aliases(registry, model_name))
    return text + generate_latest(aliases)


class _Aliases(Collector):
    def __init__(self, source: CollectorRegistry, model_name: str) -> None:
        self._source = source
        self._model_name = model_name

    def collect(self) -> Iterable[Metric]:
        families = {family.name: family for family in self._source.collect()}
        for alias in VLLM_NAMES:
            if alias.source in families:
                yield self._renamed(families[alias.source], alias)

    def _renamed(self, family: Metric, alias: Alias) -> Metric:
        renamed = Metric(alias.target, family.documentation, family.type)
        renamed.samples = list(self._samples(family, alias))
        return renamed

    def _samples(self, family: Metric, alias: Alias) -> Iterator[Sample]:
        for sample in family.samples:
            if alias.only is not None and sample.labels.get(alias.only[0]) != alias.only[1]:
                continue
            labels = {"model_name": self._model_name, "engine": sample.labels.get("worker", "0")}
            labels |= {new: sample.labels[old] for old, new in (*alias.rename, ("le", "le")) if old in sample.labels}
            yield sample._replace(name=alias.target + sample.name.removeprefix(alias.source), labels=labels)
