"""More stories between one P and one D, as in scenarios.py: cancels, order and liveness (rules H8 to H11)."""

from __future__ import annotations

from tandem.common.errors import TransferFailed
from tandem.decode_worker.reservation import Phase
from tandem.kv_transfer.link import SILENCE
from tandem.prefill_worker.worker import PrefillLimits
from tests.faults.scenarios import Story, a_held_transfer, assert_right, let_go, pair_of, prompt

# --------------------------------------------------------------------------------------------------------- cancellation


def cancel_while_a_payload_is_in_flight(connector: str) -> None:
    """P keeps its blocks until the link has let go of them: what it sends is never somebody else's (rule H11 too)."""
    with pair_of(connector) as pair:
        call = a_held_transfer(pair)
        assert not pair.d.worker.idle, "a decode worker that drains would leave in the middle of a hand-off"
        call.cancel()
        for _ in range(5):
            pair.turn()
        assert call.ended
        assert pair.p.pool.counts().owned == 10, "blocks were released while they are being sent"
        assert not pair.p.worker.idle, "a prefill worker that drains would leave while it sends"
        let_go(pair)
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


def a_cancel_ends_each_leg(connector: str) -> None:
    """Rule H9: at once, in whatever state the hand-off is, and with no help from the other end."""
    with pair_of(connector) as pair:
        running = pair.local("running", prompt(12), max_tokens=200)
        pair.until(lambda: bool(running.decode.tokens))
        running.cancel()
        assert running.decode.ended, "D did not hear of a cancel"
        for turns in range(12):
            call = pair.request(f"after {turns}", prompt(40, seed=turns), max_tokens=20)
            for _ in range(turns):
                pair.turn()
            pair.p.worker.cancel(call.prefill_leg)
            assert call.prefill.ended, f"P did not hear of a cancel, {turns} turns into the hand-off"
            call.cancel()
            assert call.ended, f"D did not hear of a cancel, {turns} turns into the hand-off"


# ------------------------------------------------------------------------------------------------- order and liveness


def a_large_prompt_is_not_overtaken(connector: str) -> None:
    """Rule H8: D grants the oldest first, though there is room for the next one only."""
    with pair_of(connector, decode_blocks=24) as pair:
        taken = pair.d.pool.reserve(10)
        assert taken is not None
        large, small = pair.request("large", prompt(64), max_tokens=2), pair.request("small", prompt(8), max_tokens=2)
        reservations = pair.d.worker.handoffs._reservations
        pair.until(lambda: all(reservation.link is not None for reservation in reservations.values()))
        for _ in range(20):
            pair.turn()
            phases = [reservation.phase for reservation in reservations.values()]
            assert phases == [Phase.PARKED] * 2, "a small prompt took the room that a large one waits for"
        pair.d.pool.unreserve(taken)
        pair.until(lambda: large.ended and small.ended)
        for call in (large, small):
            assert_right(call)


def a_silent_link_is_given_up(connector: str) -> None:
    """Rule H10: 5 s without a word, heartbeats included."""
    with pair_of(connector) as pair:
        call = a_held_transfer(pair)
        for link in (pair.p.links[0], pair.d.links[0]):
            link._heard -= SILENCE + 0.1
            assert not link.beat(), "a link stays although its peer is silent"
        pair.until(lambda: call.ended)
        assert isinstance(call.prefill.error, TransferFailed) and "no sign of life" in call.prefill.error.message
        let_go(pair)
        assert pair.p.links[0].join(5.0)
        pair.d.worker.handoffs.is_quiet(pair.d.links[0])


def a_grant_that_never_comes(connector: str) -> None:
    """Rules H5 and H10: D lives and says nothing of this; P's timer ends it."""
    with pair_of(connector, prefill_limits=PrefillLimits(grant_timeout=0.05)) as pair:
        call = pair.request("unanswered", prompt(12))
        pair.until(lambda: call.prefill.ended, turn=pair.turn_prefill)
        assert isinstance(call.prefill.error, TransferFailed) and "no answer" in call.prefill.error.message
        call.cancel()


LIFE_STORIES: tuple[Story, ...] = (
    cancel_while_a_payload_is_in_flight,
    cancel_while_the_grant_is_under_way,
    a_cancel_ends_each_leg,
    a_large_prompt_is_not_overtaken,
    a_silent_link_is_given_up,
    a_grant_that_never_comes,
)
