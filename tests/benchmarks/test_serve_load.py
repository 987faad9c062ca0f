"""The load client's arithmetic, and that it sends the same load to everyone."""

from __future__ import annotations

import json

import pytest

from benchmarks.serve_load import Load, Spread, Timing, make_prompts, summarize, take_event


def test_prompts_depend_on_the_seed_alone() -> None:
    load = Load(requests=3, input_len=5, vocab_size=100)
    assert make_prompts(load) == make_prompts(load)
    assert make_prompts(load) != make_prompts(Load(requests=3, input_len=5, vocab_size=100, seed=8))
    assert all(len(prompt) == 5 and max(prompt) < 100 for prompt in make_prompts(load))


def test_events_count_chunks_and_take_the_servers_token_count() -> None:
    timing = Timing()
    for event in ({"choices": [{"text": "a"}]}, {"choices": []}, {"choices": [], "usage": {"completion_tokens": 7}}):
        take_event(timing, f"data: {json.dumps(event)}", began=0.0)
    for line in ("", ": keep-alive", "data: [DONE]"):
        take_event(timing, line, began=0.0)
    assert (len(timing.chunks), timing.tokens, timing.error) == (1, 7, "")


def test_an_error_event_is_a_failed_request() -> None:
    timing = Timing()
    take_event(timing, 'data: {"error": {"message": "no"}}', began=0.0)
    assert "no" in timing.error


def test_spread_of_known_values() -> None:
    spread = Spread.of([float(value) for value in range(101)])
    assert (spread.mean, spread.p50, spread.p90, spread.p99) == (50.0, 50.0, 90.0, 99.0)


def test_summary_counts_good_requests_only() -> None:
    good = Timing(chunks=[0.5, 0.6, 0.8], tokens=4)
    result = summarize("u", "m", [good, Timing(error="status 503")], duration=2.0)
    assert (result.requests_per_second, result.output_tokens_per_second, result.failed) == (0.5, 2.0, 1)
    assert result.ttft.p50 == 0.5
    assert result.tpot.mean == pytest.approx(0.1)
    assert result.itl.mean == pytest.approx(0.15)
    assert result.first_error == "status 503"
