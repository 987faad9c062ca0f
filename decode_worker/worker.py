"""The decode worker: takes in verified KV from prefill workers and runs every sequence in one continuous batch.

No Ray, gRPC or asyncio here: `service.py` feeds the inbox, links deliver messages and frames into it, `step` does
the rest. Legs without a ticket are prefilled here, chunk by chunk, by the same loop.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from tandem.common.backlog import Backlog
from tandem.common.errors import Cancelled, DeadlineExceeded, InternalError, InvalidRequest, TandemError, WorkerFailed
from tandem.common.failpoints import failpoint
from tandem.common.handoff import TicketGate
from tandem.common.request import Leg, LegStats, LegUpdate, Token
from tandem.common.worker_info import Load
from tandem.common.worker_loop import Inbox, Sink
from tandem.decode_worker.handoff import Handoffs
from tandem.decode_worker.limits import DecodeLimits
from tandem.decode_worker.pace import Pace
from tandem.decode_worker.reservation import Reservation
from tandem.decode_worker.scheduler import DecodeScheduler
from tandem.engine.allocation import blocks_for, publish
from tandem.engine.batch import Sampled
from tandem.engine.block_pool import BlockPool
from tandem.engine.engine import Engine
from tandem.engine.isolation import Bulkhead
from tandem.engine.sequence import Sequence, check_tokens


@dataclass(eq=False, slots=True)
class RunningLeg:
    """A leg whose sequences run here, and what it has to tell."""

    leg_id: int
    sink: Sink
    deadline: float  # monotonic seconds
    arrival: float  # monotonic
    sequences: list[Sequence] = field(default_factory=list[Sequence])
    tokens: list[Token] = field(default_factory=list[Token])  # of the present step
    started: float = 0.0  # monotonic; first step
    first_token: float = 0.0  # monotonic
    cached: int = 0  # tokens

    def stats(self) -> LegStats:
        return LegStats(self.started - self.arrival, self.first_token - self.started, cached_tokens=self.cached)


class DecodeWorker:
    def __init__(self, engine: Engine, pool: BlockPool, gate: TicketGate, limits: DecodeLimits) -> None:
        self.inbox = Inbox()
        self._engine, self._pool = engine, pool
        self.scheduler = DecodeScheduler(
            pool, engine.layout.fingerprint, limits.max_num_batched_tokens, limits.max_num_seqs
        )
        self.handoffs = Handoffs(self, pool, engine.store, gate, limits)
        self._legs: dict[int, RunningLeg] = {}
        self._by_sequence: dict[Sequence, RunningLeg] = {}
        self._bulkhead = Bulkhead()
        self._pace = Pace(engine.prompts_elsewhere)
        self._backlog = Backlog(limits.max_num_queued_reqs, limits.max_num_queued_tokens)

    # ------------------------------------------------------------------ the loop

    def step(self) -> bool:
        """One token of every decoding sequence, and prompt chunks in what remains of the token budget."""
        self._expire()
        self.handoffs.tick()
        if rest := self._pace.rest(time.monotonic()):
            self.inbox.run_pending(rest)
            return True
        scheduled = self.scheduler.schedule()
        if not scheduled:
            return False
        began = time.monotonic()
        self._mark_started([item.sequence for item in scheduled])
        results = self._bulkhead.run(self._engine.forward, scheduled)
        self._pace.stepped(began, time.monotonic())
        failpoint("decode.stepped")
        failed = {result.sequence for result in results if result.error}
        self.scheduler.advance([item for item in scheduled if item.sequence not in failed])
        self._publish(results)
        failpoint("decode.published")
        return True

    def prepare(self) -> bool:
        return self._engine.prepare()

    def _publish(self, results: list[Sampled]) -> None:
        """Append the new tokens, tell the clients, end what is finished or failed."""
        touched: dict[int, RunningLeg] = {}
        for result in results:
            leg = self._by_sequence.get(result.sequence)
            if leg is None:
                continue  # a sibling's error ended the leg in this very step
            if result.error:
                self._fail(leg, result.error)
                touched.pop(leg.leg_id, None)
                continue
            touched[leg.leg_id] = leg
            for sequence, token_id, logprobs in zip(
                self._fork(leg, result.sequence), result.token_ids, result.logprobs, strict=True
            ):
                self._append(leg, sequence, token_id)
                reason = sequence.finish_reason()
                index = sequence.output_len - 1
                leg.tokens.append(Token(sequence.choices[0], index, token_id, reason, logprobs))
        for leg in touched.values():
            self._flush(leg)

    def _fail(self, leg: RunningLeg, error: str) -> None:
        """Nobody may find this leg's KV any more, and whoever gets its blocks next must not: a NaN would live on."""
        blocks = {block for sequence in leg.sequences for block in sequence.blocks}
        self._pool.forget(blocks)
        self.end(leg.leg_id, InternalError(error))
        self._engine.store.zero(self._pool.free_among(blocks))  # what others share stays theirs

    def _append(self, leg: RunningLeg, sequence: Sequence, token_id: int) -> None:
        sequence.token_ids.append(token_id)
        leg.first_token = leg.first_token or time.monotonic()
        if sequence.finish_reason():
            self._drop(leg, sequence)

    def _flush(self, leg: RunningLeg) -> None:
        tokens, leg.tokens = tuple(leg.tokens), []
        if leg.sequences:
            leg.sink(LegUpdate(tokens))
        else:
            del self._legs[leg.leg_id]
            leg.sink(LegUpdate(tokens, leg.stats()))

    def _drop(self, leg: RunningLeg, sequence: Sequence) -> None:
        """The one place where a running sequence's blocks are released."""
        self.scheduler.remove(sequence)
        leg.sequences.remove(sequence)
        del self._by_sequence[sequence]

    def _fork(self, leg: RunningLeg, sequence: Sequence) -> list[Sequence]:
        """One sequence per choice, behind a common prompt that was just computed or just landed.

        parent  [ full ][ full ][ part ]        full blocks are shared by reference,
        fork    [ full ][ full ][ copy ]        the partly filled one is copied before it is written to
        """
        choices, sequence.choices = sequence.choices, sequence.choices[:1]
        forks = [sequence]
        for choice in choices[1:]:
            fork = sequence.fork(choice)
            self._register(leg, fork)
            self._share_blocks(sequence, fork)
            forks.append(fork)
        return forks

    def _share_blocks(self, parent: Sequence, fork: Sequence) -> None:
        full = parent.computed // self._pool.block_size
        tail = self._pool.allocate(len(parent.blocks) - full)
        if tail is None:  # no room for the copy: this choice recomputes the prompt when there is
            fork.blocks, fork.computed = [], 0
            self.scheduler.add(fork)
            return
        self._pool.take(parent.blocks[:full])
        for source, target in zip(parent.blocks[full:], tail, strict=True):
            self._engine.store.copy(source, target)
        fork.blocks = parent.blocks[:full] + tail
        self.scheduler.join(fork)

    # ------------------------------------------------------------------ commands

    def submit(self, leg_id: int, leg: Leg, sink: Sink) -> None:
        """Take a leg in: with a ticket its KV will land, without one it is prefilled here."""
        sequence = Sequence.from_leg(leg, time.monotonic())
        try:
            check_tokens(sequence.token_ids, self._engine.vocab_size)
            self._check_room(sequence)
            self._check_queue(sequence)
            if leg.ticket:
                self.handoffs.expect(leg_id, leg, sequence, sink)
                return
        except TandemError as exc:
            sink(LegUpdate(error=exc))
            return
        self._start_leg(leg_id, sequence, sink, sequence.arrival + leg.timeout)
        self.scheduler.add(sequence)

    def cancel(self, leg_id: int) -> None:
        error = Cancelled("the router gave this leg up")
        self.handoffs.cancel(leg_id, error)
        self.end(leg_id, error)

    def _start_leg(self, leg_id: int, sequence: Sequence, sink: Sink, deadline: float) -> RunningLeg:
        leg = self._legs[leg_id] = RunningLeg(leg_id, sink, deadline, sequence.arrival)
        self._register(leg, sequence)
        return leg

    def end(self, leg_id: int, error: TandemError) -> None:
        leg = self._legs.pop(leg_id, None)
        if leg is None:
            return
        for sequence in list(leg.sequences):
            self._drop(leg, sequence)
        leg.sink(LegUpdate(tuple(leg.tokens), error=error))

    def _register(self, leg: RunningLeg, sequence: Sequence) -> None:
        leg.sequences.append(sequence)
        self._by_sequence[sequence] = leg

    def _check_room(self, sequence: Sequence) -> None:
        length = sequence.prompt_len + sequence.sampling.max_tokens
        if blocks_for(length, self._pool.block_size) > self._pool.num_blocks:
            raise InvalidRequest(
                f"{length} tokens never fit this decode worker's {self._pool.num_blocks} KV blocks; "
                "ask for fewer tokens or raise --kv-cache-memory-bytes"
            )

    def _check_queue(self, sequence: Sequence) -> None:
        """What waits here for its first step is bounded; each leg of it has a deadline. Raises Overloaded."""
        waiting = self.scheduler.waiting
        tokens = sum(other.remaining for other in waiting) + self.handoffs.queued_tokens
        self._backlog.check(len(waiting) + self.handoffs.count, tokens, sequence.remaining)

    def _mark_started(self, sequences: list[Sequence]) -> None:
        now = time.monotonic()
        for sequence in sequences:
            leg = self._by_sequence[sequence]
            if not leg.started:
                leg.started = now
                leg.cached = leg.cached or sequence.computed
                self._backlog.left()

    def _expire(self) -> None:
        now = time.monotonic()
        for leg in [leg for leg in self._legs.values() if now >= leg.deadline]:
            self.end(leg.leg_id, DeadlineExceeded("the request's deadline passed while it was decoding"))

    # ------------------------------------------------------------------ for the hand-offs (RunningBatch)

    def run_landed(self, reservation: Reservation, first_tokens: tuple[int, ...]) -> None:
        """The prompt's KV is verified and owned: each choice goes on behind its first token, which P delivered."""
        sequence = reservation.sequence
        leg = self._start_leg(reservation.leg_id, sequence, reservation.sink, reservation.deadline)
        leg.started, leg.cached = time.monotonic(), sequence.cached
        self._backlog.left()
        publish(self._pool, sequence, self._engine.layout.fingerprint)
        self.scheduler.join(sequence)
        for fork, token_id in zip(self._fork(leg, sequence), first_tokens, strict=True):
            self._append(leg, fork, token_id)
        if not leg.sequences:
            self._flush(leg)  # every choice was over with its first token

    @property
    def vocab_size(self) -> int:
        return self._engine.vocab_size

    def room_for(self, num_blocks: int, landing: int) -> bool:
        return self.scheduler.room_for(num_blocks, landing)

    # ------------------------------------------------------------------ for the shell

    @property
    def idle(self) -> bool:
        return not self._legs and self.handoffs.idle

    def load(self) -> Load:
        waiting = self.scheduler.waiting
        tokens = sum(s.remaining for s in waiting) + sum(s.remaining for s in self.scheduler.running if s.remaining > 1)
        return self._pool.counts().load(len(self.scheduler.running), len(waiting) + self.handoffs.count, tokens)

    def close(self) -> None:
        error = WorkerFailed("this decode worker is shutting down")
        self.handoffs.close(error)
        for leg_id in list(self._legs):
            self.end(leg_id, error)
        self._engine.close()
