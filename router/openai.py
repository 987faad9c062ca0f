"""The OpenAI API's requests: from bytes to ParsedRequest, the only way into the router.

    bytes ─parse_chat─► ChatBody ─(template, tokenizer: prompts.py)─► token ids ─to_request─► ParsedRequest

schema.py checks types, common/limits.py ranges, as on the workers; this module checks what neither can know.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from tandem.common.errors import ContextLengthExceeded, InvalidRequest
from tandem.common.limits import (
    LOGIT_BIAS,
    LOGPROBS,
    MAX_CACHE_SALT,
    MAX_LOGIT_BIAS,
    MAX_STOP_TOKEN_IDS,
    MAX_TOKEN_ID,
    RANGES,
    Range,
    check_sampling,
)
from tandem.common.request import SamplingParams
from tandem.router.schema import ChatBody, CompletionBody, GenerationBody, parse_json, validate
from tandem.router.unsupported import CHAT, COMPLETIONS, refuse_unsupported
from tandem.router.work import OutputOptions, ParsedRequest, Work

MAX_SEQUENCES = 1024  # prompts × n
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024  # characters
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's

N = Range(1, 64)
SEED = Range(-(1 << 63), (1 << 64) - 1)
TOP_K = Range(-1, MAX_TOKEN_ID)
# Of sampling fields that the client may leave to the model's generation_config.json.
NUMBERS = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What a request is checked against, and completed from."""

    max_model_len: int  # tokens
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    defaults: Mapping[str, float]  # of the fields in NUMBERS
    timeout: float  # seconds from arrival to deadline


def parse_chat(data: bytes) -> ChatBody:
    """Raises InvalidRequest that names the field at fault."""
    value = parse_json(data)
    refuse_unsupported(value, CHAT)
    body = validate(ChatBody, value)
    if not body.messages:
        raise InvalidRequest("messages is empty; send at least one message", param="messages")
    if body.top_logprobs is not None:
        LOGPROBS.check("top_logprobs", body.top_logprobs)
        if body.top_logprobs and not body.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    _check(body)
    return body


def parse_completion(data: bytes) -> CompletionBody:
    """Raises InvalidRequest that names the field at fault."""
    value = parse_json(data)
    refuse_unsupported(value, COMPLETIONS)
    body = validate(CompletionBody, value)
    if body.logprobs is not None:
        LOGPROBS.check("logprobs", body.logprobs)
        if body.echo:
            raise InvalidRequest("echo together with logprobs is not supported by this server", param="echo")
    _check(body)
    _check_sequences(body)
    return body


def to_request(
    body: ChatBody | CompletionBody, prompts: Sequence[Sequence[int]], limits: ModelLimits, arrival: float
) -> ParsedRequest:
    """Raises InvalidRequest, ContextLengthExceeded. `arrival` is monotonic seconds."""
    for prompt in prompts:
        _check_prompt(prompt, limits)
    lengths = [_max_tokens(body, len(prompt), limits) for prompt in prompts]
    common = _sampling(body, min(lengths), limits)  # once: it may hold a thousand biases, and there a thousand prompts
    works = tuple(
        Work(
            id=secrets.token_hex(16),
            prompt_ids=tuple(prompt),
            sampling=replace(common, max_tokens=length, seed=_seed(body)),
            choices=body.n or 1,
            cache_salt=(body.cache_salt or "").encode(),
            deadline=arrival + limits.timeout,
        )
        for prompt, length in zip(prompts, lengths, strict=True)
    )
    prefix = "chatcmpl" if isinstance(body, ChatBody) else "cmpl"
    return ParsedRequest(f"{prefix}-{secrets.token_hex(16)}", body.model, works, _output(body), arrival)


def stop_strings(body: GenerationBody) -> tuple[str, ...]:
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())


def _check(body: ChatBody | CompletionBody) -> None:
    """What needs neither the tokenizer nor a worker is refused before either is asked."""
    if body.n is not None:
        N.check("n", body.n)
    for name in ("max_tokens", "max_completion_tokens", "min_tokens", *NUMBERS):
        value = getattr(body, name, None)
        if value is not None:
            (TOP_K if name == "top_k" else RANGES[_limit_name(name)]).check(name, value)
    if body.seed is not None:
        SEED.check("seed", body.seed)
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream: true", param="stream_options")
    if len((body.cache_salt or "").encode()) > MAX_CACHE_SALT:
        raise InvalidRequest(f"cache_salt is over {MAX_CACHE_SALT} bytes", param="cache_salt")
    _check_stops(body)
    _check_logit_bias(body.logit_bias or {})


def _check_sequences(body: CompletionBody) -> None:
    several = isinstance(body.prompt, list) and not any(isinstance(item, int) for item in body.prompt[:1])
    prompts, choices = len(body.prompt) if several else 1, body.n or 1
    if prompts * choices > MAX_SEQUENCES:
        raise InvalidRequest(f"{prompts} prompts with n = {choices} are over {MAX_SEQUENCES} choices", param="n")


def _limit_name(name: str) -> str:
    return "max_tokens" if name == "max_completion_tokens" else name


def _check_stops(body: GenerationBody) -> None:
    stops = stop_strings(body)
    if len(stops) > MAX_STOP_STRINGS:
        raise InvalidRequest(f"stop has {len(stops)} strings, the limit is {MAX_STOP_STRINGS}", param="stop")
    if not all(0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
        raise InvalidRequest(f"stop strings must have 1 to {MAX_STOP_LENGTH} characters", param="stop")
    if len(body.stop_token_ids or ()) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest(f"stop_token_ids has more than {MAX_STOP_TOKEN_IDS} elements", param="stop_token_ids")


def _check_logit_bias(bias: Mapping[str, float]) -> None:
    if len(bias) > MAX_LOGIT_BIAS:
        raise InvalidRequest(f"logit_bias has {len(bias)} elements, the limit is {MAX_LOGIT_BIAS}", param="logit_bias")
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit() and len(key) <= len(str(MAX_TOKEN_ID))):
            raise InvalidRequest(f"logit_bias keys are token ids as strings, got {key[:32]!r}", param="logit_bias")
        LOGIT_BIAS.check("logit_bias", value)


def _check_prompt(prompt: Sequence[int], limits: ModelLimits) -> None:
    if not prompt:
        raise InvalidRequest("the prompt is empty; send at least one token", param="prompt")
    _check_vocabulary("prompt", prompt, limits)


def _check_vocabulary(name: str, token_ids: Iterable[int], limits: ModelLimits) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < limits.vocab_size:
            raise InvalidRequest(f"{name} holds token id {token_id}; the model has {limits.vocab_size}", param=name)


def _max_tokens(body: ChatBody | CompletionBody, prompt_len: int, limits: ModelLimits) -> int:
    """What the client asked, or what the context leaves: all of it for chat, up to 16 for completions."""
    chat = isinstance(body, ChatBody)
    asked = (body.max_completion_tokens if chat else None) or body.max_tokens
    needed = asked or 1
    if prompt_len + needed > limits.max_model_len:
        what = "messages" if chat else "prompt"
        raise ContextLengthExceeded(
            f"This model's maximum context length is {limits.max_model_len} tokens. However, you requested "
            f"{prompt_len + needed} tokens ({prompt_len} in the {what}, {needed} in the completion). "
            f"Please reduce the length of the {what} or completion.",
            param=what,
        )
    room = limits.max_model_len - prompt_len
    return asked or (room if chat else min(room, DEFAULT_COMPLETION_TOKENS))


def _seed(body: GenerationBody) -> int:
    return secrets.randbits(64) if body.seed is None else body.seed % (1 << 64)


def _sampling(body: ChatBody | CompletionBody, max_tokens: int, limits: ModelLimits) -> SamplingParams:
    """What the prompts of a request have in common: all but the seed."""
    numbers = dict(limits.defaults) | {name: value for name in NUMBERS if (value := getattr(body, name)) is not None}
    numbers["top_k"] = max(int(numbers.get("top_k", 0)), 0)
    bias = tuple(sorted((int(key), value) for key, value in (body.logit_bias or {}).items()))
    _check_vocabulary("logit_bias", (token_id for token_id, _ in bias), limits)
    _check_vocabulary("stop_token_ids", body.stop_token_ids or (), limits)
    ends = () if body.ignore_eos else limits.eos_token_ids
    sampling = SamplingParams(
        max_tokens=max_tokens,
        logit_bias=bias,
        min_tokens=body.min_tokens or 0,
        stop_token_ids=tuple(dict.fromkeys((*ends, *(body.stop_token_ids or ())))),
        logprobs=_top_logprobs(body),
    )
    sampling = replace(sampling, **numbers)
    check_sampling(sampling)
    return sampling


def _top_logprobs(body: ChatBody | CompletionBody) -> int | None:
    if isinstance(body, CompletionBody):
        return body.logprobs
    return (body.top_logprobs or 0) if body.logprobs else None


def _output(body: ChatBody | CompletionBody) -> OutputOptions:
    stream = body.stream_options
    return OutputOptions(
        stream=bool(body.stream),
        include_usage=bool(stream and stream.include_usage),
        continuous_usage=bool(stream and stream.continuous_usage_stats),
        stop=stop_strings(body),
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        echo=isinstance(body, CompletionBody) and bool(body.echo),
        top_logprobs=_top_logprobs(body),
        token_ids=bool(body.return_token_ids),
    )
