"""From a body to a request: what many prompts have in common is made once, and their count is known first."""

from __future__ import annotations

import json
import time

import pytest

from tandem.common.errors import InvalidRequest
from tandem.router.openai import MAX_SEQUENCES, ModelLimits, parse_completion, to_request
from tandem.router.work import ParsedRequest

LIMITS = ModelLimits(max_model_len=2048, vocab_size=50_000, eos_token_ids=(2,), defaults={}, timeout=600.0)


def requested(prompts: list[list[int]], **fields: object) -> ParsedRequest:
    body = parse_completion(json.dumps({"model": "m", "prompt": prompts, **fields}).encode())
    return to_request(body, prompts, LIMITS, 0.0)


def test_a_small_body_does_not_block_the_event_loop() -> None:
    """22 KB took seconds: every bias was sorted and checked once for each of a thousand prompts."""
    bias = {str(token_id): 1.0 for token_id in range(1024)}
    begun = time.process_time()
    request = requested([[1]] * MAX_SEQUENCES, logit_bias=bias, stop_token_ids=list(range(1000)), max_tokens=1)
    assert time.process_time() - begun < 0.4
    assert len(request.works) == MAX_SEQUENCES
    assert all(work.sampling.logit_bias == tuple((i, 1.0) for i in range(1024)) for work in request.works)


def test_each_prompt_has_its_own_length_and_seed() -> None:
    works = requested([[5] * 2045, [5], [5]]).works
    assert [work.sampling.max_tokens for work in works] == [3, 16, 16]
    assert len({work.sampling.seed for work in works}) == 3
    assert {work.sampling.seed for work in requested([[5], [6]], seed=7).works} == {7}


def test_the_smallest_room_bounds_min_tokens() -> None:
    for prompts in ([[5] * 2045, [5]], [[5], [5] * 2045]):
        with pytest.raises(InvalidRequest, match="min_tokens"):
            requested(prompts, min_tokens=4)


@pytest.mark.parametrize("prompt", [[""] * 349_000, [[1]] * 1025, ["a"] * 513])
def test_too_many_prompts_are_refused_before_they_are_tokenized(prompt: list[object]) -> None:
    body = {"model": "m", "prompt": prompt, "n": 2 if len(prompt) == 513 else 1}
    with pytest.raises(InvalidRequest, match=f"are over {MAX_SEQUENCES} choices") as refused:
        parse_completion(json.dumps(body).encode())
    assert refused.value.param == "n"


@pytest.mark.parametrize("prompt", ["x" * 5000, [1] * 5000, ["a"] * MAX_SEQUENCES])
def test_one_long_prompt_is_one(prompt: object) -> None:
    parse_completion(json.dumps({"model": "m", "prompt": prompt}).encode())
