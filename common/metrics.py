"""What a process measures, in Prometheus' terms: `tandem_…`, and the same numbers again under vLLM's names.

Every process has a registry of its own, never prometheus_client's global one. Names follow promtool's rules, which
forbid vLLM's colon: `exposition` can leave that family out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, disable_created_metrics, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample


def create_registry() -> CollectorRegistry:
    disable_created_metrics()  # a second series per counter that nobody reads
    return CollectorRegistry()


@dataclass(frozen=True, slots=True)
class Alias:
    """The family `source` is also shown as `target`."""

    source: str
    target: str
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
    Alias("tandem_router_prompt_tokens", "vllm:prefix_cache_queries"),
    Alias("tandem_router_cached_tokens", "vllm:prefix_cache_hits"),
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
            labels = {"model_name": self._model_name, "engine": sample.labels.get("worker", "0")}
            labels |= {new: sample.labels[old] for old, new in (*alias.rename, ("le", "le")) if old in sample.labels}
            yield sample._replace(name=alias.target + sample.name.removeprefix(alias.source), labels=labels)
