"""The ranges of a request's numbers: the one definition that the router and the workers check against."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tandem.common.errors import InvalidRequest
from tandem.common.request import Leg, SamplingParams

MAX_TOKEN_ID = (1 << 31) - 1
MAX_PROMPT_TOKENS = 1 << 22  # fits a gRPC message; the model's own limit is far below
MAX_CHOICES = 128
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20
MAX_REQUEST_ID = 256  # characters
MAX_CACHE_SALT = 256  # bytes
MAX_TICKET = 4096  # bytes
MAX_TIMEOUT = 7 * 24 * 3600.0  # seconds


@dataclass(frozen=True, slots=True)
class Range:
    """Values from `low` to `high`, both allowed unless `above_low`; never NaN."""

    low: float
    high: float
    above_low: bool = False

    def check(self, name: str, value: float) -> None:
        """Raises InvalidRequest with `param` = name."""
        if self.low <= value <= self.high and not (self.above_low and value == self.low):
            return
        floor = f"above {self.low:g}" if self.above_low else f"at least {self.low:g}"
        raise InvalidRequest(f"{name} must be {floor} and at most {self.high:g}, got {value!r}", param=name)


RANGES: dict[str, Range] = {
    "max_tokens": Range(1, MAX_TOKEN_ID),
    "temperature": Range(0, 2),
    "top_k": Range(0, MAX_TOKEN_ID),
    "top_p": Range(0, 1, above_low=True),
    "min_p": Range(0, 1),
    "repetition_penalty": Range(0, 10, above_low=True),
    "frequency_penalty": Range(-2, 2),
    "presence_penalty": Range(-2, 2),
    "min_tokens": Range(0, MAX_TOKEN_ID),
}
LOGIT_BIAS = Range(-100, 100)
LOGPROBS = Range(0, MAX_LOGPROBS)


def check_sampling(sampling: SamplingParams) -> None:
    """Raises InvalidRequest that names the first field out of range."""
    for name, allowed in RANGES.items():
        allowed.check(name, getattr(sampling, name))
    if sampling.min_tokens > sampling.max_tokens:
        raise InvalidRequest(
            f"min_tokens must be at most max_tokens = {sampling.max_tokens}, got {sampling.min_tokens}",
            param="min_tokens",
        )
    if not 0 <= sampling.seed < 1 << 64:
        raise InvalidRequest(f"seed must be an unsigned 64-bit integer, got {sampling.seed}", param="seed")
    if sampling.logprobs is not None:
        LOGPROBS.check("logprobs", sampling.logprobs)
    _check_count("logit_bias", len(sampling.logit_bias), MAX_LOGIT_BIAS)
    for token_id, bias in sampling.logit_bias:
        check_token_ids("logit_bias", (token_id,))
        LOGIT_BIAS.check("logit_bias", bias)
    _check_count("stop_token_ids", len(sampling.stop_token_ids), MAX_STOP_TOKEN_IDS)
    check_token_ids("stop_token_ids", sampling.stop_token_ids)


def check_leg(leg: Leg) -> None:
    """Raises InvalidRequest. Whether the ids exist in the model's vocabulary is the worker's to check."""
    if not 0 < len(leg.request_id) <= MAX_REQUEST_ID:
        raise InvalidRequest(f"request_id must have 1 to {MAX_REQUEST_ID} characters", param="request_id")
    if not leg.prompt_ids:
        raise InvalidRequest("the prompt is empty; send at least one token", param="prompt")
    _check_count("prompt", len(leg.prompt_ids) + len(leg.output_ids), MAX_PROMPT_TOKENS)
    check_token_ids("prompt", leg.prompt_ids)
    check_token_ids("output_ids", leg.output_ids)
    _check_choices(leg)
    _check_count("cache_salt", len(leg.cache_salt), MAX_CACHE_SALT)
    _check_count("ticket", len(leg.ticket), MAX_TICKET)
    if not (math.isfinite(leg.timeout) and leg.timeout <= MAX_TIMEOUT):
        raise InvalidRequest(f"timeout must be at most {MAX_TIMEOUT:g} s, got {leg.timeout!r}", param="timeout")
    check_sampling(leg.sampling)


def check_token_ids(name: str, token_ids: tuple[int, ...]) -> None:
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) <= MAX_TOKEN_ID):
        raise InvalidRequest(f"{name} holds a token id that is not between 0 and {MAX_TOKEN_ID}", param=name)


def _check_choices(leg: Leg) -> None:
    if not leg.choices or len(set(leg.choices)) != len(leg.choices):
        raise InvalidRequest("the choices of a leg must be distinct, and at least one", param="n")
    if len(leg.choices) > MAX_CHOICES or not (min(leg.choices) >= 0 and max(leg.choices) < MAX_CHOICES):
        raise InvalidRequest(f"n must be at most {MAX_CHOICES}", param="n")
    if leg.output_ids and len(leg.choices) > 1:
        raise InvalidRequest("a leg that resumes has exactly one choice", param="n")


def _check_count(name: str, count: int, limit: int) -> None:
    if count > limit:
        raise InvalidRequest(f"{name} has {count} elements, the limit is {limit}", param=name)
