"""The text a scraper gets, read back by prometheus_client's own parser, and promtool's naming rules."""

from __future__ import annotations

import re

import pytest
from prometheus_client import REGISTRY
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from tandem.common.metrics import VLLM_NAMES, Alias, WorkerMetrics
from tandem.common.request import LegStats
from tandem.common.worker_info import Load


def busy() -> WorkerMetrics:
    metrics = WorkerMetrics("decode-0", "decode", "demo")
    metrics.set_load(Load(running=3, waiting=2, waiting_tokens=70, blocks_total=10, blocks_free=4, blocks_owned=6))
    metrics.step(0.02, prefill_tokens=64, decode_tokens=3)
    metrics.step(0.03, prefill_tokens=0, decode_tokens=4)
    metrics.prefix_lookup(queried=100, hit=48)
    metrics.preempted()
    metrics.leg_ended("finished", LegStats(queued=0.2, computed=0.4))
    metrics.leg_ended("deadline_exceeded")
    metrics.transfer_ended("finished", 4096, 0.01)
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


def test_numbers_come_out_as_they_went_in() -> None:
    parsed = families(busy().render())
    assert value(parsed, "tandem_worker_sequences", state="waiting", worker="decode-0", role="decode") == 2
    assert value(parsed, "tandem_worker_blocks", state="owned") == 6
    assert value(parsed, "tandem_worker_kv_cache_usage_ratio") == 0.6
    assert value(parsed, "tandem_worker_computed_tokens", phase="decode") == 7
    assert value(parsed, "tandem_worker_legs", outcome="deadline_exceeded") == 1
    assert value(parsed, "tandem_worker_step_seconds") == 2
    assert value(parsed, "tandem_worker_queue_seconds") == 1
    assert value(parsed, "tandem_worker_transfer_bytes") == 4096


def test_the_same_numbers_under_vllms_names() -> None:
    parsed = families(busy().render())
    labels = {"model_name": "demo", "engine": "decode-0"}
    assert value(parsed, "vllm:num_requests_running", **labels) == 3
    assert value(parsed, "vllm:num_requests_waiting", **labels) == 2
    assert value(parsed, "vllm:kv_cache_usage_perc", **labels) == 0.6
    assert value(parsed, "vllm:prefix_cache_hits", **labels) == 48
    assert value(parsed, "vllm:num_preemptions", **labels) == 1
    assert value(parsed, "vllm:request_prefill_time_seconds", **labels) == 1
    text = busy().render().decode()
    assert 'vllm:prefix_cache_queries_total{engine="decode-0",model_name="demo"} 100.0' in text
    assert 'vllm:request_queue_time_seconds_bucket{engine="decode-0",le="0.25",model_name="demo"} 1.0' in text


def test_vllms_names_can_be_left_out() -> None:
    assert all(name.startswith("tandem_") for name in families(busy().render(vllm_names=False)))


def test_each_process_part_has_a_registry_of_its_own() -> None:
    first, second = busy(), WorkerMetrics("decode-1", "decode", "demo")
    assert first.registry is not second.registry
    assert not [family.name for family in REGISTRY.collect() if family.name.startswith("tandem_")]


def test_names_follow_promtools_rules() -> None:
    text = busy().render(vllm_names=False).decode()
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    helped = dict(re.findall(r"^# HELP (\S+) (.+)$", text, re.MULTILINE))
    assert kinds.keys() == helped.keys()
    for name, kind in kinds.items():
        assert re.fullmatch(r"[a-z_]+", name)
        assert name.endswith("_total") == (kind == "counter")
        assert not re.search(r"_(gauge|counter|histogram|summary|count|sum|bucket|info|ms|milliseconds|percent)$", name)
    assert "_created" not in text


def test_no_family_is_shown_twice() -> None:
    names = re.findall(r"^# TYPE (\S+) ", busy().render().decode(), re.MULTILINE)
    assert len(names) == len(set(names))


@pytest.mark.parametrize("alias", VLLM_NAMES, ids=lambda alias: f"{alias.source}-{alias.target}")
def test_no_alias_points_at_a_name_that_does_not_exist(alias: Alias) -> None:
    """A renamed metric would silently vanish from vLLM's family."""
    from tandem.router.metrics import RouterMetrics

    known = {family.name for family in busy().registry.collect()} | {f.name for f in RouterMetrics().registry.collect()}
    read_off_membership = {"tandem_worker_running", "tandem_worker_waiting", "tandem_worker_kv_usage_ratio"}
    assert alias.source in known | read_off_membership
