"""The text a scraper gets, read back by prometheus_client's own parser, and promtool's naming rules."""

from __future__ import annotations

import re

import pytest
from prometheus_client import REGISTRY, Gauge
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from tandem.common.metrics import VLLM_NAMES, Alias, create_registry, exposition
from tandem.router.metrics import RouterMetrics

# What the router shows of the workers it watches (router/metrics.py).
WORKER_GAUGES = ("tandem_worker_running", "tandem_worker_waiting", "tandem_worker_kv_usage_ratio")


def busy() -> RouterMetrics:
    metrics = RouterMetrics("demo")
    metrics.prompt_tokens.inc(100)
    metrics.cached_tokens.inc(48)
    metrics.choices.labels("stop").inc()
    metrics.ttft.observe(0.2)
    for index, name in enumerate(WORKER_GAUGES):
        Gauge(name, "as the router shows it", ["worker"], registry=metrics.registry).labels("decode-0").set(index)
    return metrics


def families(text: bytes) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(text.decode())}


def value(parsed: dict[str, Metric], family: str, **labels: str) -> float:
    found = [
        sample.value
        for sample in parsed[family].samples
        if labels.items() <= sample.labels.items() and not sample.name.endswith(("_bucket", "_sum"))
    ]
    assert len(found) == 1, (family, labels, parsed[family].samples)
    return found[0]


def test_the_same_numbers_under_vllms_names() -> None:
    text = busy().text()
    parsed = families(text)
    assert value(parsed, "vllm:num_requests_waiting", model_name="demo", engine="decode-0") == 1
    assert value(parsed, "vllm:kv_cache_usage_perc", model_name="demo", engine="decode-0") == 2
    assert value(parsed, "vllm:prefix_cache_hits", model_name="demo") == 48
    assert value(parsed, "vllm:prefix_cache_queries", model_name="demo") == 100
    assert value(parsed, "vllm:request_success", finished_reason="stop") == 1
    assert 'vllm:time_to_first_token_seconds_bucket{engine="0",le="0.25",model_name="demo"} 1.0' in text.decode()


def test_vllms_names_can_be_left_out() -> None:
    assert not [name for name in families(exposition(busy().registry)) if name.startswith("vllm")]


def test_each_process_part_has_a_registry_of_its_own() -> None:
    assert create_registry() is not create_registry()
    assert not [family.name for family in REGISTRY.collect() if family.name.startswith("tandem_")]


def test_names_follow_promtools_rules() -> None:
    text = exposition(busy().registry).decode()
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    helped = dict(re.findall(r"^# HELP (\S+) (.+)$", text, re.MULTILINE))
    assert kinds.keys() == helped.keys()
    for name, kind in kinds.items():
        assert re.fullmatch(r"[a-z][a-z0-9_]+", name)
        assert name.endswith("_total") == (kind == "counter")
        assert not re.search(r"_(gauge|counter|histogram|summary|count|sum|bucket|info|ms|milliseconds|percent)$", name)
    assert "_created" not in text


def test_no_family_is_shown_twice() -> None:
    names = re.findall(r"^# TYPE (\S+) ", busy().text().decode(), re.MULTILINE)
    assert len(names) == len(set(names))


@pytest.mark.parametrize("alias", VLLM_NAMES, ids=lambda alias: f"{alias.source}-{alias.target}")
def test_no_alias_points_at_a_name_that_does_not_exist(alias: Alias) -> None:
    """A renamed metric would silently vanish from vLLM's family."""
    assert alias.source in {family.name for family in busy().registry.collect()}
