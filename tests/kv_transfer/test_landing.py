"""D's account of a transfer: rules H1, H2 and H4 (docs/protocol.md); and what is cut on its way to it."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.cluster.fault_proxy import Fault, FaultProxy
from tandem.common.errors import TransferFailed
from tandem.common.handoff import (
    Abort,
    Ack,
    Frame,
    FrameError,
    Grant,
    Heartbeat,
    Manifest,
    Message,
    Refuse,
    Released,
    Rendezvous,
    Reserve,
    decode,
    encode,
)
from tandem.common.kv_layout import KVLayout
from tandem.kv_transfer import tcp
from tandem.kv_transfer.landing import Landing
from tests.kv_transfer.pairs import Pair, transfer, until
from tests.kv_transfer.peer import UNTOUCHED, sha256_rows

LAYOUT = KVLayout("test", "float32", 4, 3, 2, 8)
ID, GENERATION = b"i" * 16, 6
FIRST, BLOCKS = 2, 5
LOCAL = [70, 12, 33, 5, 41]  # D's blocks of prompt blocks 2 … 6
TOKENS = 26  # 6 full blocks and 2 tokens
HASHES = tuple(bytes([number]) * 32 for number in range(6))


def digest(block: int) -> bytes:
    return bytes([block]) * 16


def grant(first: int, blocks: int) -> Grant:
    return Grant(ID, GENERATION, first, blocks, LAYOUT.block_size, ())


def make_landing() -> Landing:
    return Landing(grant(FIRST, BLOCKS), LOCAL, TOKENS, HASHES, LAYOUT)


def make_frame(first: int, count: int, **changes) -> Frame:
    digests = tuple(digest(block % 256) for block in range(first, first + min(count, 32)))
    size = count * LAYOUT.block_bytes
    return dataclasses.replace(Frame(ID, GENERATION, first, count, 0, 3, size, digests), **changes)


def make_manifest(**changes) -> Manifest:
    digests = tuple(digest(block) for block in range(FIRST, FIRST + BLOCKS))
    return dataclasses.replace(Manifest(ID, GENERATION, TOKENS, HASHES, digests, (1,)), **changes)


DIGESTS = make_manifest().digests


def land_all(landing: Landing) -> None:
    assert landing.accept(make_frame(4, 3)) == [33, 5, 41]
    assert landing.accept(make_frame(2, 2)) == [70, 12]


def test_frames_in_any_order_then_the_manifest():
    landing = make_landing()
    land_all(landing)
    landing.verify(make_manifest())


def test_layer_groups_of_a_block_land_apart():
    landing = make_landing()
    assert landing.accept(make_frame(4, 3)) == [33, 5, 41]
    low = make_frame(2, 2, num_layers=2, num_bytes=2 * 2 * LAYOUT.layer_bytes)
    high = make_frame(2, 2, first_layer=2, num_layers=1, num_bytes=2 * LAYOUT.layer_bytes)
    assert landing.accept(high) == [70, 12]
    with pytest.raises(TransferFailed, match="2 granted blocks never landed, the first is block 2"):
        landing.verify(make_manifest())
    with pytest.raises(TransferFailed, match="repeats"):
        landing.accept(make_frame(2, 2))
    assert landing.accept(low) == [70, 12]
    joined = tuple(xxhash.xxh3_128_digest(2 * digest(block)) for block in (2, 3))
    landing.verify(make_manifest(digests=joined + DIGESTS[2:]))
    with pytest.raises(TransferFailed, match="digests"):
        landing.verify(make_manifest())


@pytest.mark.parametrize(
    "frame",
    [
        make_frame(2, 2, transfer_id=b"j" * 16),
        make_frame(2, 2, generation=5),
        make_frame(2, 2, generation=7),
        make_frame(1, 2),
        make_frame(6, 2),
        make_frame(7, 1),
        make_frame(0, 7),
        make_frame(1 << 62, 1),
        make_frame(2, 0),
        make_frame(2, 2, first_layer=1),
        make_frame(2, 2, num_layers=2),
        make_frame(2, 2, first_layer=1, num_layers=2),
        make_frame(2, 2, first_layer=3, num_layers=1, num_bytes=2 * LAYOUT.layer_bytes),
        make_frame(2, 2, num_layers=0, num_bytes=0),
        make_frame(2, 2, num_bytes=LAYOUT.block_bytes),
        make_frame(2, 2, num_bytes=3 * LAYOUT.block_bytes),
        make_frame(2, 2, digests=(digest(2),)),
        make_frame(2, 2, digests=(digest(2), b"short")),
    ],
    ids=str,
)
def test_a_frame_that_does_not_fit_is_refused_and_changes_nothing(frame):
    landing = make_landing()
    with pytest.raises(TransferFailed):
        landing.accept(frame)
    land_all(landing)
    landing.verify(make_manifest())


def test_a_block_lands_once():
    landing = make_landing()
    landing.accept(make_frame(3, 1))
    for first, count in ((3, 1), (2, 2), (3, 2), (2, 5)):
        with pytest.raises(TransferFailed, match="repeats"):
            landing.accept(make_frame(first, count))
    with pytest.raises(TransferFailed, match="4 granted blocks never landed"):
        landing.verify(make_manifest())


@pytest.mark.parametrize(
    "changes",
    [
        {"transfer_id": b"j" * 16},
        {"generation": 5},
        {"num_tokens": TOKENS + 1},
        {"num_tokens": TOKENS - 1},
        {"hashes": HASHES[:-1]},
        {"hashes": (*HASHES, bytes(32))},
        {"hashes": (HASHES[1], HASHES[0], *HASHES[2:])},
        {"hashes": ()},
        {"digests": ()},
        {"digests": DIGESTS[1:]},
        {"digests": (*DIGESTS, DIGESTS[0])},
        {"digests": (*DIGESTS[:-1], bytes(16))},
    ],
    ids=str,
)
def test_a_manifest_that_disagrees_is_refused(changes):
    landing = make_landing()
    land_all(landing)
    with pytest.raises(TransferFailed):
        landing.verify(make_manifest(**changes))
    landing.verify(make_manifest())


def test_a_block_that_never_landed_is_refused_whatever_the_manifest_says():
    landing = make_landing()
    landing.accept(make_frame(2, 4))
    with pytest.raises(TransferFailed, match="1 granted blocks never landed, the first is block 6"):
        landing.verify(make_manifest())
    with pytest.raises(TransferFailed):
        landing.verify(make_manifest(digests=DIGESTS[:4]))


def test_a_grant_of_nothing_needs_only_the_manifest():
    landing = Landing(grant(6, 0), [], 24, HASHES, LAYOUT)
    with pytest.raises(TransferFailed):
        landing.accept(make_frame(6, 1))
    landing.verify(make_manifest(num_tokens=24, digests=()))


small = st.integers(0, 9)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(small, small, st.sampled_from([(ID, 6), (ID, 5), (b"j" * 16, 6)]), small), max_size=12))
def test_any_run_of_frames_writes_each_granted_block_at_most_once(frames):
    """Against a model that is a set of prompt blocks."""
    landing, landed = make_landing(), set[int]()
    granted = set(range(FIRST, FIRST + BLOCKS))
    digests: dict[int, bytes] = {}
    for first, count, (transfer_id, generation), salt in frames:
        blocks = set(range(first, first + count))
        names = tuple(bytes([block, salt]) * 8 for block in range(first, first + count))
        frame = make_frame(first, count, transfer_id=transfer_id, generation=generation, digests=names)
        fits = bool(blocks) and blocks <= granted and not blocks & landed and (transfer_id, generation) == (ID, 6)
        if not fits:
            with pytest.raises(TransferFailed):
                landing.accept(frame)
            continue
        assert landing.accept(frame) == [LOCAL[block - FIRST] for block in sorted(blocks)]
        landed |= blocks
        digests.update(zip(sorted(blocks), names, strict=True))
    manifest = make_manifest(digests=tuple(digests[block] for block in sorted(digests)))
    if landed == granted:
        landing.verify(manifest)
    else:
        with pytest.raises(TransferFailed):
            landing.verify(manifest)


# ---------------------------------------------------------------------------------------------- cut anywhere

MESSAGES = (
    Reserve(ID, b"t" * 200, TOKENS), Grant(ID, GENERATION, FIRST, BLOCKS, 4, tuple(LOCAL)), Refuse(ID, True, "full"),
    make_frame(2, 5), make_manifest(), Ack(ID, GENERATION), Abort(ID, GENERATION, "late"), Released(ID, GENERATION),
    Rendezvous("tcp/address", b"127.0.0.1 1"), Heartbeat((ID, b"j" * 16)),
)  # fmt: skip


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_e14_a_message_cut_anywhere_is_refused(message: Message):
    """At every byte, so at every boundary of a field and beside it; and one byte too many."""
    data = encode(message)
    assert decode(data) == message
    for length in range(len(data)):
        with pytest.raises(FrameError):
            decode(data[:length])
    for surplus in (b"\x00", b"\xc0", data[:1], data):
        with pytest.raises(FrameError):
            decode(data + surplus)


# Over a stream of tcp go P's hello, then for each frame a piece's header and its bytes; a small frame is one piece.
BOUNDARIES = (0, 49, 49 + 24, 49 + 24 + 1024)


@pytest.mark.parametrize("length", sorted({end + by for end in BOUNDARIES for by in (-1, 0, 1)} - {-1, 0}))
def test_e14_of_a_stream_that_is_cut_only_whole_frames_land(make_pair, monkeypatch, length):
    """Each stream ends behind so many bytes: at every boundary, and one byte beside it."""
    take = tcp._Address.take.__func__
    with contextlib.ExitStack() as proxies:

        def taken(cls, mailbox, deadline):
            found = take(cls, mailbox, deadline)
            proxy = proxies.enter_context(FaultProxy(found.host, found.port))
            proxy.set("up", Fault(truncate_at=length))
            return dataclasses.replace(found, port=proxy.port)

        monkeypatch.setattr(tcp._Address, "take", classmethod(taken))
        pair: Pair = make_pair("tcp-threads").open()
        pair.grants[1] = pair.decoder.grant(transfer(1), 1, 0, [1])
        payload = pair.fill([1])
        pair.send(1, payload)
        until(lambda: pair.inbox.qsize() == 2 or not pair.lost.empty())
        pair.get(Grant)
        if length < BOUNDARIES[-1]:
            assert pair.inbox.empty() and not pair.decoder.store.memory.ne(UNTOUCHED).any()
        else:
            assert pair.get(Manifest).hashes == sha256_rows(payload.tensor())
        pair.push.close()
        pair.land.close()
