"""Round trips through real serialized bytes, and what from_proto refuses."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.common import convert, limits
from tandem.common.errors import InvalidRequest, WorkerFailed
from tandem.common.proto import tandem_pb2 as pb
from tandem.common.request import Leg, LegStats, Logprobs, SamplingParams, Token
from tandem.common.worker_info import Description, Load, WorkerEvent

U32 = st.integers(0, 2**32 - 1)
IDS = st.integers(0, limits.MAX_TOKEN_ID)
BIASES = st.dictionaries(IDS, st.floats(-100, 100), max_size=5).map(lambda bias: tuple(sorted(bias.items())))
SECONDS = st.floats(0, 1e6)


@st.composite
def samplings(draw: st.DrawFn) -> SamplingParams:
    max_tokens = draw(st.integers(1, 10**6))
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=draw(st.floats(0, 2)),
        top_k=draw(st.integers(0, 1000)),
        top_p=draw(st.floats(0, 1, exclude_min=True)),
        min_p=draw(st.floats(0, 1)),
        repetition_penalty=draw(st.floats(0, 10, exclude_min=True)),
        frequency_penalty=draw(st.floats(-2, 2)),
        presence_penalty=draw(st.floats(-2, 2)),
        logit_bias=draw(BIASES),
        seed=draw(st.integers(0, 2**64 - 1)),
        min_tokens=draw(st.integers(0, max_tokens)),
        stop_token_ids=tuple(draw(st.lists(IDS, max_size=5))),
        logprobs=draw(st.none() | st.integers(0, 20)),
    )


@st.composite
def legs(draw: st.DrawFn) -> Leg:
    choices = draw(st.lists(st.integers(0, 127), min_size=1, max_size=8, unique=True))
    return Leg(
        request_id=draw(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)),
        attempt=draw(U32),
        prompt_ids=tuple(draw(st.lists(IDS, min_size=1, max_size=40))),
        sampling=draw(samplings()),
        choices=tuple(choices),
        output_ids=tuple(draw(st.lists(IDS, max_size=5))) if len(choices) == 1 else (),
        cache_salt=draw(st.binary(max_size=64)),
        timeout=draw(st.floats(-10, 1e5)),
        ticket=draw(st.binary(max_size=200)),
    )


LOGPROBS = st.builds(
    Logprobs,
    st.floats(max_value=0),
    st.lists(st.tuples(U32, st.floats(max_value=0)), max_size=4).map(tuple),
)
TOKENS = st.builds(Token, U32, U32, U32, st.sampled_from(["", "stop", "length"]), st.none() | LOGPROBS)
STATS = st.builds(LegStats, SECONDS, SECONDS, SECONDS, U32)
DESCRIPTION = Description("prefill-0", "prefill", "ab12", "f00", bytes(32), bytes(32), 16, 4096, 8, 77)
HASHES = st.lists(st.binary(min_size=32, max_size=32), max_size=4).map(tuple)


@given(legs())
def test_leg_round_trip(leg: Leg) -> None:
    wire = convert.leg_to_proto(leg).SerializeToString()
    assert convert.leg_from_proto(pb.Leg.FromString(wire)) == leg


@given(TOKENS)
def test_token_round_trip(token: Token) -> None:
    wire = convert.token_to_proto(token).SerializeToString()
    assert convert.token_from_proto(pb.Token.FromString(wire)) == token


@given(STATS)
def test_stats_round_trip(stats: LegStats) -> None:
    wire = convert.stats_to_proto(stats).SerializeToString()
    assert convert.stats_from_proto(pb.LegStats.FromString(wire)) == stats


@given(
    st.integers(0, 2**64 - 1),
    st.lists(st.integers(0, 2**28), min_size=5, max_size=5),
    st.lists(U32, min_size=3, max_size=3),
    st.booleans(),
    HASHES,
    HASHES,
)
def test_event_round_trip(
    sequence: int, blocks: list[int], counts: list[int], draining: bool, stored: Any, removed: Any
) -> None:
    event = WorkerEvent(
        sequence,
        "draining" if draining else "ready",
        Load(*counts, sum(blocks), *blocks),  # pyright: ignore[reportCallIssue]  # the lists have fixed lengths
        DESCRIPTION if sequence == 0 else None,
        stored,
        removed,
    )
    wire = convert.event_to_proto(event).SerializeToString()
    assert convert.event_from_proto(pb.WorkerEvent.FromString(wire)) == event


@given(st.binary(max_size=300))
def test_any_bytes_are_a_valid_leg_or_a_typed_error(data: bytes) -> None:
    try:
        message = pb.Leg.FromString(data)
    except Exception:  # protobuf's DecodeError: gRPC refuses those itself
        return
    try:
        leg = convert.leg_from_proto(message)
    except InvalidRequest:
        return
    assert leg.prompt_ids
    assert leg.sampling.max_tokens >= 1


LEG = Leg("r", 0, (1, 2, 3), SamplingParams(max_tokens=4))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.5),
        ("min_p", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("frequency_penalty", 2.5),
        ("presence_penalty", -math.inf),
        ("logit_bias", ((1, 101.0),)),
        ("logit_bias", ((1, math.nan),)),
        ("logit_bias", ((2**31, 1.0),)),
        ("logit_bias", tuple((i, 0.0) for i in range(1025))),
        ("min_tokens", 5),
        ("stop_token_ids", (2**31,)),
        ("stop_token_ids", tuple(range(1025))),
        ("logprobs", 21),
    ],
)
def test_sampling_out_of_range_names_the_field(field: str, value: Any) -> None:
    sampling = dataclasses.replace(LEG.sampling, **{field: value})
    with pytest.raises(InvalidRequest, match=field) as caught:
        convert.leg_from_proto(convert.leg_to_proto(dataclasses.replace(LEG, sampling=sampling)))
    assert caught.value.param == field


def test_seed_must_fit_64_bits() -> None:
    with pytest.raises(InvalidRequest, match="seed"):
        limits.check_sampling(SamplingParams(max_tokens=1, seed=2**64))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("request_id", ""),
        ("request_id", "x" * 257),
        ("prompt_ids", ()),
        ("prompt_ids", (2**31,)),
        ("output_ids", (2**32 - 1,)),
        ("choices", ()),
        ("choices", (1, 1)),
        ("choices", (128,)),
        ("choices", tuple(range(129))),
        ("cache_salt", bytes(257)),
        ("ticket", bytes(4097)),
        ("timeout", math.nan),
        ("timeout", math.inf),
        ("timeout", 1e9),
    ],
)
def test_leg_out_of_range_is_refused(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest):
        convert.leg_from_proto(convert.leg_to_proto(dataclasses.replace(LEG, **{field: value})))


def test_several_choices_cannot_resume() -> None:
    leg = dataclasses.replace(LEG, choices=(0, 1), output_ids=(7,))
    with pytest.raises(InvalidRequest, match="exactly one choice"):
        convert.leg_from_proto(convert.leg_to_proto(leg))


@pytest.mark.parametrize(
    "message",
    [
        pb.Token(finish_reason="tired"),
        pb.Token(logprob=math.nan),
        pb.Token(logprob=-1, top_logprobs=[pb.TopLogprob(token_id=1, logprob=math.nan)]),
    ],
)
def test_impossible_token_is_the_workers_fault(message: pb.Token) -> None:
    with pytest.raises(WorkerFailed):
        convert.token_from_proto(message)


@pytest.mark.parametrize("queued", [-1.0, math.nan, math.inf])
def test_impossible_stats_are_the_workers_fault(queued: float) -> None:
    with pytest.raises(WorkerFailed):
        convert.stats_from_proto(pb.LegStats(queued=queued))


def event(**changes: Any) -> pb.WorkerEvent:
    message = convert.event_to_proto(WorkerEvent(0, "ready", Load(blocks_total=4, blocks_free=4), DESCRIPTION))
    for name, value in changes.items():
        message.ClearField(name)  # pyright: ignore[reportArgumentType]
        if value is not None:
            message.MergeFrom(pb.WorkerEvent(**{name: value}))
    return message


@pytest.mark.parametrize(
    "message",
    [
        event(state="asleep"),
        event(state=None),
        event(description=None),
        event(load=None),
        event(load=pb.Load(blocks_total=1, blocks_free=1, blocks_owned=1)),
        event(stored=[b"short"]),
        event(removed=[bytes(33)]),
        event(description=pb.Description()),
        event(
            description=pb.Description(name="n", role="both", incarnation="i", fingerprint=bytes(32), pairing=bytes(32))
        ),
        event(
            description=pb.Description(
                name="n", role="decode", incarnation="i", fingerprint=bytes(31), pairing=bytes(32)
            )
        ),
        event(description=pb.Description(name="n", role="decode", incarnation="i", fingerprint=bytes(32))),
        event(
            description=pb.Description(
                name="n", role="decode", incarnation="i", fingerprint=bytes(32), pairing=bytes(32)
            )
        ),
    ],
)
def test_impossible_event_is_the_workers_fault(message: pb.WorkerEvent) -> None:
    with pytest.raises(WorkerFailed):
        convert.event_from_proto(message)


def test_unchanged_event_passes() -> None:
    assert convert.event_from_proto(event()).description == DESCRIPTION


def test_kv_usage_counts_what_cannot_be_had() -> None:
    load = Load(blocks_total=10, blocks_free=3, blocks_cached=2, blocks_owned=4, blocks_reserved=1)
    assert load.kv_usage == 0.5
    assert Load().kv_usage == 0.0
