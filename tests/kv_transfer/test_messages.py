"""The codec of common/handoff.py against bytes from anywhere: a well-typed message, or FrameError."""

from __future__ import annotations

import dataclasses
from typing import get_type_hints

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.common.handoff import (
    MAX_ITEMS,
    MAX_MESSAGE_BYTES,
    Abort,
    Ack,
    Frame,
    FrameError,
    Grant,
    Heartbeat,
    Manifest,
    Refuse,
    Released,
    Rendezvous,
    Reserve,
    Ticket,
    TicketRefused,
    decode,
    encode,
)

KINDS = (Reserve, Grant, Refuse, Frame, Manifest, Ack, Abort, Rendezvous, Released, Heartbeat)
KEY = b"k" * 32
INT = st.integers(0, (1 << 63) - 1)
VALUES: dict[object, st.SearchStrategy] = {
    int: INT,
    bool: st.booleans(),
    str: st.text(max_size=20),
    bytes: st.binary(max_size=40),
    float: st.floats(allow_nan=False),
    tuple[int, ...]: st.lists(INT, max_size=5).map(tuple),
    tuple[bytes, ...]: st.lists(st.binary(max_size=20), max_size=5).map(tuple),
}


def pack(values: object) -> bytes:
    data = msgpack.packb(values)
    assert data is not None
    return data


def instances(cls) -> st.SearchStrategy:
    hints = get_type_hints(cls)
    return st.builds(cls, **{field.name: VALUES[hints[field.name]] for field in dataclasses.fields(cls)})


messages = st.one_of([instances(cls) for cls in KINDS])
junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=8,
)


def decode_or_refuse(data: bytes) -> None:
    try:
        message = decode(data)
    except FrameError:
        return
    assert isinstance(message, KINDS)
    hints = get_type_hints(type(message))
    for field in dataclasses.fields(message):
        value, hint = getattr(message, field.name), hints[field.name]
        assert type(value) is (hint if isinstance(hint, type) else tuple)
    assert decode(encode(message)) == message


@settings(max_examples=100, deadline=None)
@given(messages)
def test_round_trip(message):
    assert decode(encode(message)) == message


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes(data):
    decode_or_refuse(data)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 9) | junk, max_size=10))
def test_any_msgpack_array(values):
    decode_or_refuse(pack(values))


@settings(max_examples=200, deadline=None)
@given(messages, st.data())
def test_a_message_changed_in_one_place(message, data):
    wire = bytearray(encode(message))
    index = data.draw(st.integers(0, len(wire) - 1))
    change = data.draw(st.sampled_from(["flip", "cut", "insert"]))
    if change == "flip":
        wire[index] ^= 1 << data.draw(st.integers(0, 7))
    elif change == "cut":
        del wire[index:]
    else:
        wire.insert(index, data.draw(st.integers(0, 255)))
    decode_or_refuse(bytes(wire))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x91" * 5000,
        b"\x81" * 5000,
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xc1",
        pack([1, b"ticket"]),
        pack([1, b"ticket", -1]),
        pack([1, b"ticket", True]),
        pack([1, b"ticket", 5, 5]),
        pack([True, b"ticket", 5]),
        pack([99]),
        pack([9, b"i"]),
        pack([10, [b"i", 5]]),
        pack([2, b"i", 1, 0, 4, 16, [-1]]),
        pack([2, b"i", 1, 0, 4]),
        pack([[1], b"ticket", 5]),
        pack({"a": 1}),
        pack([1, msgpack.ExtType(5, b"x"), 5]),
        pack([6, b"i", 1]) + b"\x00",
        bytes(MAX_MESSAGE_BYTES + 1),
        pack([5, b"i", 1, 1, [0] * (MAX_ITEMS + 1), [], []]),
    ],
    ids=lambda data: data[:12].hex() or "empty",
)
def test_hostile_bytes_are_frame_errors(data):
    with pytest.raises(FrameError):
        decode(data)


@settings(max_examples=100, deadline=None)
@given(instances(Ticket), st.data())
def test_a_ticket_with_any_bit_flipped_or_any_byte_gone_is_refused(ticket, data):
    sealed = ticket.seal(KEY)
    assert Ticket.open(sealed, KEY) == ticket
    index = data.draw(st.integers(0, len(sealed) - 1))
    flipped = bytearray(sealed)
    flipped[index] ^= 1 << data.draw(st.integers(0, 7))
    for bad in (bytes(flipped), sealed[:index], sealed[index + 1 :], sealed + b"\x00"):
        with pytest.raises(TicketRefused):
            Ticket.open(bad, KEY)
    with pytest.raises(TicketRefused):
        Ticket.open(sealed, b"another key" * 3)
