"""Rules of the protocol switched off, one at a time: each time a story of the fault suite must go wrong (E60).

A rule whose absence nobody notices is either not needed or not tested.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tandem.common import handoff
from tandem.common.handoff import Frame, Released, Ticket, TicketGate
from tandem.common.proto import tandem_pb2 as pb
from tandem.common.request import Leg
from tandem.common.tokenizer import Tokenizer
from tandem.decode_worker.handoff import Handoffs
from tandem.decode_worker.worker import DecodeWorker
from tandem.kv_transfer import land, link
from tandem.kv_transfer.frame import BlockDigests
from tandem.kv_transfer.landing import Landing
from tandem.prefill_worker.worker import PrefillWorker
from tandem.router.generation import Generation
from tests import worker_pair
from tests.common.trained import write_chatml
from tests.faults import life, scenarios
from tests.faults.scenarios import Story
from tests.router.fake_cluster import FakeCluster, FakeWorker, Script, update


def no_digest(patch: pytest.MonkeyPatch) -> None:
    """H4: what landed is believed."""
    patch.setattr(land, "check_payload", lambda frame, payload: None)


def no_generation(patch: pytest.MonkeyPatch) -> None:
    """H6: whatever names the transfer is of its present grant."""

    def current(self: Handoffs, link: Any, message: Any) -> Any:
        return self._reservations.get(message.transfer_id)

    patch.setattr(Handoffs, "_current", current)
    patch.setattr(Landing, "_check_current", lambda self, transfer_id, generation: None)


def no_quarantine(patch: pytest.MonkeyPatch) -> None:
    """H3: blocks of an aborted reservation are free at once, also where P writes by itself."""

    def fail(self: Handoffs, reservation: Any, error: Any, tell: bool = True) -> None:
        original(self, reservation, error, tell)
        self._release_quarantined(lambda item: True)

    original = Handoffs._fail
    patch.setattr(Handoffs, "_fail", fail)


def no_lease(patch: pytest.MonkeyPatch) -> None:
    """H5: a reservation may stay for ever."""

    def tick(self: Handoffs) -> None:
        for reservation in self._reservations.values():
            reservation.lease = float("inf")
        original(self)

    original = Handoffs.tick
    patch.setattr(Handoffs, "tick", tick)


def no_mac(patch: pytest.MonkeyPatch) -> None:
    """Tickets: whoever seals one."""

    def opened(cls: type[Ticket], sealed: bytes, key: bytes) -> Ticket:
        return handoff._build(Ticket, handoff._unpack(sealed[:-32]))

    patch.setattr(Ticket, "open", classmethod(opened))


def no_single_use(patch: pytest.MonkeyPatch) -> None:
    """Tickets: any number of times."""
    patch.setattr(TicketGate, "admit", TicketGate.verify)


def no_incarnation(patch: pytest.MonkeyPatch) -> None:
    """Tickets: also for one who was here before."""
    as_if(patch, lambda gate: {"prefill_incarnation": gate._incarnation, "decode_incarnation": gate._incarnation})


def no_pairing(patch: pytest.MonkeyPatch) -> None:
    """Tickets: also for KV of another layout."""
    as_if(patch, lambda gate: {"pairing": gate._pairing})


def as_if(patch: pytest.MonkeyPatch, right: Callable[[TicketGate], dict[str, Any]]) -> None:
    """The gate finds in each ticket what is right."""

    def verify(self: TicketGate, sealed: bytes) -> Ticket:
        return original(self, replace(Ticket.open(sealed, self._key), **right(self)).seal(self._key))

    original = TicketGate.verify
    patch.setattr(TicketGate, "verify", verify)


def no_pin(patch: pytest.MonkeyPatch) -> None:
    """P's blocks are released while its link still reads them."""
    from tandem.kv_transfer.push import PushLink

    def forget(self: PushLink, transfer_id: bytes, on_quiet: Callable[[], None]) -> None:
        original(self, transfer_id, lambda: None)
        on_quiet()

    original = PushLink.forget
    patch.setattr(PushLink, "forget", forget)


def no_link_of_its_own(patch: pytest.MonkeyPatch) -> None:
    """H1: a message counts whichever link it came over."""

    def on_heartbeat(self: Handoffs, link: Any, message: Any) -> None:
        for transfer_id in message.transfers:
            self._reservations[transfer_id].lease = float("inf")

    patch.setattr(Handoffs, "_on_heartbeat", on_heartbeat)


def no_drop(patch: pytest.MonkeyPatch) -> None:
    """H2: a frame is taken although its transfer was aborted."""

    def fail(self: Handoffs, reservation: Any, *rest: Any) -> None:
        over[reservation.id] = reservation
        failing(self, reservation, *rest)

    def the_current(self: Handoffs, link: Any, message: Any) -> Any:
        return current(self, link, message) or (over.get(message.transfer_id) if isinstance(message, Frame) else None)

    over: dict[bytes, Any] = {}
    failing, current = Handoffs._fail, Handoffs._current
    patch.setattr(Handoffs, "_fail", fail)
    patch.setattr(Handoffs, "_current", the_current)
    patch.setattr(land.LandLink, "revoke", lambda self, transfer_id: None)


def no_repeat_check(patch: pytest.MonkeyPatch) -> None:
    """H1: a block may land as often as it likes; the last digest counts."""

    def add(self: BlockDigests, frame: Frame) -> None:
        for index, block in enumerate(range(frame.first_block, frame.first_block + frame.num_blocks)):
            self._pieces[block] = [(frame.first_layer, frame.num_layers, frame.digests[index])]
            self._landed[block] = self._layers

    patch.setattr(BlockDigests, "add", add)


def no_zero_generation(patch: pytest.MonkeyPatch) -> None:
    """H3: the word of a P that never saw the grant counts for nothing."""

    def on_released(self: Handoffs, link: Any, message: Released) -> None:
        if message.generation:
            original(self, link, message)

    original = Handoffs._on_released
    patch.setattr(Handoffs, "_on_released", on_released)


def no_order(patch: pytest.MonkeyPatch) -> None:
    """H8: whoever fits is granted room."""
    original = Handoffs._grant
    patch.setattr(Handoffs, "_grant", lambda self, reservation: original(self, reservation) or True)


def no_cancel_of_p(patch: pytest.MonkeyPatch) -> None:
    """H9."""
    patch.setattr(PrefillWorker, "cancel", lambda self, leg_id: None)


def no_cancel_of_d(patch: pytest.MonkeyPatch) -> None:
    """H9."""
    patch.setattr(DecodeWorker, "cancel", lambda self, leg_id: None)


def no_silence(patch: pytest.MonkeyPatch) -> None:
    """H10: a link may say nothing for ever."""
    patch.setattr(link, "SILENCE", float("inf"))


def no_timer(patch: pytest.MonkeyPatch) -> None:
    """H10: P waits for D for ever."""
    patch.setattr(PrefillWorker, "_expire", lambda self: None)


def no_drain_of_p(patch: pytest.MonkeyPatch) -> None:
    """H11: P leaves while its links still send."""
    patch.setattr(PrefillWorker, "idle", property(lambda self: not self._transfers))


def no_drain_of_d(patch: pytest.MonkeyPatch) -> None:
    """H11: D leaves while KV lands."""
    patch.setattr(DecodeWorker, "idle", property(lambda self: not self._legs))


@dataclass(frozen=True)
class Mutation:
    rule_off: Callable[[pytest.MonkeyPatch], None]
    story: Story
    wrong: str  # the story must find this, by a regular expression
    connector: str = "inproc"


MUTATIONS = (
    Mutation(no_repeat_check, scenarios.a_frame_that_comes_twice, "not those of the landed blocks"),
    Mutation(no_drop, scenarios.a_late_write_into_a_block_that_was_given_up, "ForeignKV"),
    Mutation(no_quarantine, scenarios.a_late_write_into_a_block_that_was_given_up, "ForeignKV", "shm"),
    Mutation(no_zero_generation, life.cancel_while_the_grant_is_under_way, "did not get there in time", "shm"),
    Mutation(no_digest, scenarios.one_flipped_bit_at_every_64th_byte, "went unnoticed"),
    Mutation(no_digest, scenarios.one_flipped_bit_at_every_64th_byte, "went unnoticed", "shm"),
    Mutation(no_lease, scenarios.a_silent_prefill_worker_loses_its_reservation, "did not get there in time"),
    Mutation(no_generation, scenarios.messages_of_an_older_generation, "ended the present transfer"),
    Mutation(no_order, life.a_large_prompt_is_not_overtaken, "a small prompt took the room"),
    Mutation(no_cancel_of_p, life.a_cancel_ends_each_leg, "P did not hear"),
    Mutation(no_cancel_of_d, life.a_cancel_ends_each_leg, "D did not hear"),
    Mutation(no_silence, life.a_silent_link_is_given_up, "although its peer is silent"),
    Mutation(no_timer, life.a_grant_that_never_comes, "did not get there in time"),
    Mutation(no_drain_of_p, life.cancel_while_a_payload_is_in_flight, "a prefill worker that drains"),
    Mutation(no_drain_of_d, life.cancel_while_a_payload_is_in_flight, "a decode worker that drains"),
    Mutation(no_mac, scenarios.tickets_are_checked, "D took ticket [12]"),
    Mutation(no_single_use, scenarios.tickets_are_checked, "D took ticket 0"),
    Mutation(no_incarnation, scenarios.tickets_are_checked, "D took ticket 3"),
    Mutation(no_pairing, scenarios.tickets_are_checked, "D took ticket 4"),
    Mutation(no_pin, life.cancel_while_a_payload_is_in_flight, "blocks were released while they are being sent"),
    Mutation(no_link_of_its_own, scenarios.a_heartbeat_of_another_link_renews_nothing, "a stranger's heartbeats"),
)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.rule_off.__name__}-{m.connector}")
def test_the_suite_notices(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation.rule_off(monkeypatch)
    monkeypatch.setattr(worker_pair, "PATIENCE", 1.5)
    with pytest.raises(AssertionError, match=mutation.wrong):
        mutation.story(mutation.connector)


# ------------------------------------------------------------------------------------------------ at the router: H7


async def tokens_behind_a_stop_string(directory: Path) -> None:
    """D knows no stop strings, so it sends on for a while; the client's stream has ended, once."""
    write_chatml(directory)
    (directory / "config.json").write_text(json.dumps({"vocab_size": 600}))
    tokenizer = Tokenizer.load(directory)
    script = Script([[*tokenizer.encode("one two three four five", False), tokenizer.eos_token_ids[0]]])

    async def all_at_once(worker: FakeWorker, leg: Leg, context: Any) -> AsyncIterator[pb.LegUpdate]:
        yield update(*(worker.script.token(leg, 0, index) for index in range(1, len(script.choices[0]))))

    async with FakeCluster(directory, script) as fake:
        fake.decode[0].on_leg = all_at_once
        body = {"model": "tiny", "prompt": "count", "stream": True, "stop": ["three"], "max_tokens": 64}
        lines = [line async for line in (await fake.http.post("/v1/completions", json=body)).aiter_lines() if line]
    assert lines.pop() == "data: [DONE]"
    choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines]
    assert "".join(choice["text"] for choice in choices) == "one two "
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["stop"]


async def test_what_comes_behind_an_end_is_dropped(tmp_path: Path) -> None:
    await tokens_behind_a_stop_string(tmp_path)


async def test_the_suite_notices_when_it_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Generation, "_late", lambda self, choice: False)
    with pytest.raises(AssertionError):
        await tokens_behind_a_stop_string(tmp_path)
