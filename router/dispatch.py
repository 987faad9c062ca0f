"""The life of an admitted request: choose workers, mint a ticket, open both legs, follow them to one end.

    Dispatcher.run ── attempt 0 ──► Attempt: prefill leg ∥ decode leg ── all choices ended
                         │ retryable error                                   ▲
                         └─► attempt 1 … on other workers of the same model, from the tokens the client already has

The first token of each choice comes from the prefill leg, the others from the decode leg. A leg that fails cancels
the other; leaving `run`, for whatever reason, cancels both before it returns.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from tandem.common.block_hash import block_hashes, chain_root
from tandem.common.errors import (
    ConfigError,
    DeadlineExceeded,
    InternalError,
    Overloaded,
    TandemError,
    TransferFailed,
    WorkerFailed,
)
from tandem.common.failpoints import failpoint
from tandem.common.handoff import Ticket, new_transfer_id
from tandem.common.request import Leg, LegUpdate
from tandem.common.worker_config import Role
from tandem.router.generation import Generation, Sink
from tandem.router.membership import Membership, Worker
from tandem.router.metrics import RouterMetrics
from tandem.router.policy import choose
from tandem.router.retry_budget import RetryBudget
from tandem.router.settings import RouterSettings
from tandem.router.work import Work

log = logging.getLogger("tandem.router")

LINGER = 1.0  # seconds that workers get to end their legs, and tell their stats, behind the last token
BACKOFF = 0.1  # seconds before the second attempt; doubles


@dataclass(frozen=True, slots=True)
class Pair:
    prefill: Worker | None  # None: the decode worker prefills the prompt itself
    decode: Worker


class Dispatcher:
    def __init__(self, settings: RouterSettings, membership: Membership, metrics: RouterMetrics) -> None:
        self._settings = settings
        self._membership = membership
        self._metrics = metrics
        self._budget = RetryBudget()

    async def run(self, work: Work, sink: Sink) -> int:
        """Every choice of `work` to its end; how many tokens of its prompt were found in a prefix cache.

        Raises TandemError: the request's one end otherwise.
        """
        generation = Generation(work, sink)
        self._budget.request()
        try:
            async with asyncio.timeout(work.deadline - time.monotonic()):
                await self._serve(generation, tuple(range(work.choices)), 0)
        except (WorkerFailed, TransferFailed, ConfigError) as exc:
            # What workers say may name addresses and processes: that is for the log, not for clients.
            log.warning("request %s failed: %s", work.id, exc)
            raise type(exc)("a worker failed while it served this request, and so did the retries; try again") from exc
        except TimeoutError as exc:
            raise DeadlineExceeded("the request missed its deadline; ask for less, or raise --request-timeout") from exc
        return min(generation.cached_tokens, len(work.prompt_ids))

    async def _serve(self, generation: Generation, choices: tuple[int, ...], attempt: int) -> None:
        """One attempt, and the next ones if it fails; choices that already have tokens go on separately."""
        last = attempt + 1 >= self._settings.migration_limit
        pair = await self._choose(generation, choices, last)
        try:
            await Attempt(generation, pair, self._leg(generation, choices, attempt, pair)).run()
            return
        except TandemError as exc:
            if not exc.retryable or last:
                raise
            failure = exc
        await asyncio.sleep(BACKOFF * 2**attempt)
        if self._full(pair, failure) and not self._budget.retry():
            raise failure
        log.warning("request %s, attempt %d failed, trying again: %s", generation.work.id, attempt, failure)
        failpoint("router.retry")
        self._metrics.retries.inc()
        groups = generation.groups(choices)
        await together(*(self._serve(generation, group, attempt + 1) for group in groups))

    def _full(self, pair: Pair, failure: TandemError) -> bool:
        """Whether the attempt was refused for want of room; one that drains, or is gone by now, refused for that."""
        members = self._membership.all_workers()
        workers = [worker for worker in (pair.prefill, pair.decode) if worker is not None]
        return isinstance(failure, Overloaded) and all(w.state == "ready" and w in members for w in workers)

    async def _choose(self, generation: Generation, choices: tuple[int, ...], last: bool) -> Pair:
        """The last attempt behind a failed hand-off does without one: the decode worker prefills the prompt itself.

        Raises Overloaded when no decode worker turns up in time.
        """
        settings, members = self._settings, self._membership
        wait = settings.recovery_wait if generation.avoid else settings.worker_wait
        if not await members.wait_for(lambda: members.can_serve(generation.identity), wait):
            raise Overloaded("no decode worker is available; try again later", retry_after=settings.worker_wait)
        cached = self._cached(generation, choices)
        decode = self._pick("decode", generation, cached)
        alone = last and generation.transfer_failed
        prefill = None if alone else self._pick("prefill", generation, cached)
        if decode is None:
            raise InternalError("a decode worker was there and is not")
        if prefill is None and settings.prefill_expected:
            self._metrics.degraded_prefills.inc()
        return Pair(prefill, decode)

    def _pick(self, role: Role, generation: Generation, cached: dict[str, int]) -> Worker | None:
        members = self._membership.workers(role, generation.identity)
        workers = {worker.incarnation: worker for worker in members}
        chosen = choose(
            [
                worker.candidate(cached.get(incarnation, 0), incarnation in generation.avoid)
                for incarnation, worker in workers.items()
            ]
        )
        return workers[chosen.incarnation] if chosen else None

    def _cached(self, generation: Generation, choices: tuple[int, ...]) -> dict[str, int]:
        """incarnation → leading tokens of what the next leg needs that are in its cache."""
        token_ids, salt = generation.token_ids(choices), generation.work.cache_salt
        about = (worker.description for worker in self._membership.workers(identity=generation.identity))
        cached: dict[str, int] = {}
        for size, fingerprint in {(each.block_size, each.fingerprint) for each in about}:
            held = self._membership.index.match(block_hashes(token_ids, size, chain_root(salt, fingerprint)))
            cached |= {incarnation: size * blocks for incarnation, blocks in held.items()}
        return cached

    def _leg(self, generation: Generation, choices: tuple[int, ...], attempt: int, pair: Pair) -> Leg:
        ticket = b"" if pair.prefill is None else self._mint(generation, attempt, pair.prefill, pair.decode)
        return generation.leg(choices, attempt, generation.work.deadline - time.monotonic(), ticket)

    def _mint(self, generation: Generation, attempt: int, prefill: Worker, decode: Worker) -> bytes:
        ticket = Ticket(
            request_id=generation.work.id,
            attempt=attempt,
            transfer_id=new_transfer_id(),
            prefill=prefill.name,
            prefill_incarnation=prefill.incarnation,
            decode=decode.name,
            decode_incarnation=decode.incarnation,
            pairing=decode.description.pairing,
            timeout=generation.work.deadline - time.monotonic(),
        )
        failpoint("router.minted")
        return ticket.seal(self._settings.cluster_key)


class Attempt:
    """One leg on one pair of workers.

        prefill leg   ── first tokens ──┐           ── stats
        decode leg    ···· waits ·······└► tokens ──── stats

    D may be faster to send token 2 than P to send token 1, hence the wait.
    """

    def __init__(self, generation: Generation, pair: Pair, leg: Leg) -> None:
        self._generation = generation
        self._pair = pair
        self._leg = leg
        self._started = asyncio.Event()  # the prefill leg has sent the first token of every choice
        self._without_first = set(leg.choices)
        self._handed_off = False  # the decode worker sent a token: it needs P no longer
        self._limit = asyncio.timeout(None)
        self._prefill_load = ExitStack()  # until the prefill leg's end

    async def run(self) -> None:
        """Until all choices ended. Raises TandemError."""
        prefill, decode = self._pair.prefill, self._pair.decode
        legs = [self._decode(decode)]
        # Counted before the first await, so that the next request of a burst already sees it.
        with self._prefill_load, decode.running(len(self._leg.choices)):
            if prefill is None:
                self._started.set()
            else:
                self._prefill_load.enter_context(prefill.running(1))
                legs.append(self._prefill(prefill, decode))
            try:
                async with self._limit:
                    await together(*legs)
            except TimeoutError:
                assert self._ended, "only the end of all choices sets the limit"

    @property
    def _ended(self) -> bool:
        return not self._generation.unfinished(self._leg.choices)

    async def _prefill(self, worker: Worker, decode: Worker) -> None:
        try:
            await worker.client.prefill(self._leg, decode.client.address, self._take_first)
            if not self._started.is_set():
                raise WorkerFailed(f"{worker.name} ended its leg without the first token")
        except TandemError as exc:
            self._failed(worker, exc, needed=not self._handed_off)
        finally:
            self._prefill_load.close()

    async def _decode(self, worker: Worker) -> None:
        try:
            await worker.client.decode(self._leg, self._take)
            await self._started.wait()
            if not self._ended:
                raise WorkerFailed(f"{worker.name} ended its leg before the last token")
        except TandemError as exc:
            self._failed(worker, exc, needed=True)

    def _failed(self, worker: Worker, exc: TandemError, needed: bool) -> None:
        """Raises `exc`, unless the leg had nothing to add any more."""
        if self._ended or not needed:
            log.debug("a leg of request %s on %s ended late: %s", self._leg.request_id, worker.name, exc)
            return
        self._blame(worker, exc)
        raise exc

    async def _take_first(self, update: LegUpdate) -> None:
        await self._deliver(update)
        self._without_first -= {token.choice for token in update.tokens}
        if not self._without_first:
            self._started.set()

    async def _take(self, update: LegUpdate) -> None:
        if update.tokens:
            await self._started.wait()
            self._handed_off = True
        await self._deliver(update)

    async def _deliver(self, update: LegUpdate) -> None:
        generation = self._generation
        if update.stats is not None and not generation.cached_tokens:
            generation.cached_tokens = update.stats.cached_tokens
        if update.tokens:
            generation.identity = self._pair.decode.identity
        generation.take(self._leg.choices, update.tokens)
        if not self._ended:
            await generation.room()
        elif self._limit.when() is None:
            linger = 0.0 if generation.cut(self._leg.choices) else LINGER
            self._limit.reschedule(asyncio.get_running_loop().time() + linger)

    def _blame(self, worker: Worker, exc: TandemError) -> None:
        """The next attempt goes elsewhere if it can. Of a failed transfer nobody knows whose fault it was."""
        if exc.retryable:
            self._generation.transfer_failed |= isinstance(exc, TransferFailed)
            blamed = (worker, self._pair.prefill, self._pair.decode) if isinstance(exc, TransferFailed) else (worker,)
            self._generation.avoid.update(worker.incarnation for worker in blamed if worker is not None)


async def together(*parts: Coroutine[Any, Any, None]) -> None:
    """Run all; the first to fail cancels the others, and its error is raised as itself.

    Not a TaskGroup: before Python 3.13, one that failed leaves its task's count of cancellations too high, so that a
    deadline around it cancels the task instead of raising TimeoutError, and it hides a cancellation that comes then.
    """
    tasks = [asyncio.create_task(part) for part in parts]
    try:
        if tasks:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
    errors = [end for end in ends if isinstance(end, Exception)]
    if errors:
        raise _gravest(errors)
    if any(task.cancelled() for task in tasks):
        raise InternalError("a part of a request was cancelled by nobody")


def _gravest(errors: list[Exception]) -> Exception:
    """Errors of ours before what cannot be tried again before the rest: a bug must not hide behind a dead worker."""
    bugs = [error for error in errors if not isinstance(error, TandemError)]
    final = [error for error in errors if isinstance(error, TandemError) and not error.retryable]
    return (bugs or final or errors)[0]
