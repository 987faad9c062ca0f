"""Rules of the protocol switched off, one at a time: each time a story of the fault suite must go wrong (E60).

A rule whose absence nobody notices is either not needed or not tested.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tandem.common.handoff import Ticket, TicketGate
from tandem.decode_worker.handoff import Handoffs
from tandem.kv_transfer import land
from tandem.kv_transfer.landing import Landing
from tests import worker_pair
from tests.faults import scenarios
from tests.faults.scenarios import Story


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


def no_ticket_check(patch: pytest.MonkeyPatch) -> None:
    """Any ticket will do, any number of times."""

    def opened(self: TicketGate, sealed: bytes) -> Ticket:
        from tandem.common import handoff

        return handoff._build(Ticket, handoff._unpack(sealed[:-32]))

    patch.setattr(TicketGate, "verify", opened)
    patch.setattr(TicketGate, "admit", opened)


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


@dataclass(frozen=True)
class Mutation:
    rule_off: Callable[[pytest.MonkeyPatch], None]
    story: Story
    connector: str = "inproc"


MUTATIONS = (
    Mutation(no_digest, scenarios.one_flipped_bit_at_every_64th_byte),
    Mutation(no_digest, scenarios.one_flipped_bit_at_every_64th_byte, "shm"),
    Mutation(no_generation, scenarios.messages_of_an_older_generation),
    Mutation(no_quarantine, scenarios.a_late_write_into_a_block_that_was_given_up, "shm"),
    Mutation(no_lease, scenarios.a_silent_prefill_worker_loses_its_reservation),
    Mutation(no_ticket_check, scenarios.tickets_are_checked),
    Mutation(no_pin, scenarios.cancel_while_a_payload_is_in_flight),
    Mutation(no_link_of_its_own, scenarios.a_heartbeat_of_another_link_renews_nothing),
)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.rule_off.__name__}-{m.connector}")
def test_the_suite_notices(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation.rule_off(monkeypatch)
    monkeypatch.setattr(worker_pair, "PATIENCE", 3.0)
    with pytest.raises(AssertionError):
        mutation.story(mutation.connector)
