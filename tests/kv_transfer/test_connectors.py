"""What every connector must do: the right bytes at the right place, in order, or the transfer fails and only it.

All of it at the level of the two links. A connector added later joins by its name in FAST or ALL. How links are lost
is in test_lost_links.py, what is special to one connector in a file of its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
import threading
from collections.abc import Sequence

import pytest
import torch
import xxhash

from tandem.common.handoff import Abort, Ack, Frame, Manifest
from tandem.common.kv_layout import KVLayout
from tandem.kv_transfer import frame as frame_module
from tandem.kv_transfer.payload import Payload
from tests.kv_transfer.pairs import WAIT, Forwarding, Pair, Wrap, kinds, transfer, until
from tests.kv_transfer.peer import UNTOUCHED, sha256_rows

pytestmark = pytest.mark.timeout(90)
FAST = ("inproc", "tcp", "shm", "nixl")
ALL = (*FAST, "torch")


@pytest.fixture(params=kinds(*ALL))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=kinds(*ALL, where=["threads"]))
def local(request: pytest.FixtureRequest) -> str:
    """Both ends in this process, so that D's can be disturbed."""
    return request.param


def small_frames(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr(frame_module, "MAX_FRAME_BYTES", num_bytes)


# ------------------------------------------------------------------------------------------------------ what arrives


@pytest.mark.parametrize(
    "layout",
    [
        KVLayout("test", "float32", 1, 1, 1, 1),
        KVLayout("test", "bfloat16", 16, 3, 5, 24),
        KVLayout("test", "float16", 8, 2, 1, 33),
        KVLayout("test", "bfloat16", 16, 4, 2, 64),
    ],
    ids=lambda layout: str(layout.block_bytes),
)
def test_whole_blocks_arrive_where_they_belong_and_nowhere_else(kind, make_pair, layout):
    pair: Pair = make_pair(kind, layout).open()
    expected = torch.full((64, layout.block_bytes), UNTOUCHED, dtype=torch.uint8)
    plans = [([5], [9]), ([1, 2], [63, 0]), (list(range(20, 37)), list(range(40, 57))), ([3, 4, 9], [20, 21, 22])]
    for number, (rows, blocks) in enumerate(plans):
        pair.reserve(number, blocks, first=5, generation=3)
        payload = pair.fill(rows, seed=number)
        pair.send(number, payload, first=5)
        report = pair.get(Manifest)
        assert report.hashes == sha256_rows(payload.tensor())
        assert (report.transfer_id, report.generation, report.num_tokens) == (transfer(number), 3, 5)
        pair.finish(number)
        assert pair.get(Manifest).hashes == report.hashes
        assert pair.get(Ack).generation == 3
        expected[blocks] = payload.tensor().cpu()
    assert pair.content() == hashlib.sha256(expected.numpy().tobytes()).hexdigest()


def test_layer_groups_of_scattered_rows_make_whole_blocks(kind, make_pair):
    pair: Pair = make_pair(kind, KVLayout("test", "bfloat16", 4, 5, 2, 8)).open()
    rows, blocks = [7, 8, 3, 60, 61], [10, 11, 5, 6, 30]
    payload, size = pair.fill(rows), pair.layout.layer_bytes
    pair.reserve(1, blocks, first=2)
    for first, count in [(3, 2), (0, 1), (1, 2)]:
        group = Payload.layers(pair.store.memory, rows, first * size, count * size)
        pair.send(1, group, first=2, layers=(first, count))
        report = pair.get(Manifest)
        assert (report.hashes, report.first_tokens) == (sha256_rows(group.tensor()), (first, count))
    pair.finish(1)
    assert pair.get(Manifest).hashes == sha256_rows(payload.tensor())
    pair.get(Ack)


def test_a_converted_copy_arrives_as_the_cache_does(kind, make_pair):
    """What P sends need not lie in its cache: blocks of another size are converted into fresh memory."""
    pair: Pair = make_pair(kind).open()
    pair.reserve(1, [4, 5, 9])
    copy = Payload.whole(pair.fill([1, 2, 3]).tensor().clone())
    pair.send(1, copy[:2])
    pair.send(1, copy[2:], first=2)
    assert pair.get(Manifest).hashes + pair.get(Manifest).hashes == sha256_rows(copy.tensor())
    pair.finish(1)
    assert pair.get(Manifest).hashes == sha256_rows(copy.tensor())
    pair.get(Ack)


@pytest.mark.parametrize(("limit", "sizes"), [(1, [1] * 5), (2048, [2, 2, 1]), (2047, [1] * 5), (5120, [5])])
def test_a_large_piece_goes_out_in_several_frames(kind, make_pair, monkeypatch, limit, sizes):
    pair: Pair = make_pair(kind)
    small_frames(monkeypatch, limit)
    pair.open().reserve(1, range(5), first=10)
    payload = pair.fill([1, 2, 3, 4, 5])
    pair.send(1, payload, first=10)
    reports = [pair.get(Manifest) for _ in sizes]
    assert [len(report.hashes) for report in reports] == sizes
    assert [report.num_tokens for report in reports] == [10 + sum(sizes[:index]) for index in range(len(sizes))]
    assert sum((report.hashes for report in reports), ()) == sha256_rows(payload.tensor())


def test_many_transfers_interleaved_arrive_in_order_with_their_digests(kind, make_pair):
    pair: Pair = make_pair(kind).open()
    rng = random.Random(1)
    payloads: dict[int, Payload] = {}
    for number in range(12):
        rows = rng.sample(range(number * 5, number * 5 + 5), rng.randrange(1, 6))  # this transfer's, at both ends
        payloads[number] = pair.fill(rows, seed=number)
        pair.reserve(number, rows, first=3)
    pieces = [(number, index) for number, payload in payloads.items() for index in range(len(payload))]
    rng.shuffle(pieces)  # blocks of a transfer in any order, too
    hashes = {number: sha256_rows(payload.tensor()) for number, payload in payloads.items()}
    expected: list[tuple[bytes, tuple[bytes, ...]]] = []  # what D reports: (transfer, hashes); none for an Ack
    for place, (number, index) in enumerate(pieces):
        pair.send(number, payloads[number][index : index + 1], first=3 + index)
        expected.append((transfer(number), hashes[number][index : index + 1]))
        if all(other != number for other, _ in pieces[place + 1 :]):
            pair.finish(number)
            expected += [(transfer(number), hashes[number]), (transfer(number), ())]
    got = [pair.get() for _ in expected]
    assert [(m.transfer_id, m.hashes if isinstance(m, Manifest) else ()) for m in got] == expected
    assert all(isinstance(message, Manifest | Ack) for message in got)
    if pair.decoder is not None:
        for manifest in (message for message in pair.decoder.seen if isinstance(message, Manifest)):
            rows = payloads[int.from_bytes(manifest.transfer_id, "big")].tensor()
            seed = int.from_bytes(manifest.transfer_id[:8], "big")
            assert manifest.digests == tuple(xxhash.xxh3_128(bytes(row.tolist()), seed).digest() for row in rows)
    assert pair.push.backlog_bytes == 0


def test_links_do_not_disturb_each_other(kind, make_pair):
    pairs: list[Pair] = [make_pair(kind).open() for _ in range(2)]
    for index, pair in enumerate(pairs):
        for number in range(8):
            pair.reserve(number, range(8 * number, 8 * number + 8))
        pair.fill(range(64), seed=index)

    def run(pair: Pair) -> None:
        for number in range(8):
            pair.send(number, Payload(pair.store.memory, range(8 * number, 8 * number + 8), 0, pair.layout.block_bytes))

    threads = [threading.Thread(target=run, args=(pair,)) for pair in pairs]
    for thread in threads:
        thread.start()
    for pair in pairs:
        expected = sha256_rows(pair.store.memory)
        assert [pair.get(Manifest).hashes for _ in range(8)] == [expected[8 * n : 8 * n + 8] for n in range(8)]
    for thread in threads:
        thread.join(WAIT)


@pytest.mark.parametrize("kind", kinds(*FAST, where=["threads"]))
def test_thousands_of_clean_transfers_raise_no_false_alarm(kind, make_pair):
    """10,000 over all of FAST. D grants by itself, and P waits for nothing."""
    pair: Pair = make_pair(kind).open()
    pair.reserve(0, [0])  # both ends are open now
    payload, count = pair.fill(range(64)), 10_000 // len(FAST)
    for number in range(1, count + 1):
        pair.grants[number] = pair.decoder.grant(transfer(number), number, 0, [number % 64])
        pair.send(number, payload[number % 64 : number % 64 + 1])
        pair.finish(number)
    acks = 0
    while acks < count:
        message = pair.get()
        assert not isinstance(message, Abort), message
        acks += isinstance(message, Ack)


# ------------------------------------------------------------------------------------------------------------ forget


def test_forget_drops_what_is_queued_and_nothing_else(kind, make_pair):
    entered, leave = threading.Event(), threading.Event()
    pair: Pair = make_pair(kind, wrap=gate(entered, leave)).open()
    for number in (0, 1, 2):
        pair.reserve(number, [3 * number, 3 * number + 1])
    blocker, gone, kept = pair.fill([0]), pair.fill([1, 2], seed=1), pair.fill([3, 4], seed=2)
    pair.send(0, blocker)
    assert entered.wait(WAIT)  # whatever comes now is queued
    pair.send(1, gone)
    pair.send(1, gone)
    pair.send(2, kept)
    pair.finish(1)
    pair.finish(2)
    assert pair.push.backlog_bytes == blocker.nbytes + 2 * gone.nbytes + kept.nbytes
    quiet = threading.Event()
    pair.push.forget(transfer(1), quiet.set)
    assert quiet.is_set(), "nothing of it was under way"
    assert pair.push.backlog_bytes == blocker.nbytes + kept.nbytes
    leave.set()
    assert pair.get(Manifest).transfer_id == transfer(0)
    assert pair.get(Manifest).hashes == sha256_rows(kept.tensor())
    assert pair.get(Manifest).transfer_id == transfer(2)
    assert pair.get(Ack).transfer_id == transfer(2)
    assert pair.push.backlog_bytes == 0


def test_forget_calls_back_when_nothing_is_under_way_any_more(kind, make_pair, monkeypatch):
    entered, leave = threading.Event(), threading.Event()
    pair: Pair = make_pair(kind, wrap=gate(entered, leave))
    small_frames(monkeypatch, pair.layout.block_bytes)
    pair.open()
    pair.reserve(1, [1, 2, 3])
    pair.reserve(2, [4])
    payload = pair.fill([1, 2, 3])
    pair.send(1, payload)
    assert entered.wait(WAIT)
    quiet = threading.Event()
    pair.push.forget(transfer(1), quiet.set)
    pair.send(2, payload[2:])
    assert not quiet.wait(0.05), "its first frame is under way"
    leave.set()
    assert quiet.wait(WAIT)
    assert pair.get(Manifest).hashes == sha256_rows(payload[:1].tensor())  # the frame that could not be taken back
    assert pair.get(Manifest).transfer_id == transfer(2)
    pair.finish(2)
    assert pair.get(Manifest).transfer_id == transfer(2)
    pair.get(Ack)
    assert pair.push.backlog_bytes == 0


def gate(entered: threading.Event, leave: threading.Event) -> Wrap:
    """A sender that says when it is asked to send first, and waits for leave."""

    class Gate(Forwarding):
        def send(self, frame: Frame, payload: Payload, targets: Sequence[int], timeout: float) -> None:
            entered.set()
            assert leave.wait(WAIT)
            self.inner.send(frame, payload, targets, timeout)

    return Wrap(sender=Gate)


# -------------------------------------------------------------------------------------- what is no longer wanted


def test_frames_of_no_current_grant_are_taken_off_the_wire_and_dropped(kind, make_pair):
    """Of another generation, of a transfer that was never granted, and outside what was granted (rule H2)."""
    pair: Pair = make_pair(kind, wrap=Wrap(sender=Astray))
    pair.sender.channel = pair.channel
    pair.open().reserve(1, [1, 2, 3], generation=7)
    payload = pair.fill([1, 2, 3])
    pair.send(1, payload[:2])
    pair.send(1, payload[2:], first=2)
    assert pair.get(Manifest).hashes + pair.get(Manifest).hashes == sha256_rows(payload.tensor())
    pair.finish(1)
    assert pair.get(Manifest).generation == 7
    pair.get(Ack)
    assert pair.lost.empty() and pair.land_lost.empty()


class Astray(Forwarding):
    """Behind every frame come some that nobody waits for."""

    CHANGES = ({"generation": 6}, {"generation": 8}, {"transfer_id": b"?" * 16}, {"first_block": 2}, {"first_block": 9})

    def send(self, frame: Frame, payload: Payload, targets: Sequence[int], timeout: float) -> None:
        self.inner.send(frame, payload, targets, timeout)
        for changes in Astray.CHANGES if frame.num_blocks == 2 else ():
            self.channel.send(dataclasses.replace(frame, **changes))
            if not self.one_sided:
                self.inner.send(frame, payload, targets, timeout)


def test_a_frame_that_comes_twice_fails_its_transfer_and_only_it(kind, make_pair):
    pair: Pair = make_pair(kind, wrap=Wrap(sender=Twice))
    pair.sender.channel = pair.channel
    pair.open().reserve(1, [1])
    pair.reserve(2, [2])
    payload = pair.fill([1])
    pair.send(1, payload)
    pair.get(Manifest)
    abort = pair.get(Abort)
    assert abort.transfer_id == transfer(1) and "repeats" in abort.reason
    pair.send(2, payload)
    assert pair.get(Manifest).transfer_id == transfer(2)


class Twice(Forwarding):
    """Every frame of transfer 1 goes out a second time."""

    def send(self, frame: Frame, payload: Payload, targets: Sequence[int], timeout: float) -> None:
        self.inner.send(frame, payload, targets, timeout)
        if frame.transfer_id == transfer(1):
            self.channel.send(frame)  # one-sided: the link sends the other one, behind this
            if not self.one_sided:
                self.inner.send(frame, payload, targets, timeout)


# -------------------------------------------------------------------------------------------------------- corruption


class Spoil(Forwarding):
    """Changes the payload of each frame, after the header with the right digests was made, by `Spoil.change`."""

    change = staticmethod(lambda payload: payload)

    def send(self, frame: Frame, payload: Payload, targets: Sequence[int], timeout: float) -> None:
        self.inner.send(frame, self.change(payload), targets, timeout)


def test_one_flipped_bit_at_every_64th_byte_is_detected(kind, make_pair, monkeypatch):
    pair: Pair = make_pair(kind, wrap=Wrap(sender=Spoil)).open()
    payload, blocks = pair.fill([1, 2, 3, 4]), [6, 7, 9, 8]
    positions = range(0, payload.nbytes, 64)
    for number, position in enumerate(positions):

        def flip(payload: Payload, position: int = position) -> Payload:
            tensor = payload.tensor().clone()
            tensor.view(-1)[position] ^= 1 << position // 64 % 8
            return Payload.whole(tensor)

        monkeypatch.setattr(Spoil, "change", staticmethod(flip))
        pair.reserve(number, blocks, first=4, generation=9)
        pair.send(number, payload, first=4)
        abort = pair.get(Abort)
        assert (abort.transfer_id, abort.generation) == (transfer(number), 9)
        assert f"digest mismatch in 1 of 4 blocks, first block {4 + position // 1024}" in abort.reason
    monkeypatch.setattr(Spoil, "change", staticmethod(lambda payload: payload))
    pair.reserve(1000, blocks)
    pair.send(1000, payload)
    assert pair.get(Manifest).hashes == sha256_rows(payload.tensor())
    if pair.decoder is not None:
        aborts = [message for message in pair.decoder.seen if isinstance(message, Abort)]
        assert len(aborts) == len(positions) and not pair.decoder.store.memory[10:].ne(UNTOUCHED).any()


def test_a_bit_that_flips_at_the_other_end_is_detected(local, make_pair):
    class Rot(Forwarding):
        def receive(self, frame: Frame, targets: Sequence[int], timeout: float) -> Payload:
            payload = self.inner.receive(frame, targets, timeout)
            payload.row(1)[-1] ^= 0x10  # in D's own block, if the connector is one-sided
            return payload

    pair: Pair = make_pair(local, wrap=Wrap(receiver=Rot)).open()
    pair.reserve(1, [1, 2])
    pair.send(1, pair.fill([1, 2]))
    assert "digest mismatch in 1 of 2 blocks, first block 1" in pair.get(Abort).reason


CHANGES = {
    "a row less": lambda payload: payload[:-1],
    "a row more": lambda payload: Payload(payload.memory, [*payload.rows, 9], payload.start, payload.stop),
    "rows cut": lambda payload: Payload(payload.memory, payload.rows, 0, payload.stop - 64),
    "other rows": lambda payload: Payload(payload.memory, [row + 1 for row in payload.rows], 0, payload.stop),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_payload_that_is_not_what_its_header_says_never_lands(local, make_pair, monkeypatch, change):
    """The transfer is aborted, or the link is lost."""
    pair: Pair = make_pair(local, wrap=Wrap(sender=Spoil, receiver=Impatient)).open()
    pair.reserve(1, [1, 2])
    pair.reserve(2, [3, 4])
    pair.fill(range(16))
    payload = pair.fill([1, 2], seed=1)
    monkeypatch.setattr(Spoil, "change", staticmethod(CHANGES[change]))
    pair.send(1, payload)
    pair.send(2, payload)  # what a stream lacks is not made up for by the next frame
    pair.finish(2)
    until(lambda: not (pair.lost.empty() and pair.land_lost.empty()) or pair.inbox.qsize() >= 2)
    while not pair.inbox.empty():
        assert isinstance(pair.get(), Abort)


class Impatient(Forwarding):
    """A frame has half a second; the set-up keeps its own time."""

    def receive(self, frame: Frame, targets: Sequence[int], timeout: float) -> Payload:
        return self.inner.receive(frame, targets, 0.5)
