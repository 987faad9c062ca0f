"""The prefill worker: computes prompts in chunks and pushes their KV blocks to decode workers that granted room.

No Ray, gRPC or asyncio here: `service.py` feeds the inbox, links deliver messages into it, `step` does the rest.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from tandem.common.backlog import Backlog
from tandem.common.errors import Cancelled, DeadlineExceeded, InternalError, TandemError, TransferFailed, WorkerFailed
from tandem.common.failpoints import failpoint
from tandem.common.handoff import Abort, Ack, Grant, Message, Refuse, Released, Reserve, TicketGate
from tandem.common.kv_layout import MAX_BLOCK_SIZE
from tandem.common.request import Leg, LegUpdate, Token
from tandem.common.worker_info import Load
from tandem.common.worker_loop import Inbox, Sink
from tandem.engine.allocation import blocks_for
from tandem.engine.batch import Sampled, Scheduled
from tandem.engine.block_pool import BlockPool
from tandem.engine.engine import Engine
from tandem.engine.isolation import Bulkhead
from tandem.engine.sequence import Sequence, check_tokens
from tandem.kv_transfer.push import PushLink
from tandem.prefill_worker.outgoing import Outgoing, Source
from tandem.prefill_worker.scheduler import PrefillScheduler
from tandem.prefill_worker.transfer import Phase, Transfer

log = logging.getLogger("tandem.prefill")

_WAITING = (Phase.QUEUED, Phase.ASKED, Phase.GRANTED)
_UNFINISHED = (*_WAITING, Phase.COMPUTING)
CLOSE_TIMEOUT = 5.0  # seconds for a link's thread to let go of what it sends

Connect = Callable[[str, str, Callable[[Message], None], Callable[[str], None]], PushLink]
"""(address, incarnation of D, on_message, on_lost) → a link that opens itself on its own thread."""


@dataclass(frozen=True, slots=True)
class PrefillLimits:
    max_num_batched_tokens: int = 512
    max_num_seqs: int = 64
    max_num_queued_reqs: int = 1024  # legs that wait here for their first chunk
    max_num_queued_tokens: int = 1 << 20  # of those legs
    reserve_ahead: int = 4  # steps whose tokens may hold or await a grant
    grant_timeout: float = 10.0  # seconds D may take to answer a Reserve
    ack_timeout: float = 10.0  # seconds D may take to answer a Manifest that has left
    retry_pause: float = 0.05  # seconds before D is asked again after Refuse(later)
    max_backlog_bytes: int = 256 << 20  # payload copied out of the cache and not yet sent, per link
    pipelined_from: int = 256  # tokens; shorter prompts are sent in one piece (docs/benchmarks.md has the threshold)
    layer_groups: int = 4  # parts in which a chunk's layers leave while later ones are computed


class PrefillWorker:
    def __init__(
        self, engine: Engine, pool: BlockPool, gate: TicketGate, connect: Connect, limits: PrefillLimits
    ) -> None:
        self.inbox = Inbox()
        self._engine, self._pool, self._gate, self._connect, self._limits = engine, pool, gate, connect, limits
        self._scheduler = PrefillScheduler(
            pool, engine.layout.fingerprint, limits.max_num_batched_tokens, limits.max_num_seqs
        )
        self._transfers: dict[bytes, Transfer] = {}  # by transfer id, in order of arrival
        self._by_leg: dict[int, Transfer] = {}
        self._by_sequence: dict[Sequence, Transfer] = {}
        self._leaving: set[Transfer] = set()  # over, but something of theirs is still in flight
        self._links: dict[str, PushLink] = {}  # by D's incarnation
        self._lost: dict[str, PushLink] = {}  # likewise; ended links whose thread may not have
        self._source = Source(engine.store, limits.max_backlog_bytes, limits.pipelined_from)
        self._bulkhead = Bulkhead()
        self._backlog = Backlog(limits.max_num_queued_reqs, limits.max_num_queued_tokens)

    # ------------------------------------------------------------------ the loop

    def step(self) -> bool:
        """One chunk of as many prompts as fit the token budget."""
        self._expire()
        self._ask()
        self._start()
        scheduled = self._scheduler.schedule()
        if scheduled:
            results = self._bulkhead.run(self._forward, scheduled)
            failed = {result.sequence for result in results if result.error}
            self._scheduler.advance([item for item in scheduled if item.sequence not in failed])
            failpoint("prefill.computed")
            for result in results:
                self._first_tokens(result)
        self._push()
        self._engine.post_prompts(sum(t.phase in _UNFINISHED for t in self._transfers.values()))
        return bool(scheduled)

    def prepare(self) -> bool:
        return self._engine.prepare()

    def _forward(self, scheduled: list[Scheduled]) -> list[Sampled]:
        """KV leaves by groups of layers while the later layers of the same step are computed."""
        items = [(item, out) for item in scheduled if (out := self._by_sequence[item.sequence].outgoing)]
        pipelined = [(item, out) for item, out in items if out.by_layers]
        if not pipelined:
            return self._engine.forward(scheduled)

        def on_layers(first: int, count: int) -> None:
            for item, outgoing in pipelined:
                outgoing.push_layers(item.sequence.computed + item.num_tokens, first, count)

        group = -(-self._engine.layout.layers // self._limits.layer_groups)
        return self._engine.forward(scheduled, on_layers, group)

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
                transfer.link.reserve(Reserve(transfer.id, transfer.sealed, len(transfer.sequence.token_ids)))
                failpoint("prefill.asked")
            if transfer.phase is Phase.ASKED:
                asked[transfer.link] += transfer.sequence.remaining

    def _start(self) -> None:
        for transfer in self._transfers.values():
            if transfer.phase is Phase.GRANTED:
                if not self._scheduler.start(transfer.sequence):
                    return
                assert transfer.grant is not None, "granted without a grant"
                transfer.outgoing = Outgoing(self._source, transfer.sequence, transfer.grant, transfer.link)
                transfer.phase, transfer.started = Phase.COMPUTING, time.monotonic()
                transfer.sequence.cached = transfer.sequence.computed
                self._backlog.left()

    def _first_tokens(self, result: Sampled) -> None:
        """Token 1 reaches the client at once; the blocks follow to D."""
        transfer = self._by_sequence[result.sequence]
        if result.error:
            transfer.poisoned = True
            self._pool.forget(transfer.sequence.blocks)  # nobody may find this KV any more …
            self._end(transfer, InternalError(result.error))
            return
        transfer.sampled, transfer.first_tokens = time.monotonic(), result.token_ids
        failpoint("prefill.sampled")
        transfer.sink(LegUpdate(tokens=tuple(first_tokens(result))))

    def _push(self) -> None:
        """Send every finished block D misses; behind the last one, the manifest."""
        for transfer in list(self._transfers.values()):
            if transfer.phase is Phase.COMPUTING and transfer.outgoing is not None:
                transfer.outgoing.push()
                if transfer.first_tokens and transfer.outgoing.complete:
                    self._finish(transfer, transfer.outgoing)

    def _finish(self, transfer: Transfer, outgoing: Outgoing) -> None:
        transfer.phase, transfer.phase_deadline = Phase.SENT, math.inf  # what is queued before it takes its time
        if failpoint("prefill.finished"):
            self._await_ack(transfer)
        else:
            manifest = outgoing.manifest(transfer.first_tokens)
            transfer.link.finish(manifest, lambda: self.inbox.put(lambda: self._await_ack(transfer)))

    def _await_ack(self, transfer: Transfer) -> None:
        """The manifest has left, so D's answer is due."""
        transfer.phase_deadline = time.monotonic() + self._limits.ack_timeout

    # ------------------------------------------------------------------ commands

    def submit(self, leg_id: int, leg: Leg, decode_address: str, sink: Sink) -> None:
        """Take a leg in. Runs on the worker's thread, as all of the following."""
        try:
            ticket = self._gate.admit(leg.ticket)
            now = time.monotonic()
            sequence = Sequence.from_leg(leg, now)
            check_tokens(sequence.token_ids, self._engine.vocab_size)
            self._check_room(sequence)
            self._check_queue(sequence)
            link = self._link(ticket.decode_incarnation, decode_address)
        except TandemError as exc:
            sink(LegUpdate(error=exc))
            return
        transfer = Transfer(leg_id, sequence, ticket, leg.ticket, link, sink, now + leg.timeout)
        self._transfers[transfer.id] = self._by_leg[leg_id] = self._by_sequence[sequence] = transfer
        failpoint("prefill.submitted")

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

    def _check_queue(self, sequence: Sequence) -> None:
        """What waits here for its first chunk is bounded; each leg of it has a deadline. Raises Overloaded."""
        waiting = [t.sequence.remaining for t in self._transfers.values() if t.phase in _WAITING]
        self._backlog.check(len(waiting), sum(waiting), sequence.remaining)

    def _link(self, incarnation: str, address: str) -> PushLink:
        """D takes a new link as word that nothing of the former one is in flight (rule H3). Raises TransferFailed."""
        lost = self._lost.pop(incarnation, None)
        if lost is not None and not lost.join(0.0):
            self._lost[incarnation] = lost
            raise TransferFailed("the broken link to the decode worker still ends; use another pair, or try again")
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
                failpoint("prefill.acked")
                self._end(transfer, None)
            case Abort() if message.generation in (0, transfer.generation):
                self._end(transfer, TransferFailed(f"the decode worker aborted the hand-off: {message.reason}"))
            case _:
                log.warning("unexpected %s in phase %s", type(message).__name__, transfer.phase.value)

    def _on_grant(self, transfer: Transfer, grant: Grant) -> None:
        if transfer.phase is not Phase.ASKED or not _fits(grant, len(transfer.sequence.token_ids)):
            self._end(transfer, TransferFailed("the decode worker's grant does not fit the prompt"))
            return
        transfer.phase, transfer.grant = Phase.GRANTED, grant
        failpoint("prefill.granted")

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
            self._lost = {key: lost for key, lost in self._lost.items() if not lost.join(0.0)}
            self._lost[incarnation] = link
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
        """The one end of a transfer. Its blocks are released when nothing of it is in flight, by this thread: the link
        tells from its own."""
        del self._transfers[transfer.id], self._by_leg[transfer.leg_id], self._by_sequence[transfer.sequence]
        self._scheduler.leave(transfer.sequence)
        transfer.phase = Phase.LEAVING
        self._leaving.add(transfer)
        if error is None:
            transfer.link.forget(transfer.id, lambda: self.inbox.put(lambda: self._release(transfer)))
            transfer.sink(LegUpdate(stats=transfer.stats()))
            return
        transfer.link.post(Abort(transfer.id, transfer.generation, error.message))
        failpoint("prefill.aborted")
        transfer.link.forget(transfer.id, lambda: self.inbox.put(lambda: self._revoke(transfer)))
        transfer.sink(LegUpdate(error=error))

    def _revoke(self, transfer: Transfer) -> None:
        """Nothing of it is in flight: D may use its blocks for something else, and so may we."""
        self._release(transfer)
        transfer.link.post(Released(transfer.id, transfer.generation))

    def _release(self, transfer: Transfer) -> None:
        """The one place where a pin is released: the blocks stay findable as prefix cache."""
        self._leaving.discard(transfer)
        blocks, transfer.sequence.blocks = transfer.sequence.blocks, []
        self._pool.release(blocks)
        if transfer.poisoned:  # … and a NaN must not live on in whoever gets these blocks next
            self._engine.store.zero(self._pool.free_among(blocks))

    # ------------------------------------------------------------------ for the shell

    @property
    def idle(self) -> bool:
        return not self._transfers and not self._leaving

    def quiet(self, incarnation: str) -> bool:
        """Whether nothing is in flight to that decode worker, and no link could send anything."""
        lost = self._lost.get(incarnation)
        return incarnation not in self._links and (lost is None or lost.join(0.0))

    def load(self) -> Load:
        waiting = [t for t in self._transfers.values() if t.phase in _WAITING]
        tokens = sum(transfer.sequence.remaining for transfer in self._transfers.values())
        return self._pool.counts().load(len(self._transfers) - len(waiting), len(waiting), tokens)

    def close(self) -> None:
        for transfer in list(self._transfers.values()):
            self._end(transfer, WorkerFailed("this prefill worker is shutting down"))
        for link in (*self._links.values(), *self._lost.values()):
            link.close()
            link.join(CLOSE_TIMEOUT)
        self.inbox.run_pending()
        self._engine.close()


def _fits(grant: Grant, num_tokens: int) -> bool:
    """Whether a grant ends where the prompt does, in D's own block size."""
    if not 0 < grant.block_size <= MAX_BLOCK_SIZE or len(grant.targets) not in (0, grant.num_blocks):
        return False
    return grant.first_block + grant.num_blocks == blocks_for(num_tokens, grant.block_size)


def first_tokens(result: Sampled) -> list[Token]:
    """The sampled tokens as the client will count them."""
    sequence = result.sequence
    index = sequence.output_len
    return [
        Token(choice, index, token_id, sequence.sampling.finish_reason(index + 1, token_id), logprobs)
        for choice, token_id, logprobs in zip(sequence.choices, result.token_ids, result.logprobs, strict=True)
    ]
