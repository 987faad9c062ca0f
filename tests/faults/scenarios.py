"""What can go wrong between one P and one D, as stories with an end that is right or raises AssertionError.

The workers are real and driven step by step (tests/worker_pair.py); the engine's KV is a checksum of the tokens, so a
block that is foreign, stale or torn is noticed by whoever attends to it. `test_handoff.py` runs every story;
`test_mutations.py` runs them again with one rule of the protocol switched off, and each must then fail.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace

import torch

from tandem.common.errors import TicketRefused, TransferFailed
from tandem.common.handoff import Abort, Frame, Heartbeat, Ticket
from tandem.decode_worker.limits import DecodeLimits
from tandem.decode_worker.reservation import Phase, Reservation
from tandem.kv_transfer.frame import piece_digests
from tandem.kv_transfer.payload import Payload
from tandem.prefill_worker.worker import PrefillLimits
from tests.fakes import expected_output, make_leg
from tests.faults.faulty import flipped
from tests.worker_pair import KEY, Call, Pair


@contextmanager
def pair_of(connector: str, **options: object) -> Generator[Pair]:
    """A pair that must be conserved at the end."""
    pair = Pair(connector=connector, **options)  # pyright: ignore[reportArgumentType]
    try:
        yield pair
        pair.assert_conserved()
    finally:
        if pair.hold is not None:
            pair.hold.set()
        pair.close()


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(997) for _ in range(length)]


def assert_right(call: Call) -> None:
    assert call.error is None, call.error
    assert call.output() == expected_output(call.leg.prompt_ids, call.leg.sampling.max_tokens)


def the_reservation(pair: Pair) -> Reservation:
    return next(iter(pair.d.worker.handoffs._reservations.values()))


def a_held_transfer(pair: Pair, length: int = 40) -> Call:
    """A request whose blocks D has granted and whose first payload P's link is about to move."""
    pair.hold = threading.Event()
    call = pair.request("held", prompt(length, seed=1), max_tokens=4)
    pair.until(lambda: bool(pair.senders) and pair.senders[0].held.is_set())
    return call


# ------------------------------------------------------------------------------------------------------------- digests


def one_flipped_bit_at_every_64th_byte(connector: str) -> None:
    """E13. 100 % found, none decoded; the same transfer without a flip passes."""
    with pair_of(connector) as pair:
        size = 40 * pair.p.engine.layout.block_bytes // pair.p.engine.layout.block_size
        for position in range(0, size, 64):
            seen = [0]

            def flip(
                frame: Frame, payload: Payload, position: int = position, seen: list[int] = seen
            ) -> Payload | None:
                start, seen[0] = seen[0], seen[0] + payload.nbytes
                hit = start <= position < seen[0]
                return flipped(payload, 8 * (position - start) + position % 8) if hit else None

            pair.fault = flip
            for sender in pair.senders:
                sender.fault = flip
            call = pair.request(f"flip {position}", prompt(40, seed=position), max_tokens=3)
            pair.until(lambda call=call: call.ended)
            assert isinstance(call.error, TransferFailed), f"a bit flipped at byte {position} went unnoticed"
            assert not call.decode.tokens
        for sender in pair.senders:
            sender.fault = lambda frame, payload: None
        clean = pair.request("clean", prompt(40, seed=7), max_tokens=3)
        pair.until(lambda: clean.ended)
        assert_right(clean)


def a_frame_that_comes_twice(connector: str) -> None:
    """The second one must not count as another block's, nor replace what was verified."""
    with pair_of(connector) as pair:
        sent: list[Frame] = []

        def repeat(frame: Frame, payload: Payload) -> None:
            if not sent:
                sent.append(frame)
                pair.d.worker.inbox.put(
                    lambda: pair.d.worker.handoffs.on_frame(pair.d.links[0], frame, Payload.whole(payload.tensor()))
                )

        pair.fault = repeat
        call = pair.request("twice", prompt(30), max_tokens=3)
        pair.until(lambda: call.ended)
        assert isinstance(call.error, TransferFailed) or call.output() == expected_output(prompt(30), 3)


# ---------------------------------------------------------------------------------------------------------- generations


def messages_of_an_older_generation(connector: str) -> None:
    """E14, rule H6: a late frame or abort of an earlier grant must not touch the present one."""
    with pair_of(connector) as pair:
        call = a_held_transfer(pair)
        reservation, link, handoffs = the_reservation(pair), pair.d.links[0], pair.d.worker.handoffs
        stale, layout = reservation.generation - 1 + 1000, pair.d.engine.layout
        garbage = Payload.whole(torch.full((1, layout.block_bytes), 7, dtype=torch.uint8))
        frame = Frame(
            reservation.id, stale, 0, 1, 0, layout.layers, garbage.nbytes, piece_digests(garbage, reservation.id)
        )
        handoffs.on_frame(link, frame, garbage)
        handoffs.on_message(link, Abort(reservation.id, stale, "late"))
        assert pair.hold is not None
        pair.hold.set()
        pair.until(lambda: call.ended)
        assert_right(call)


# ----------------------------------------------------------------------------------------------------------- quarantine


def a_late_write_into_a_block_that_was_given_up(connector: str) -> None:
    """E10, E11, rule H3: P stands still before its write, D gives the reservation up, serves others; then it lands."""
    with pair_of(connector, decode_blocks=24, decode_limits=DecodeLimits(lease=0.05)) as pair:
        call = a_held_transfer(pair)
        pair.until(lambda: call.decode.ended, turn=pair.turn_decode)  # nothing names it: its lease ends
        others = [pair.local(f"other {i}", prompt(20, seed=50 + i), max_tokens=16) for i in range(4)]
        pair.until(lambda: any(other.output() for other in others), turn=pair.turn_decode)
        assert pair.hold is not None
        pair.hold.set()  # the write lands now
        pair.until(lambda: pair.p.worker.idle)
        pair.until(lambda: all(other.ended for other in others))
        for other in others:
            assert_right(other)


def quarantine_ends_with_the_word_of_p(connector: str) -> None:
    with pair_of(connector, decode_limits=DecodeLimits(lease=0.05)) as pair:
        call = a_held_transfer(pair)
        pair.until(lambda: call.decode.ended, turn=pair.turn_decode)
        held = pair.d.pool.counts().quarantined
        assert held == (10 if pair.d.links[0].one_sided else 0), held
        assert pair.hold is not None
        pair.hold.set()
        pair.until(lambda: pair.d.pool.counts().quarantined == 0)


def quarantine_outlives_a_broken_link(connector: str) -> None:
    """A broken link proves nothing about P's writes; its death does, or a new link."""
    with pair_of(connector) as pair:
        call = a_held_transfer(pair)
        pair.d.links[0].close()
        pair.d.worker.handoffs.on_lost(pair.d.links[0], "cut")
        assert call.decode.ended
        if pair.d.links[0].one_sided:
            assert pair.d.pool.counts().quarantined == 10
            assert pair.d.worker.handoffs.quarantined_peers == {"p-1"}
        pair.d.worker.handoffs.peer_is_quiet("somebody else")
        assert pair.d.pool.counts().quarantined == (10 if pair.d.links[0].one_sided else 0)
        pair.d.worker.handoffs.peer_is_quiet("p-1")
        assert pair.d.pool.counts().quarantined == 0
        assert pair.hold is not None
        pair.hold.set()


def a_new_link_ends_the_quarantine_of_the_old(connector: str) -> None:
    with pair_of(connector) as pair:
        a_held_transfer(pair)
        pair.d.worker.handoffs.on_lost(pair.d.links[0], "cut")
        pair.d.links[0].close()
        pair.until(lambda: not pair.p.worker._links)
        early = pair.request("early", prompt(12), max_tokens=2)
        pair.until(lambda: early.prefill.ended)
        assert isinstance(early.error, TransferFailed), "a new link was opened while the old one still sends"
        early.cancel()
        assert pair.hold is not None
        pair.hold.set()
        assert pair.p.links[0].join(5.0)
        call = pair.request("again", prompt(12), max_tokens=2)
        pair.until(lambda: call.ended)
        assert_right(call)
        assert pair.d.pool.counts().quarantined == 0


# --------------------------------------------------------------------------------------------------------------- leases


def a_silent_prefill_worker_loses_its_reservation(connector: str) -> None:
    """E9, rule H5: without frames or heartbeats the lease ends, and the blocks come back when P can be asked again."""
    with pair_of(connector, decode_limits=DecodeLimits(lease=0.05)) as pair:
        call = a_held_transfer(pair)
        pair.until(lambda: call.decode.ended, seconds=2.0, turn=pair.turn_decode)
        assert isinstance(call.decode.error, TransferFailed)
        assert pair.hold is not None
        pair.hold.set()


def heartbeats_keep_a_slow_transfer_alive(connector: str) -> None:
    """E32: a long step of P is no death: its heartbeats have a thread of their own."""
    with pair_of(connector, decode_limits=DecodeLimits(lease=0.2)) as pair:
        call = a_held_transfer(pair)
        until = time.monotonic() + 0.6
        while time.monotonic() < until:
            pair.p.links[0].beat()
            pair.turn_decode()
        assert the_reservation(pair).phase is Phase.LANDING
        assert pair.hold is not None
        pair.hold.set()
        pair.until(lambda: call.ended)
        assert_right(call)


def a_heartbeat_of_another_link_renews_nothing(connector: str) -> None:
    with pair_of(connector, decode_limits=DecodeLimits(lease=1.0)) as pair:
        call = a_held_transfer(pair)
        stranger = object()
        until = time.monotonic() + 3.0
        while not call.decode.ended:
            assert time.monotonic() < until, "a stranger's heartbeats kept the reservation alive"
            pair.d.worker.handoffs.on_message(stranger, Heartbeat((the_reservation(pair).id,)))  # pyright: ignore[reportArgumentType]
            pair.turn_decode()
        assert pair.hold is not None
        pair.hold.set()


# -------------------------------------------------------------------------------------------------------------- tickets


def tickets_are_checked(connector: str) -> None:
    """E15, E62: forged, used, for another incarnation or layout: refused by both, and nothing is reserved."""
    with pair_of(connector) as pair:
        first = pair.request("first", prompt(12))
        pair.until(lambda: first.ended)
        sealed = pair.ticket("x")
        forged = bytearray(sealed)
        forged[20] ^= 1
        wrong = [
            first.leg.ticket,  # used before
            bytes(forged),
            Ticket.open(sealed, KEY).seal(b"another cluster's key, 32 bytes."),
            pair.ticket("x", decode_incarnation="d-0", prefill_incarnation="p-0"),
            pair.ticket("x", pairing=b"another layout"),
        ]
        for index, ticket in enumerate(wrong):
            leg = replace(make_leg(f"wrong {index}", prompt(12)), ticket=ticket)
            call = Call(pair, leg, pair._next_leg(), pair._next_leg())
            pair.d.worker.submit(call.decode_leg, leg, call.decode)
            pair.p.worker.submit(call.prefill_leg, leg, "d", call.prefill)
            assert isinstance(call.decode.error, (TicketRefused, TransferFailed)), f"D took ticket {index}"
            assert isinstance(call.prefill.error, (TicketRefused, TransferFailed)), f"P took ticket {index}"
            assert pair.d.worker.handoffs.count == 0


# ---------------------------------------------------------------------------------------------------------- conversions


def block_sizes_differ(connector: str) -> None:
    for sizes in ((4, 8), (8, 4), (4, 6), (6, 4)):
        limits = PrefillLimits(max_num_batched_tokens=10, pipelined_from=0)
        with pair_of(connector, block_sizes=sizes, prefill_limits=limits) as pair:
            prompts = [prompt(length, seed=length) for length in (1, 5, 6, 8, 23, 24, 61)]
            calls = [pair.request(f"{sizes} {len(p)}", p, max_tokens=5) for p in [*prompts, *prompts]]
            pair.until(lambda calls=calls: all(call.ended for call in calls))
            for call in calls:
                assert_right(call)


def layers_leave_while_later_ones_are_computed(connector: str) -> None:
    limits = PrefillLimits(max_num_batched_tokens=10, pipelined_from=0, layer_groups=2)
    with pair_of(connector, prefill_limits=limits) as pair:
        frames: list[Frame] = []
        pair.fault = lambda frame, payload: frames.append(frame)
        calls = [pair.request(f"r{length}", prompt(length, seed=length), max_tokens=4) for length in (3, 37, 50)]
        pair.until(lambda: all(call.ended for call in calls))
        for call in calls:
            assert_right(call)
        assert {(frame.first_layer, frame.num_layers) for frame in frames} == {(0, 1), (1, 1)}


def a_short_prompt_leaves_in_one_piece(connector: str) -> None:
    limits = PrefillLimits(max_num_batched_tokens=10, pipelined_from=100)
    with pair_of(connector, prefill_limits=limits) as pair:
        frames: list[Frame] = []
        pair.fault = lambda frame, payload: frames.append(frame)
        call = pair.request("short", prompt(50), max_tokens=4)
        pair.until(lambda: call.ended)
        assert_right(call)
        assert [(frame.num_blocks, frame.num_layers) for frame in frames] == [(13, 2)]


# --------------------------------------------------------------------------------------------------------- cancellation


def cancel_while_a_payload_is_in_flight(connector: str) -> None:
    """P keeps its blocks until the link has let go of them: what it sends is never somebody else's."""
    with pair_of(connector) as pair:
        call = a_held_transfer(pair)
        call.cancel()
        for _ in range(5):
            pair.turn()
        assert call.ended
        assert pair.p.pool.counts().owned == 10, "blocks were released while they are being sent"
        assert not pair.p.worker.idle
        assert pair.hold is not None
        pair.hold.set()
        pair.until(lambda: pair.p.worker.idle)


def cancel_while_the_grant_is_under_way(connector: str) -> None:
    """P never learns the generation; what it says about the transfer must still end D's quarantine."""
    with pair_of(connector) as pair:
        warm = pair.request("warm", prompt(12), max_tokens=2)  # the link is up
        pair.until(lambda: warm.ended)
        call = pair.request("late", prompt(40, seed=1), max_tokens=4)
        reservations = pair.d.worker.handoffs._reservations
        pair.p.worker.step()  # asks
        pair.until(lambda: pair.d.pool.counts().reserved > 0, turn=pair.turn_decode)
        assert next(iter(reservations.values())).phase is Phase.LANDING
        call.cancel()
        pair.until(lambda: pair.d.pool.counts().quarantined == 0 and pair.d.pool.counts().reserved == 0)


Story = Callable[[str], None]
STORIES: tuple[Story, ...] = (
    one_flipped_bit_at_every_64th_byte,
    a_frame_that_comes_twice,
    messages_of_an_older_generation,
    a_late_write_into_a_block_that_was_given_up,
    quarantine_ends_with_the_word_of_p,
    quarantine_outlives_a_broken_link,
    a_new_link_ends_the_quarantine_of_the_old,
    a_silent_prefill_worker_loses_its_reservation,
    heartbeats_keep_a_slow_transfer_alive,
    a_heartbeat_of_another_link_renews_nothing,
    tickets_are_checked,
    block_sizes_differ,
    layers_leave_while_later_ones_are_computed,
    a_short_prompt_leaves_in_one_piece,
    cancel_while_a_payload_is_in_flight,
    cancel_while_the_grant_is_under_way,
)
