"""Between the dataclasses of common/ and their protobuf messages.

`…_from_proto` trusts nobody: a leg out of range is its caller's fault (InvalidRequest), anything else that a
worker sent and that cannot be is the worker's (WorkerFailed).
"""

from __future__ import annotations

import math
from typing import cast, get_args

from tandem.common.block_hash import BlockHash
from tandem.common.errors import WorkerFailed
from tandem.common.limits import check_leg
from tandem.common.proto import tandem_pb2 as pb
from tandem.common.request import Leg, LegStats, Logprobs, SamplingParams, Token
from tandem.common.worker_config import ROLES, Role
from tandem.common.worker_info import Description, Load, WorkerEvent, WorkerState

FINISH_REASONS = frozenset({"", "stop", "length"})
STATES: tuple[str, ...] = get_args(WorkerState)
HASH_BYTES = 32

_LOAD_FIELDS = (
    "running", "waiting", "waiting_tokens", "blocks_total", "blocks_free", "blocks_cached", "blocks_owned",
    "blocks_reserved", "blocks_quarantined",
)  # fmt: skip


def leg_to_proto(leg: Leg) -> pb.Leg:
    return pb.Leg(
        request_id=leg.request_id,
        attempt=leg.attempt,
        prompt_ids=leg.prompt_ids,
        sampling=_sampling_to_proto(leg.sampling),
        choices=leg.choices,
        output_ids=leg.output_ids,
        cache_salt=leg.cache_salt,
        timeout=leg.timeout,
        ticket=leg.ticket,
    )


def leg_from_proto(message: pb.Leg) -> Leg:
    """Raises InvalidRequest."""
    leg = Leg(
        request_id=message.request_id,
        attempt=message.attempt,
        prompt_ids=tuple(message.prompt_ids),
        sampling=_sampling_from_proto(message.sampling),
        choices=tuple(message.choices),
        output_ids=tuple(message.output_ids),
        cache_salt=message.cache_salt,
        timeout=message.timeout,
        ticket=message.ticket,
    )
    check_leg(leg)
    return leg


def token_to_proto(token: Token) -> pb.Token:
    message = pb.Token(
        choice=token.choice, index=token.index, token_id=token.token_id, finish_reason=token.finish_reason
    )
    if token.logprobs is not None:
        message.logprob = token.logprobs.chosen
        for token_id, logprob in token.logprobs.top:
            message.top_logprobs.add(token_id=token_id, logprob=logprob)
    return message


def token_from_proto(message: pb.Token) -> Token:
    """Raises WorkerFailed."""
    if message.finish_reason not in FINISH_REASONS:
        raise WorkerFailed(f"worker sent a token with the unknown finish reason {message.finish_reason!r}")
    logprobs = _logprobs_from_proto(message) if message.HasField("logprob") else None
    return Token(message.choice, message.index, message.token_id, message.finish_reason, logprobs)


def stats_to_proto(stats: LegStats) -> pb.LegStats:
    return pb.LegStats(
        queued=stats.queued, computed=stats.computed, handed_off=stats.handed_off, cached_tokens=stats.cached_tokens
    )


def stats_from_proto(message: pb.LegStats) -> LegStats:
    """Raises WorkerFailed."""
    seconds = (message.queued, message.computed, message.handed_off)
    if not all(0 <= value < math.inf for value in seconds):
        raise WorkerFailed(f"worker sent leg statistics with impossible times: {seconds}")
    return LegStats(*seconds, message.cached_tokens)


def load_to_proto(load: Load) -> pb.Load:
    return pb.Load(**{name: getattr(load, name) for name in _LOAD_FIELDS})


def load_from_proto(message: pb.Load) -> Load:
    """Raises WorkerFailed. Only the sum is checked: the parts are unsigned by their type."""
    load = Load(**{name: getattr(message, name) for name in _LOAD_FIELDS})
    in_use = load.blocks_free + load.blocks_cached + load.blocks_owned + load.blocks_reserved + load.blocks_quarantined
    if in_use > load.blocks_total:
        raise WorkerFailed(f"worker reports {in_use} blocks of {load.blocks_total}")
    return load


def description_to_proto(description: Description) -> pb.Description:
    return pb.Description(
        name=description.name,
        role=description.role,
        incarnation=description.incarnation,
        model=description.model,
        fingerprint=description.fingerprint,
        pairing=description.pairing,
        block_size=description.block_size,
        max_model_len=description.max_model_len,
        max_num_seqs=description.max_num_seqs,
        pid=description.pid,
    )


def description_from_proto(message: pb.Description) -> Description:
    """Raises WorkerFailed."""
    if message.role not in ROLES:
        raise WorkerFailed(f"worker {message.name!r} says its role is {message.role!r}")
    if not message.name or not message.incarnation:
        raise WorkerFailed(f"worker {message.name!r} described itself without a name or incarnation")
    if len(message.fingerprint) != HASH_BYTES or len(message.pairing) != HASH_BYTES:
        raise WorkerFailed(f"worker {message.name!r} described itself without the fingerprint or pairing of its KV")
    if not (message.block_size and message.max_model_len and message.max_num_seqs):
        raise WorkerFailed(f"worker {message.name!r} says that it can hold no tokens")
    return Description(
        name=message.name,
        role=cast(Role, message.role),
        incarnation=message.incarnation,
        model=message.model,
        fingerprint=message.fingerprint,
        pairing=message.pairing,
        block_size=message.block_size,
        max_model_len=message.max_model_len,
        max_num_seqs=message.max_num_seqs,
        pid=message.pid,
    )


def event_to_proto(event: WorkerEvent) -> pb.WorkerEvent:
    return pb.WorkerEvent(
        sequence=event.sequence,
        description=description_to_proto(event.description) if event.description else None,
        load=load_to_proto(event.load),
        state=event.state,
        stored=event.stored,
        removed=event.removed,
    )


def event_from_proto(message: pb.WorkerEvent) -> WorkerEvent:
    """Raises WorkerFailed."""
    if message.state not in STATES:
        raise WorkerFailed(f"worker sent an event with the unknown state {message.state!r}")
    if not message.HasField("load") or (message.sequence == 0 and not message.HasField("description")):
        raise WorkerFailed(f"worker sent event {message.sequence} without its load or description")
    return WorkerEvent(
        sequence=message.sequence,
        state=cast(WorkerState, message.state),
        load=load_from_proto(message.load),
        description=description_from_proto(message.description) if message.HasField("description") else None,
        stored=tuple(_hash(value) for value in message.stored),
        removed=tuple(_hash(value) for value in message.removed),
    )


def _hash(value: bytes) -> BlockHash:
    if len(value) != HASH_BYTES:
        raise WorkerFailed(f"worker sent a block hash of {len(value)} bytes")
    return BlockHash(value)


def _logprobs_from_proto(message: pb.Token) -> Logprobs:
    top = tuple((item.token_id, item.logprob) for item in message.top_logprobs)
    if math.isnan(message.logprob) or any(math.isnan(logprob) for _, logprob in top):
        raise WorkerFailed("worker sent a log probability that is not a number")
    return Logprobs(message.logprob, top)


def _sampling_to_proto(sampling: SamplingParams) -> pb.Sampling:
    return pb.Sampling(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        logit_bias=dict(sampling.logit_bias),
        seed=sampling.seed,
        min_tokens=sampling.min_tokens,
        stop_token_ids=sampling.stop_token_ids,
        logprobs=sampling.logprobs,
    )


def _sampling_from_proto(message: pb.Sampling) -> SamplingParams:
    return SamplingParams(
        max_tokens=message.max_tokens,
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty,
        frequency_penalty=message.frequency_penalty,
        presence_penalty=message.presence_penalty,
        logit_bias=tuple(sorted(message.logit_bias.items())),  # a map has no order of its own
        seed=message.seed,
        min_tokens=message.min_tokens,
        stop_token_ids=tuple(message.stop_token_ids),
        logprobs=message.logprobs if message.HasField("logprobs") else None,
    )
