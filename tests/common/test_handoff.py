"""Hand-off messages: round trips, exact types, arbitrary bytes, and tickets."""

from __future__ import annotations

import dataclasses
import hmac
from typing import Any, get_type_hints

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.common import handoff
from tandem.common.errors import TandemError, TicketRefused
from tandem.common.handoff import FrameError, Message, Ticket, TicketGate

INT = st.integers(0, 2**63 - 1)
BY_HINT: dict[Any, st.SearchStrategy[Any]] = {
    int: INT,
    bool: st.booleans(),
    str: st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    bytes: st.binary(max_size=40),
    float: st.floats(allow_nan=False),
    tuple[bytes, ...]: st.lists(st.binary(max_size=20), max_size=4).map(tuple),
    tuple[int, ...]: st.lists(INT, max_size=4).map(tuple),
}
KINDS: list[Any] = [
    handoff.Reserve, handoff.Grant, handoff.Refuse, handoff.Frame, handoff.Manifest, handoff.Ack, handoff.Abort,
    handoff.Rendezvous,
]  # fmt: skip


def built(cls: Any) -> st.SearchStrategy[Any]:
    hints = get_type_hints(cls)
    return st.builds(cls, *(BY_HINT[hints[field.name]] for field in dataclasses.fields(cls)))


@given(st.one_of([built(cls) for cls in KINDS]))
def test_round_trip(message: Message) -> None:
    assert handoff.decode(handoff.encode(message)) == message


def test_kinds_are_numbered_as_the_protocol_page_says() -> None:
    assert [cls.KIND for cls in KINDS] == list(range(1, 9))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_frame_error(data: bytes) -> None:
    try:
        message = handoff.decode(data)
    except FrameError:
        return
    assert type(message) in KINDS


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.binary(max_size=8)
    | st.text(max_size=8),
    lambda children: st.lists(children, max_size=6) | st.dictionaries(st.text(max_size=3), children, max_size=3),
    max_leaves=12,
)


@given(st.integers(0, 9), st.lists(JUNK, max_size=9))
def test_any_msgpack_is_a_message_or_a_frame_error(kind: int, values: list[Any]) -> None:
    try:
        message = handoff.decode(msgpack.packb([kind, *values]) or b"")
    except FrameError:
        return
    assert type(message) is KINDS[kind - 1]


@pytest.mark.parametrize(
    "values",
    [
        [6, b"t"],  # too few fields
        [6, b"t", 1, 1],  # too many
        [6, "t", 1],  # text for bytes
        [6, b"t", -1],
        [6, b"t", 2**63],
        [6, b"t", True],
        [6, b"t", 1.0],
        [True, b"t", 1],
        [11, b"t", 1],
        [],
        {"kind": 6},
        6,
    ],
)
def test_nearly_right_is_wrong(values: Any) -> None:
    with pytest.raises(FrameError):
        handoff.decode(msgpack.packb(values) or b"")


def test_size_is_limited() -> None:
    with pytest.raises(FrameError, match="over the limit"):
        handoff.decode(bytes(handoff.MAX_MESSAGE_BYTES + 1))


KEY = b"k" * 32


@given(built(Ticket))
def test_ticket_round_trip(ticket: Ticket) -> None:
    assert Ticket.open(ticket.seal(KEY), KEY) == ticket


TICKET = Ticket("r", 1, bytes(16), "prefill-0", "aa", "decode-0", "bb", bytes(32), 30.0)


@given(st.data())
def test_any_change_of_a_ticket_is_refused(data: st.DataObject) -> None:
    sealed = bytearray(TICKET.seal(KEY))
    sealed[data.draw(st.integers(0, len(sealed) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(TicketRefused):
        Ticket.open(bytes(sealed), KEY)


@pytest.mark.parametrize("sealed", [b"", b"x", bytes(32), TICKET.seal(KEY)[:-1], TICKET.seal(b"other" * 8)])
def test_no_ticket_is_refused(sealed: bytes) -> None:
    with pytest.raises(TicketRefused, match="TANDEM_CLUSTER_KEY"):
        Ticket.open(sealed, KEY)


def test_a_ticket_sealed_over_nonsense_is_a_typed_error() -> None:
    body = msgpack.packb(["r", "one"]) or b""
    with pytest.raises(TandemError):
        Ticket.open(body + hmac.digest(KEY, body, "sha256"), KEY)


def test_a_gate_forgets_only_tickets_whose_time_is_over() -> None:
    gate = TicketGate(KEY, "decode", TICKET.decode_incarnation, TICKET.pairing)

    def admit(timeout: float) -> bytes:
        ticket = dataclasses.replace(TICKET, transfer_id=handoff.new_transfer_id(), timeout=timeout)
        gate.admit(ticket.seal(KEY))
        return ticket.seal(KEY)

    kept = admit(60.0)
    for _ in range(100):
        admit(0.0)
    assert len(gate._used) == len(gate._expiry) <= 2
    with pytest.raises(TicketRefused, match="used before"):
        gate.admit(kept)


def test_transfer_ids_are_random_and_of_one_size() -> None:
    ids = {handoff.new_transfer_id() for _ in range(100)}
    assert len(ids) == 100
    assert {len(value) for value in ids} == {16}
