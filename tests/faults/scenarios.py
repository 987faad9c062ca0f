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
from typing import cast

import torch

from tandem.common.errors import InternalError, TicketRefused, TransferFailed
from tandem.common.handoff import Abort, Frame, Heartbeat, Manifest, Message, Released, Ticket
from tandem.decode_worker.limits import DecodeLimits
from tandem.decode_worker.reservation import Phase, Reservation
from tandem.kv_transfer.frame import piece_digests
from tandem.kv_transfer.land import LandLink
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


def a_held_transfer(pair: Pair, length: int = 40, seed: int = 1) -> Call:
    """A request whose blocks D has granted and whose first payload P's link is about to move; see `let_go`."""
    pair.hold = threading.Event()
    for sender in pair.senders:
        sender.hold = pair.hold
        sender.held.clear()
    call = pair.request(f"held {seed}", prompt(length, seed), max_tokens=4)
    pair.until(lambda: bool(pair.senders) and pair.senders[0].held.is_set())
    return call


def let_go(pair: Pair) -> None:
    assert pair.hold is not None
    pair.hold.set()


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
    """Other bytes, with the right digest for them: they must not replace what has landed, the transfer fails."""
    with pair_of(connector) as pair:
        handoffs = pair.d.worker.handoffs
        land, seen = handoffs.on_frame, list[Frame]()

        def twice(link: LandLink, frame: Frame, payload: Payload) -> None:
            land(link, frame, payload)
            if not seen:
                seen.append(frame)
                other = Payload.whole(torch.full_like(payload.tensor(), 7))
                again = replace(frame, digests=piece_digests(other, frame.transfer_id))
                if link.one_sided:
                    pair.d.engine.store.write(the_reservation(pair).reserved, other.tensor())
                land(link, again, other)

        handoffs.on_frame = twice
        call = pair.request("twice", prompt(30), max_tokens=3)
        pair.until(lambda: call.ended)
        assert seen and isinstance(call.error, TransferFailed), f"a frame landed twice; {call.error}"
        assert "repeats layers" in call.error.message, call.error
        assert not call.decode.tokens


# ---------------------------------------------------------------------------------------------------------- generations


def messages_of_an_older_generation(connector: str) -> None:
    """E14, rule H6: what is late of a former grant must not touch the present one, which has the same blocks."""
    with pair_of(connector, decode_blocks=12) as pair:
        first = a_held_transfer(pair)
        former, link, handoffs = the_reservation(pair), pair.d.links[0], pair.d.worker.handoffs
        first.cancel()
        let_go(pair)
        pair.until(lambda: first.ended and pair.at_rest() and pair.d.pool.counts().at_rest)
        call = a_held_transfer(pair, seed=2)
        present, layout = the_reservation(pair), pair.d.engine.layout
        assert 0 < former.generation < present.generation and set(former.reserved) & set(present.reserved)
        garbage = Payload.whole(torch.full((1, layout.block_bytes), 7, dtype=torch.uint8))
        for transfer_id in (former.id, present.id):
            digests = piece_digests(garbage, transfer_id)
            frame = Frame(transfer_id, former.generation, 0, 1, 0, layout.layers, garbage.nbytes, digests)
            handoffs.on_frame(link, frame, garbage)
            handoffs.on_message(link, Released(transfer_id, former.generation))
            handoffs.on_message(link, Abort(transfer_id, former.generation, "late"))
        assert pair.d.worker.handoffs.count == 1, "a message of an older generation ended the present transfer"
        let_go(pair)
        pair.until(lambda: call.ended)
        assert_right(call)


# ----------------------------------------------------------------------------------------------------------- quarantine


def a_late_write_into_a_block_that_was_given_up(connector: str, seed: int = 1) -> None:
    """E10, E11, rule H3: P stands still before its write, D gives the reservation up, serves others; then it lands."""
    rng = random.Random(seed)
    with pair_of(connector, decode_blocks=24, decode_limits=DecodeLimits(lease=0.05)) as pair:
        call = a_held_transfer(pair, rng.randint(30, 48), seed)
        pair.until(lambda: call.decode.ended, turn=pair.turn_decode)  # nothing names it: its lease ends
        lengths = [rng.randint(12, 24) for _ in range(4)]
        others = [pair.local(f"other {i}", prompt(n, seed=50 * seed + i), max_tokens=16) for i, n in enumerate(lengths)]
        pair.until(lambda: any(other.output() for other in others), turn=pair.turn_decode)
        let_go(pair)  # the write lands now
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
        let_go(pair)
        pair.until(lambda: pair.d.pool.counts().quarantined == 0)


def quarantine_outlives_a_broken_link(connector: str) -> None:
    """A broken link proves nothing about P's writes; its death does, or a new link."""
    with pair_of(connector) as pair:
        call = a_held_transfer(pair)
        link, handoffs = pair.d.links[0], pair.d.worker.handoffs
        link.close()
        handoffs.on_lost(link, "cut")
        assert call.decode.ended
        held = 10 if link.one_sided else 0
        assert pair.d.pool.counts().quarantined == held
        assert handoffs.has_quarantined(link) == link.one_sided
        handoffs.is_quiet(a_stranger())
        assert pair.d.pool.counts().quarantined == held
        handoffs.is_quiet(link)
        assert pair.d.pool.counts().quarantined == 0
        let_go(pair)


def a_stranger() -> LandLink:
    """Another link."""
    return cast(LandLink, object())


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
        let_go(pair)
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
        let_go(pair)


def heartbeats_keep_a_slow_transfer_alive(connector: str) -> None:
    """E32: a long step of P is no death: its heartbeats have a thread of their own."""
    with pair_of(connector, decode_limits=DecodeLimits(lease=0.2)) as pair:
        call = a_held_transfer(pair)
        until = time.monotonic() + 0.6
        while time.monotonic() < until:
            pair.p.links[0].beat()
            pair.turn_decode()
        assert the_reservation(pair).phase is Phase.LANDING
        let_go(pair)
        pair.until(lambda: call.ended)
        assert_right(call)


def a_heartbeat_of_another_link_renews_nothing(connector: str) -> None:
    with pair_of(connector, decode_limits=DecodeLimits(lease=1.0)) as pair:
        call = a_held_transfer(pair)
        stranger = a_stranger()
        until = time.monotonic() + 3.0
        while not call.decode.ended:
            assert time.monotonic() < until, "a stranger's heartbeats kept the reservation alive"
            pair.d.worker.handoffs.on_message(stranger, Heartbeat((the_reservation(pair).id,)))
            pair.turn_decode()
        let_go(pair)


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


def a_spoiled_prompt_is_never_sent(connector: str) -> None:
    """E48: what P computed is not finite. D gets nothing of it, and an error of its own goes to the router."""
    with pair_of(connector) as pair:
        handoffs, heard = pair.d.worker.handoffs, list[bytes]()  # the transfers of frames and manifests
        on_frame, on_message = handoffs.on_frame, handoffs.on_message

        def frames(link: LandLink, frame: Frame, payload: Payload) -> None:
            heard.append(frame.transfer_id)
            on_frame(link, frame, payload)

        def messages(link: LandLink, message: Message) -> None:
            heard.extend([message.transfer_id] if isinstance(message, Manifest) else [])
            on_message(link, message)

        handoffs.on_frame, handoffs.on_message = frames, messages
        pair.p.engine.not_finite.add("spoiled")
        spoiled, good = (pair.request(name, prompt(30, seed=len(name)), max_tokens=3) for name in ("spoiled", "good"))
        pair.until(lambda: spoiled.ended and good.ended)
        assert_right(good)
        assert isinstance(spoiled.prefill.error, InternalError) and "not finite" in spoiled.prefill.error.message
        assert not spoiled.output()
        assert set(heard) == {Ticket.open(good.leg.ticket, KEY).transfer_id}, "spoiled KV was sent"


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
    a_spoiled_prompt_is_never_sent,
)
