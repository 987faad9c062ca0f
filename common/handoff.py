"""The messages of the KV hand-off between P and D, and the ticket that permits one (docs/protocol.md).

    P → D   Reserve · Frame · Manifest · Abort · Released · Heartbeat · Rendezvous
    D → P   Grant · Refuse · Ack · Abort · Heartbeat · Rendezvous

Encoding: msgpack array [kind, field, field, …] with the exact field types below; anything else is a FrameError.
Blocks are named by their index in the prompt, never by an address: each side maps the index to its own memory.
"""

from __future__ import annotations

import functools
import heapq
import hmac
import secrets
import time
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar, get_type_hints

import msgpack

from tandem.common.errors import TicketRefused, TransferFailed
from tandem.common.worker_config import Role

MAX_MESSAGE_BYTES = 4 << 20
MAX_ITEMS = 1 << 17

T = TypeVar("T")


class FrameError(TransferFailed):
    """Bytes from a peer that are no message of this protocol."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """One attempt's permission to hand KV from one prefill worker to one decode worker; minted by the router."""

    request_id: str
    attempt: int
    transfer_id: bytes  # 16 random bytes
    prefill: str  # worker name
    prefill_incarnation: str
    decode: str
    decode_incarnation: str
    pairing: bytes  # of the KV layout, which both ends must share but for the block size
    timeout: float  # seconds until the request's deadline when minted; clocks are never compared

    def seal(self, key: bytes) -> bytes:
        """The ticket's bytes followed by their HMAC-SHA-256 under the cluster key."""
        body = _pack(_values(self))
        return body + hmac.digest(key, body, "sha256")

    @classmethod
    def open(cls, sealed: bytes, key: bytes) -> Ticket:
        """Verify the MAC, then decode. Raises TicketRefused."""
        body, mac = sealed[:-32], sealed[-32:]
        if not hmac.compare_digest(hmac.digest(key, body, "sha256"), mac):
            raise TicketRefused("ticket refused: its MAC does not match the cluster key; check TANDEM_CLUSTER_KEY")
        return _build(cls, _unpack(body))


def new_transfer_id() -> bytes:
    return secrets.token_bytes(16)


class TicketGate:
    """A worker accepts a ticket only if its MAC, this worker's incarnation and the pairing match, and only once."""

    def __init__(self, key: bytes, role: Role, incarnation: str, pairing: bytes) -> None:
        self._key = key
        self._role = role
        self._incarnation = incarnation
        self._pairing = pairing
        self._used: set[bytes] = set()  # transfer ids
        self._expiry: list[tuple[float, bytes]] = []  # heap: when each of them may be forgotten, monotonic

    def verify(self, sealed: bytes) -> Ticket:
        """The ticket inside. Raises TicketRefused."""
        ticket = Ticket.open(sealed, self._key)
        addressee = ticket.prefill_incarnation if self._role == "prefill" else ticket.decode_incarnation
        if addressee != self._incarnation:
            raise TicketRefused(f"ticket of {ticket.request_id} is for another incarnation of this worker; try again")
        if ticket.pairing != self._pairing:
            raise TicketRefused(
                f"ticket of {ticket.request_id} is for another KV layout (model revision, dtype or heads); "
                "start prefill and decode workers from the same model and flags"
            )
        return ticket

    def admit(self, sealed: bytes) -> Ticket:
        """Verify, and use the ticket up. Raises TicketRefused."""
        ticket, now = self.verify(sealed), time.monotonic()
        if ticket.transfer_id in self._used:
            raise TicketRefused(f"ticket of {ticket.request_id} was used before")
        while self._expiry and self._expiry[0][0] <= now:
            self._used.discard(heapq.heappop(self._expiry)[1])
        self._used.add(ticket.transfer_id)
        heapq.heappush(self._expiry, (now + ticket.timeout, ticket.transfer_id))
        return ticket


@dataclass(frozen=True, slots=True)
class Reserve:
    """P asks D for room for the prompt of `ticket`; `num_tokens` counts the prompt's tokens."""

    KIND: ClassVar[int] = 1
    transfer_id: bytes
    ticket: bytes  # sealed, as the router minted it
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Grant:
    """D holds blocks. P sends prompt blocks [first_block, first_block + num_blocks); D already has those before.

    `block_size` is D's, in which every block number of the transfer counts. `targets`: D's own block for each granted
    one, where the connector is one-sided; else empty, and D alone knows.
    """

    KIND: ClassVar[int] = 2
    transfer_id: bytes
    generation: int
    first_block: int
    num_blocks: int
    block_size: int
    targets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Refuse:
    """D will not take this transfer; `later` says that asking again may succeed."""

    KIND: ClassVar[int] = 3
    transfer_id: bytes
    later: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Frame:
    """Names a payload: blocks [first_block, first_block + num_blocks), of each the layers [first_layer, + num_layers).

    Over a two-sided connector the payload follows; over a one-sided one it has been written. `digests` holds one
    16-byte XXH3-128 per block over the block's bytes of those layers, seeded with the transfer id.
    """

    KIND: ClassVar[int] = 4
    transfer_id: bytes
    generation: int
    first_block: int
    num_blocks: int
    first_layer: int
    num_layers: int
    num_bytes: int
    digests: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """P has sent everything: what D must now hold, and the first token of each choice."""

    KIND: ClassVar[int] = 5
    transfer_id: bytes
    generation: int
    num_tokens: int
    hashes: tuple[bytes, ...]  # block hashes of the prompt's full blocks
    digests: tuple[bytes, ...]  # of the granted blocks, in order: see kv_transfer/frame.py › block_digest
    first_tokens: tuple[int, ...]  # one per choice of the leg


@dataclass(frozen=True, slots=True)
class Ack:
    """D verified everything and owns the sequence; P may unpin."""

    KIND: ClassVar[int] = 6
    transfer_id: bytes
    generation: int


@dataclass(frozen=True, slots=True)
class Abort:
    """Either side gives the transfer up. Generation 0: before any grant."""

    KIND: ClassVar[int] = 7
    transfer_id: bytes
    generation: int
    reason: str


@dataclass(frozen=True, slots=True)
class Released:
    """P, behind an Abort of either side: nothing of this transfer is in flight any more, and nothing will be sent.

    What it ends is the quarantine of D's blocks (rule H3). Generation 0: P had no grant yet.
    """

    KIND: ClassVar[int] = 9
    transfer_id: bytes
    generation: int


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """This end lives; from a thread of its own, so no long step delays it. P names the transfers it still works on."""

    KIND: ClassVar[int] = 10
    transfers: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Key-value exchange with which a connector sets its data path up over this authenticated channel."""

    KIND: ClassVar[int] = 8
    key: str
    value: bytes


Message = Reserve | Grant | Refuse | Frame | Manifest | Ack | Abort | Rendezvous | Released | Heartbeat
_KINDS: dict[int, type[Message]] = {
    cls.KIND: cls for cls in (Reserve, Grant, Refuse, Frame, Manifest, Ack, Abort, Rendezvous, Released, Heartbeat)
}


def encode(message: Message) -> bytes:
    return _pack([message.KIND, *_values(message)])


def decode(data: bytes) -> Message:
    """Raises FrameError unless `data` is exactly one well-typed message."""
    values = _unpack(data)
    kind = _KINDS.get(values[0]) if values and type(values[0]) is int else None
    if kind is None:
        raise FrameError("hand-off message of unknown kind: the peer speaks another protocol version")
    return _build(kind, values[1:])


def _pack(values: list[Any]) -> bytes:
    packed = msgpack.packb(values, use_bin_type=True)
    assert packed is not None, "packb returns None only for streams"
    return packed


def _unpack(data: bytes) -> list[Any]:
    if len(data) > MAX_MESSAGE_BYTES:
        raise FrameError(f"hand-off message of {len(data)} bytes is over the limit of {MAX_MESSAGE_BYTES}")
    try:
        values = msgpack.unpackb(
            data, raw=False, use_list=False, strict_map_key=True, max_array_len=MAX_ITEMS, max_map_len=0, max_ext_len=0
        )
    except (ValueError, msgpack.UnpackException) as exc:
        raise FrameError(f"hand-off message is not valid msgpack: {exc}") from exc
    if not isinstance(values, tuple):
        raise FrameError("hand-off message is not an array")
    return list(values)


def _values(message: Any) -> list[Any]:
    """The fields in order. Not dataclasses.astuple, which copies deeply and is ten times slower."""
    return [getattr(message, name) for name, _ in _schema(type(message))]


@functools.cache
def _schema(cls: type) -> tuple[tuple[str, Any], ...]:
    """(field name, type) in order; resolving annotations is slow, and a frame comes every few milliseconds."""
    hints = get_type_hints(cls)
    return tuple((field.name, hints[field.name]) for field in fields(cls))


def _build(cls: type[T], values: list[Any]) -> T:
    schema = _schema(cls)
    if len(values) != len(schema):
        raise FrameError(f"{cls.__name__} needs {len(schema)} fields, got {len(values)}")
    for (name, hint), value in zip(schema, values, strict=True):
        if not _fits(value, hint):
            raise FrameError(f"{cls.__name__}.{name} has the wrong type or range")
    return cls(*values)


def _fits(value: Any, hint: Any) -> bool:
    if hint is int:
        return type(value) is int and 0 <= value < 1 << 63
    if hint is float:
        return type(value) is float
    if hint in (str, bytes, bool):
        return type(value) is hint
    item = hint.__args__[0]  # tuple[item, ...]
    return type(value) is tuple and all(_fits(element, item) for element in value)
