"""P and D together over the in-process connector, every block checked by the fake engine's checksums."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from tandem.common.block_hash import BlockHash
from tandem.common.errors import Cancelled, InternalError, InvalidRequest, TicketRefused, TransferFailed
from tandem.common.handoff import Manifest, TicketGate
from tandem.common.request import SamplingParams
from tandem.decode_worker.limits import DecodeLimits
from tandem.decode_worker.reservation import Phase
from tandem.engine.batch import Sampled, Scheduled
from tandem.prefill_worker.outgoing import Outgoing
from tandem.prefill_worker.transfer import Transfer
from tandem.prefill_worker.worker import PrefillLimits
from tests.fakes import expected_output, make_leg, next_token
from tests.worker_pair import KEY, Call, Pair


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.assert_conserved()
    pair.close()


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(997) for _ in range(length)]


@pytest.mark.parametrize("length", [1, 3, 4, 5, 16, 37])
def test_a_prompt_goes_over_and_continues(pair: Pair, length: int) -> None:
    call = pair.request("r", prompt(length), max_tokens=9)
    pair.until(lambda: call.ended)
    assert call.error is None
    assert len(call.prefill.tokens[0]) == 1, "P samples token 1 and no other"
    assert call.output() == expected_output(prompt(length), 9)
    assert call.decode.reasons == {0: "length"}


def test_a_long_cached_prompt_is_copied_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is copied out of P's cache at once is bounded, however much of the prompt is already there."""
    pair = Pair(prefill_limits=PrefillLimits(max_backlog_bytes=3 * 4 * 16))  # three blocks
    monkeypatch.setattr(pair.p.engine.store, "memory", None)  # as if spread over the ranks of a group
    read, sizes = pair.p.engine.store.read, list[int]()

    def counted(blocks: list[int]) -> Tensor:
        sizes.append(len(blocks))
        return read(blocks)

    monkeypatch.setattr(pair.p.engine.store, "read", counted)
    for name in ("a", "b"):
        call = pair.request(name, prompt(50), max_tokens=3)
        pair.until(lambda call=call: call.ended)
        assert call.output() == expected_output(prompt(50), 3)
        evicting = pair.local(f"evict {name}", prompt(255, seed=3), max_tokens=1)  # D forgets the prompt, P does not
        pair.until(lambda call=evicting: call.ended)
    assert max(sizes) == 3 and sum(sizes) == 2 * 13
    pair.assert_conserved()
    pair.close()


def test_a_long_prompt_is_computed_in_chunks_and_pushed_while_it_is() -> None:
    pair = Pair(prefill_limits=PrefillLimits(max_num_batched_tokens=8, pipelined_from=0))
    call = pair.request("r", prompt(50), max_tokens=3)
    pair.until(lambda: bool(pair.p.engine.steps))
    pair.until(lambda: bool(pair.d.engine.store.tensor.any()), turn=pair.turn_decode)
    assert not call.prefill.tokens, "blocks land before the prompt is finished"
    pair.until(lambda: call.ended)
    assert [tokens for step in pair.p.engine.steps for _, tokens in step] == [8] * 6 + [2]
    assert call.output() == expected_output(prompt(50), 3)
    pair.assert_conserved()
    pair.close()


def test_many_concurrent_requests_with_shared_prefixes(pair: Pair) -> None:
    shared = prompt(20, seed=1)
    prompts = [shared[: random.Random(i).randrange(21)] + prompt(1 + i, seed=i) for i in range(12)]
    calls = [pair.request(f"r{i}", p, max_tokens=1 + i % 7) for i, p in enumerate(prompts)]
    pair.until(lambda: all(call.ended for call in calls))
    for call, p in zip(calls, prompts, strict=True):
        assert call.error is None
        assert call.output() == expected_output(p, call.leg.sampling.max_tokens)


def test_cached_prefixes_are_neither_computed_nor_sent_again(pair: Pair) -> None:
    first = pair.request("a", prompt(20))
    pair.until(lambda: first.ended)
    computed = sum(tokens for step in pair.p.engine.steps for _, tokens in step)
    second = pair.request("b", prompt(20))
    pair.until(lambda: pair.d.worker.handoffs.count == 1)
    pair.until(lambda: second.ended)
    assert second.output() == first.output()
    assert sum(tokens for step in pair.p.engine.steps for _, tokens in step) - computed == 4, "one block, for logits"
    assert second.prefill.ends[0].stats is not None and second.prefill.ends[0].stats.cached_tokens == 16
    assert second.decode.ends[0].stats is not None and second.decode.ends[0].stats.cached_tokens == 20


def test_salts_separate_tenants(pair: Pair) -> None:
    first = pair.request("a", prompt(20), cache_salt=b"one")
    pair.until(lambda: first.ended)
    second = pair.request("b", prompt(20), cache_salt=b"two")
    pair.until(lambda: second.ended)
    assert second.prefill.ends[0].stats is not None and second.prefill.ends[0].stats.cached_tokens == 0


@pytest.mark.parametrize("length", [7, 8])
def test_choices_share_one_prefill_and_one_transfer(pair: Pair, length: int) -> None:
    call = pair.request("r", prompt(length), max_tokens=6, choices=(0, 1, 2))
    pair.until(lambda: call.ended)
    assert call.error is None
    for choice in range(3):
        assert call.output(choice) == expected_output(prompt(length), 6, choice)
    assert sum(tokens for step in pair.p.engine.steps for _, tokens in step) == length


def test_choices_of_a_local_prompt(pair: Pair) -> None:
    call = pair.local("r", prompt(11), max_tokens=6, choices=(0, 1, 2))
    pair.until(lambda: call.ended)
    assert [call.output(choice) for choice in range(3)] == [expected_output(prompt(11), 6, c) for c in range(3)]


def test_a_choice_without_room_for_its_copy_recomputes_and_finishes() -> None:
    pair = Pair(decode_blocks=8)
    call = pair.local("r", prompt(9), max_tokens=8, choices=(0, 1, 2, 3))
    pair.until(lambda: call.ended)
    assert [call.output(c) for c in range(4)] == [expected_output(prompt(9), 8, c) for c in range(4)]
    pair.assert_conserved()
    pair.close()


def test_the_first_token_may_be_the_last(pair: Pair) -> None:
    call = pair.request("r", prompt(10), max_tokens=1)
    pair.until(lambda: call.ended)
    assert call.error is None
    assert call.output() == expected_output(prompt(10), 1) and call.prefill.reasons == {0: "length"}
    assert not call.decode.tokens


def test_a_stop_id_ends_with_reason_stop(pair: Pair) -> None:
    expected = expected_output(prompt(10), 5)
    sampling = SamplingParams(max_tokens=50, temperature=0.0, stop_token_ids=(expected[3],))
    call = pair.request("r", prompt(10), sampling=sampling)
    pair.until(lambda: call.ended)
    assert call.output() == expected[:4] and call.decode.reasons == {0: "stop"}


def test_resumption_replays_the_tokens_so_far(pair: Pair) -> None:
    expected = expected_output(prompt(10), 9)
    call = pair.request("r", prompt(10), max_tokens=9, output_ids=tuple(expected[:4]))
    pair.until(lambda: call.ended)
    assert call.output() == expected[4:]


def test_memory_pressure_preempts_and_still_answers_exactly() -> None:
    pair = Pair(decode_blocks=16)
    calls = [pair.local(f"r{i}", prompt(9, seed=i), max_tokens=20) for i in range(5)]
    pair.until(lambda: all(call.ended for call in calls))
    assert pair.d.worker.scheduler.preemptions > 0
    for i, call in enumerate(calls):
        assert call.output() == expected_output(prompt(9, seed=i), 20)
    pair.assert_conserved()
    pair.close()


def test_a_full_decode_worker_grants_later_and_nothing_is_lost() -> None:
    pair = Pair(decode_blocks=14, decode_limits=DecodeLimits(park=0.0))
    calls = [pair.request(f"r{i}", prompt(17, seed=i), max_tokens=12) for i in range(6)]
    pair.until(lambda: all(call.ended for call in calls), seconds=20)
    for i, call in enumerate(calls):
        assert call.error is None, call.error
        assert call.output() == expected_output(prompt(17, seed=i), 12)
    pair.assert_conserved()
    pair.close()


def test_a_small_prefill_worker_takes_turns() -> None:
    pair = Pair(prefill_blocks=6)
    calls = [pair.request(f"r{i}", prompt(20, seed=i), max_tokens=2) for i in range(5)]
    pair.until(lambda: all(call.ended for call in calls))
    assert all(call.error is None for call in calls)
    pair.assert_conserved()
    pair.close()


def test_a_prompt_may_wait_for_its_turn_on_p_longer_than_a_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grant is asked for when the prompt's turn is near: its lease runs from then on."""
    pair = Pair(128, 128, PrefillLimits(max_num_batched_tokens=8), DecodeLimits(lease=0.5))
    forward = pair.p.engine.forward

    def slowly(scheduled: list[Scheduled]) -> list[Sampled]:
        time.sleep(0.03)  # 48 steps: three leases
        return forward(scheduled)

    monkeypatch.setattr(pair.p.engine, "forward", slowly)
    calls = [pair.request(f"r{i}", prompt(32, seed=i), max_tokens=2) for i in range(12)]
    pair.until(lambda: all(call.ended for call in calls))
    assert not [call.error for call in calls if call.error is not None]
    pair.assert_conserved()
    pair.close()


def test_a_full_decode_worker_does_not_keep_p_from_serving_another(monkeypatch: pytest.MonkeyPatch) -> None:
    full, other = Pair(decode_blocks=16), Pair()
    other.d.worker.handoffs._gate = TicketGate(KEY, "decode", "d-2", other.d.engine.layout.pairing)
    other.p, pairs = full.p, {"d": full, "d2": other}  # by D's address
    monkeypatch.setattr(full.p.worker, "_connect", lambda address, *rest: pairs[address]._connect(address, *rest))
    full.local("hog", prompt(40, seed=5), max_tokens=20)
    full.until(lambda: full.d.pool.counts().owned >= 10)
    stuck = [full.request(f"r{i}", prompt(30, seed=i), max_tokens=4) for i in range(70)]

    def turn() -> None:  # the hog stands still, and so the room it takes
        full.d.worker.inbox.run_pending()
        full.d.worker.handoffs.tick()
        other.turn()

    leg = make_leg("free", prompt(20), 4, ticket=full.ticket("free", decode_incarnation="d-2"))
    call = Call(full, leg, 901, 902)
    other.d.worker.submit(902, leg, call.decode)
    full.p.worker.submit(901, leg, "d2", call.prefill)
    full.until(lambda: call.ended, seconds=3.0, turn=turn)
    assert call.output() == expected_output(prompt(20), 4)
    for waiting in stuck:
        assert not waiting.ended
        waiting.cancel()
    full.assert_conserved()
    other.assert_conserved()
    full.close()


def test_a_large_prompt_is_not_overtaken_on_d() -> None:
    pair = Pair(decode_blocks=16)
    hog = pair.local("hog", prompt(20, seed=5), max_tokens=30)
    pair.until(lambda: pair.d.pool.counts().owned >= 5)

    def parked() -> list[str]:
        reservations = pair.d.worker.handoffs._reservations.values()
        return [r.sequence.request_id for r in reservations if r.phase is Phase.PARKED]

    large = pair.request("large", prompt(48, seed=1), max_tokens=4)
    pair.until(lambda: parked() == ["large"])
    small = pair.request("small", prompt(4, seed=2), max_tokens=4)
    pair.until(lambda: parked() == ["large", "small"])
    pair.until(lambda: hog.ended and large.ended and small.ended)
    assert [large.error, small.error] == [None, None]
    pair.assert_conserved()
    pair.close()


@pytest.mark.parametrize("turns", range(14))
def test_cancel_after_any_number_of_turns_frees_everything(turns: int) -> None:
    pair = Pair(prefill_limits=PrefillLimits(max_num_batched_tokens=8, pipelined_from=0))
    call = pair.request("r", prompt(30), max_tokens=6)
    other = pair.request("other", prompt(12, seed=9), max_tokens=6)
    for _ in range(turns):
        pair.turn()
    call.cancel()
    pair.until(lambda: call.ended and other.ended)
    assert call.error is None or isinstance(call.error, (Cancelled, TransferFailed))
    assert other.output() == expected_output(prompt(12, seed=9), 6)
    pair.assert_conserved()
    pair.close()


def test_a_failing_step_ends_its_requests_only(pair: Pair) -> None:
    pair.d.engine.poison.add("bad")
    bad = pair.request("bad", prompt(8))
    pair.until(lambda: bad.ended)
    assert isinstance(bad.error, InternalError)
    good = pair.request("good", prompt(8))
    pair.until(lambda: good.ended)
    assert good.output() == expected_output(prompt(8), 8)


def test_a_broken_link_fails_its_transfers_on_both_sides_and_a_new_one_is_made(pair: Pair) -> None:
    call = pair.request("r", prompt(30))
    pair.until(lambda: bool(pair.p.links))
    pair.until(lambda: pair.d.pool.counts().reserved > 0)
    pair.channels[0].close()
    pair.until(lambda: call.ended and pair.p.worker.quiet("d-1"))  # before, P asks for another try
    assert isinstance(call.error, TransferFailed)
    again = pair.request("again", prompt(30))
    pair.until(lambda: again.ended)
    assert again.output() == expected_output(prompt(30), 8)


def test_a_reservation_without_progress_ends_with_its_lease() -> None:
    pair = Pair(decode_limits=DecodeLimits(lease=0.05))
    call = pair.request("r", prompt(30))
    pair.until(lambda: pair.d.pool.counts().reserved > 0)
    pair.until(lambda: call.decode.ended, turn=pair.turn_decode)
    assert isinstance(call.decode.error, TransferFailed)
    assert pair.d.pool.counts().reserved == 0
    pair.until(lambda: call.prefill.ended)
    assert isinstance(call.prefill.error, TransferFailed), "P was told"
    pair.assert_conserved()
    pair.close()


def test_a_manifest_that_disagrees_is_never_decoded(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    finish = pair.p.worker._finish

    def lie(transfer: Transfer, outgoing: Outgoing) -> None:
        transfer.sequence.hashes[0] = BlockHash(bytes(32))
        finish(transfer, outgoing)

    monkeypatch.setattr(pair.p.worker, "_finish", lie)
    call = pair.request("r", prompt(12))
    pair.until(lambda: call.ended)
    assert isinstance(call.error, TransferFailed) and not call.decode.tokens


def test_a_first_token_outside_the_vocabulary_is_never_decoded(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    finish = pair.p.worker._finish

    def lie(transfer: Transfer, outgoing: Outgoing) -> None:
        transfer.first_tokens = (1 << 40,)  # no block hash could be computed over it
        finish(transfer, outgoing)

    monkeypatch.setattr(pair.p.worker, "_finish", lie)
    call = pair.request("r", prompt(7))
    pair.until(lambda: call.ended)
    assert isinstance(call.error, TransferFailed) and not call.decode.tokens


def test_a_manifest_without_a_grant_changes_nothing() -> None:
    pair = Pair(decode_blocks=16)
    pair.local("hog", prompt(40, seed=5), max_tokens=20)
    pair.until(lambda: pair.d.pool.counts().owned >= 10)
    call = pair.request("r", prompt(30), max_tokens=4)
    handoffs = pair.d.worker.handoffs
    pair.until(lambda: [r.phase for r in handoffs._reservations.values()] == [Phase.PARKED])
    handoffs.on_message(pair.d.links[0], Manifest(next(iter(handoffs._reservations)), 0, 30, (), (), (1,)))
    pair.until(lambda: call.ended)
    assert call.output() == expected_output(prompt(30), 4)
    pair.assert_conserved()
    pair.close()


@pytest.mark.parametrize(
    "changes",
    [{"decode_incarnation": "d-0", "prefill_incarnation": "p-0"}, {"pairing": b"another layout"}],
)
def test_tickets_for_others_are_refused(pair: Pair, changes: dict[str, Any]) -> None:
    call = pair.request("r", prompt(8))
    pair.until(lambda: call.ended)
    sealed = pair.ticket("x", **changes)
    leg = replace(call.leg, ticket=sealed)
    again = Call(pair, leg, 901, 902)
    pair.d.worker.submit(902, leg, again.decode)
    pair.p.worker.submit(901, leg, "d", again.prefill)
    assert isinstance(again.decode.error, TicketRefused) and isinstance(again.prefill.error, TicketRefused)


def test_a_ticket_works_once(pair: Pair) -> None:
    call = pair.request("r", prompt(8))
    pair.until(lambda: call.ended)
    again = Call(pair, call.leg, 901, 902)
    pair.d.worker.submit(902, call.leg, again.decode)
    pair.p.worker.submit(901, call.leg, "d", again.prefill)
    assert isinstance(again.decode.error, TicketRefused) and isinstance(again.prefill.error, TicketRefused)


def test_a_flipped_bit_in_a_ticket_is_refused(pair: Pair) -> None:
    sealed = bytearray(pair.ticket("r"))
    sealed[5] ^= 1
    call = pair.local("r", prompt(8), ticket=bytes(sealed))
    assert isinstance(call.decode.error, TicketRefused)


def test_an_unknown_token_id_never_reaches_the_engine(pair: Pair) -> None:
    call = pair.local("r", [1, 2, 5000])
    assert isinstance(call.decode.error, InvalidRequest)
    assert not pair.d.engine.steps


def test_the_deadline_ends_a_leg_whose_peer_never_comes(pair: Pair) -> None:
    call = pair.local("r", prompt(8), ticket=pair.ticket("r", timeout=0.0), timeout=0.0)
    pair.until(lambda: call.decode.ended)
    assert call.decode.error is not None


def test_the_oracle_itself_notices_foreign_kv(pair: Pair) -> None:
    """The checks above mean something only if a wrong block is seen."""
    call = pair.request("r", prompt(12), max_tokens=20)
    pair.until(lambda: len(call.output()) > 2)
    pair.d.engine.store.tensor += 1
    pair.until(lambda: call.ended)
    assert isinstance(call.error, InternalError)
    assert next_token(prompt(12)) == call.output()[0]
