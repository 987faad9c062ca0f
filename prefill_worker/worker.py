"""The prefill worker: computes prompts in chunks and pushes their KV blocks to decode workers that granted room.

No Ray, gRPC or asyncio here: `service.py` feeds the inbox, links deliver messages into it, `step` does the rest.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from tandem.common.errors import Cancelled, DeadlineExceeded, InternalError, TandemError, TransferFailed
from tandem.common.handoff import Abort, Ack, Grant, Message, Refuse, Reserve, TicketGate
from tandem.common.request import Leg, LegUpdate, Token
from tandem.common.worker_info import Load
from tandem.common.worker_loop import Bulkhead, Inbox, Sink
from tandem.engine.allocation import blocks_for
from tandem.engine.batch import Sampled
from tandem.engine.block_pool import BlockPool
from tandem.engine.engine import Engine
from tandem.engine.sequence import Sequence, check_tokens
from tandem.kv_transfer.push import PushLink
from tandem.prefill_worker.scheduler import PrefillScheduler
from tandem.prefill_worker.transfer import Phase, Transfer

log = logging.getLogger("tandem.prefill")

Connect = Callable[[str, str, Callable[[Message], None], Callable[[str], None]], PushLink]
"""(address, incarnation of D, on_message, on_lost) → a link that opens itself on its own thread."""


@dataclass(frozen=True, slots=True)
class PrefillLimits:
    max_num_batched_tokens: int = 512
    max_num_seqs: int = 64
    reserve_ahead: int = 4  # steps whose tokens may hold or await a grant
    grant_timeout: float = 30.0  # seconds D may take to answer a Reserve
    ack_timeout: float = 30.0  # seconds D may take to answer a Manifest
    retry_pause: float = 0.05  # seconds before D is asked again after Refuse(later)
    max_backlog_bytes: int = 256 << 20  # payload copied out of the cache and not yet sent, per link


class PrefillWorker:
    def __init__(
        self, engine: Engine, pool: BlockPool, gate: TicketGate, connect: Connect, limits: PrefillLimits
    ) -> None:
        self.inbox = Inbox()
        self._engine, self._pool, self._gate, self._connect, self._limits = engine, pool, gate, connect, limits
        self._fingerprint = engine.layout.fingerprint
        self._scheduler = PrefillScheduler(pool, self._fingerprint, limits.max_num_batched_tokens, limits.max_num_seqs)
        self._transfers: dict[bytes, Transfer] = {}  # by transfer id, in order of arrival
        self._by_leg: dict[int, Transfer] = {}
        self._by_sequence: dict[Sequence, Transfer] = {}
        self._links: dict[str, PushLink] = {}  # by D's incarnation
        self._bulkhead = Bulkhead()

    # ------------------------------------------------------------------ the loop

    def step(self) -> bool:
        """One chunk of as many prompts as fit the token budget."""
        self._expire()
        self._ask()
        self._start()
        scheduled = self._scheduler.schedule()
        if scheduled:
            try:
                sampled = self._engine.forward(scheduled)
            except Exception as exc:
                error = self._bulkhead.failed(exc)
                for item in scheduled:
                    self._end(self._by_sequence[item.sequence], error)
                return True
            self._bulkhead.passed()
            self._scheduler.advance(scheduled)
            for result in sampled:
                self._first_tokens(result)
        self._push()
        return bool(scheduled)

    def _ask(self) -> None:
        """Request room for the next prompts in line; their turn comes only with a grant in hand (rule H8).

        D's lease runs while a granted prompt waits here, so no more is asked for than what the next few steps compute.
        What a full D lets wait is counted against that D alone: the others' requests go on.
        """
        now, window = time.monotonic(), self._limits.reserve_ahead * self._limits.max_num_batched_tokens
        granted = (t for t in self._transfers.values() if t.phase in (Phase.GRANTED, Phase.COMPUTING))
        tokens = sum(transfer.sequence.remaining for transfer in granted)
        asked = Counter[PushLink]()  # tokens
        for transfer in self._transfers.values():
            ahead = tokens + asked[transfer.link]
            if transfer.phase is Phase.QUEUED and transfer.retry_at <= now and ahead < window:
                transfer.phase, transfer.phase_deadline = Phase.ASKED, now + self._limits.grant_timeout
                transfer.link.post(
                    Reserve(transfer.ticket.transfer_id, transfer.sealed, len(transfer.sequence.token_ids))
                )
            if transfer.phase is Phase.ASKED:
                asked[transfer.link] += transfer.sequence.remaining

    def _start(self) -> None:
        for transfer in self._transfers.values():
            if transfer.phase is Phase.GRANTED:
                if not self._scheduler.start(transfer.sequence):
                    return
                transfer.phase, transfer.started = Phase.COMPUTING, time.monotonic()
                transfer.sequence.cached = transfer.sequence.computed

    def _first_tokens(self, result: Sampled) -> None:
        """Token 1 reaches the client at once; the blocks follow to D."""
        transfer = self._by_sequence[result.sequence]
        if result.error:
            self._end(transfer, InternalError(result.error))
            return
        transfer.sampled, transfer.first_tokens = time.monotonic(), result.token_ids
        transfer.sink(LegUpdate(tokens=tuple(first_tokens(result))))

    def _push(self) -> None:
        """Send every finished block D misses; behind the last one, the manifest."""
        for transfer in list(self._transfers.values()):
            if transfer.phase is Phase.COMPUTING and transfer.link.backlog_bytes <= self._limits.max_backlog_bytes:
                self._push_blocks(transfer)
                if transfer.first_tokens and transfer.pushed == len(transfer.sequence.blocks):
                    self._finish(transfer)

    def _push_blocks(self, transfer: Transfer) -> None:
        sequence, size = transfer.sequence, self._pool.block_size
        # a block is final when it is full or the prompt ends in it
        final = sequence.computed // size if sequence.remaining else len(sequence.blocks)
        first = transfer.pushed
        # no more at once than may be queued: all of a long prompt can be final in one step, out of the prefix cache
        final = min(final, first + max(1, self._limits.max_backlog_bytes // self._engine.layout.block_bytes))
        if final > first:
            payload = self._engine.store.read(sequence.blocks[first:final])
            transfer.link.push(transfer.ticket.transfer_id, transfer.generation, first, payload)
            transfer.pushed = final

    def _finish(self, transfer: Transfer) -> None:
        sequence = transfer.sequence
        transfer.phase, transfer.phase_deadline = Phase.SENT, time.monotonic() + self._limits.ack_timeout
        hashes = sequence.block_hashes(self._pool.block_size, self._fingerprint)
        transfer.link.finish(
            transfer.ticket.transfer_id, transfer.generation, len(sequence.token_ids), hashes, transfer.first_tokens
        )

    # ------------------------------------------------------------------ commands

    def submit(self, leg_id: int, leg: Leg, decode_address: str, sink: Sink) -> None:
        """Take a leg in. Runs on the worker's thread, as all of the following."""
        try:
            ticket = self._gate.admit(leg.ticket)
            now = time.monotonic()
            sequence = Sequence.from_leg(leg, now)
            check_tokens(sequence.token_ids, self._engine.vocab_size)
            self._check_room(sequence)
            link = self._link(ticket.decode_incarnation, decode_address)
        except TandemError as exc:
            sink(LegUpdate(error=exc))
            return
        transfer = Transfer(leg_id, sequence, ticket, leg.ticket, link, sink, now + leg.timeout)
        self._transfers[ticket.transfer_id] = self._by_leg[leg_id] = self._by_sequence[sequence] = transfer

    def cancel(self, leg_id: int) -> None:
        transfer = self._by_leg.get(leg_id)
        if transfer is not None:
            self._end(transfer, Cancelled("the router gave this leg up"))

    def _check_room(self, sequence: Sequence) -> None:
        needed = blocks_for(len(sequence.token_ids), self._pool.block_size)
        if needed > self._pool.num_blocks:
            raise TransferFailed(
                f"the prompt needs {needed} KV blocks and this prefill worker has {self._pool.num_blocks}; "
                "raise --kv-cache-memory-bytes"
            )

    def _link(self, incarnation: str, address: str) -> PushLink:
        link = self._links.get(incarnation)
        if link is None:
            link = self._connect(
                address,
                incarnation,
                lambda message: self.inbox.put(lambda: self._on_message(message)),
                lambda reason: self.inbox.put(lambda: self._on_lost(incarnation, reason)),
            )
            self._links[incarnation] = link
        return link

    # ------------------------------------------------------------------ what D answers

    def _on_message(self, message: Message) -> None:
        transfer = self._transfers.get(getattr(message, "transfer_id", b""))
        if transfer is None:
            return  # it ended here before the answer came; D has been told
        match message:
            case Grant():
                self._on_grant(transfer, message)
            case Refuse():
                self._on_refuse(transfer, message)
            case Ack() if transfer.phase is Phase.SENT and message.generation == transfer.generation:
                self._end(transfer, None)
            case Abort() if message.generation in (0, transfer.generation):
                self._end(transfer, TransferFailed(f"the decode worker aborted the hand-off: {message.reason}"))
            case _:
                log.warning("unexpected %s in phase %s", type(message).__name__, transfer.phase.value)

    def _on_grant(self, transfer: Transfer, grant: Grant) -> None:
        total = blocks_for(len(transfer.sequence.token_ids), self._pool.block_size)
        if transfer.phase is not Phase.ASKED or grant.first_block + grant.num_blocks != total:
            self._end(transfer, TransferFailed("the decode worker's grant does not fit the prompt"))
            return
        transfer.phase, transfer.generation = Phase.GRANTED, grant.generation
        transfer.pushed = grant.first_block

    def _on_refuse(self, transfer: Transfer, refuse: Refuse) -> None:
        if refuse.later and transfer.phase is Phase.ASKED:
            transfer.phase, transfer.retry_at = Phase.QUEUED, time.monotonic() + self._limits.retry_pause
        else:
            self._end(transfer, TransferFailed(f"the decode worker refused the hand-off: {refuse.reason}"))

    def _on_lost(self, incarnation: str, reason: str) -> None:
        link = self._links.pop(incarnation, None)
        for transfer in [t for t in self._transfers.values() if t.link is link]:
            self._end(transfer, TransferFailed(f"the link to decode worker {transfer.ticket.decode} broke: {reason}"))
        if link is not None:
            link.close()

    # ------------------------------------------------------------------ the end of a transfer

    def _expire(self) -> None:
        now = time.monotonic()
        for transfer in list(self._transfers.values()):
            waiting = transfer.phase in (Phase.ASKED, Phase.SENT)
            if now >= transfer.deadline:
                self._end(transfer, DeadlineExceeded("the request's deadline passed during prefill"))
            elif waiting and now >= transfer.phase_deadline:
                self._end(transfer, TransferFailed(f"no answer from decode worker {transfer.ticket.decode} in time"))

    def _end(self, transfer: Transfer, error: TandemError | None) -> None:
        """The one place where a pin is released: the blocks stay findable as prefix cache."""
        transfer_id = transfer.ticket.transfer_id
        del self._transfers[transfer_id], self._by_leg[transfer.leg_id], self._by_sequence[transfer.sequence]
        self._scheduler.stop(transfer.sequence)
        if error is None:
            transfer.sink(LegUpdate(stats=transfer.stats()))
            return
        transfer.link.forget(transfer_id)
        transfer.link.post(Abort(transfer_id, transfer.generation, error.message))
        transfer.sink(LegUpdate(error=error))

    # ------------------------------------------------------------------ for the shell

    @property
    def idle(self) -> bool:
        return not self._transfers

    def load(self) -> Load:
        waiting = [t for t in self._transfers.values() if t.phase in (Phase.QUEUED, Phase.ASKED, Phase.GRANTED)]
        tokens = sum(transfer.sequence.remaining for transfer in self._transfers.values())
        return self._pool.counts().load(len(self._transfers) - len(waiting), len(waiting), tokens)

    def close(self) -> None:
        for transfer in list(self._transfers.values()):
            self._end(transfer, TransferFailed("this prefill worker is shutting down"))
        for link in self._links.values():
            link.close()
        self._engine.close()


def first_tokens(result: Sampled) -> list[Token]:
    """The sampled tokens as the client will count them."""
    sequence = result.sequence
    index = sequence.output_len
    return [
        Token(choice, index, token_id, sequence.sampling.finish_reason(index + 1, token_id), logprobs)
        for choice, token_id, logprobs in zip(sequence.choices, result.token_ids, result.logprobs, strict=True)
    ]
