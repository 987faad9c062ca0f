"""Sends a workload to one server: as a closed loop, as an open one, or as streams that long prompts disturb."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from tandem.cluster.bench.answer import Answer
from tandem.cluster.bench.client import Client
from tandem.cluster.bench.dialogue import Dialogue
from tandem.cluster.bench.options import CONCURRENCY, BenchOptions, Workload
from tandem.cluster.bench.workload import Session, arrivals, long_prompts, sessions
from tandem.common.errors import ConfigError

TICK = 0.005  # seconds between looks at streams that start

_FOREVER = float("inf")


@dataclass(frozen=True, slots=True)
class Part:
    """What is reported together. `window`: the readings of the clock between which waits count."""

    answers: list[Answer]
    duration: float  # seconds
    window: tuple[float, float] = (-_FOREVER, _FOREVER)


class Load:
    def __init__(self, client: Client, options: BenchOptions, model: str) -> None:
        self._client = client
        self._options = options
        self._model = model

    async def run(self, seed: str) -> dict[str, Part]:
        """By the name of the part."""
        if self._options.workload is Workload.disturbed:
            return await self._disturbed(seed)
        began = time.perf_counter()
        todo = islice(sessions(self._options, seed), self._options.session_limit)
        until = began + (self._options.duration or _FOREVER)
        if self._options.request_rate is not None or self._options.follows_trace:
            answers = await self._open(todo, seed, until)
        else:
            answers = await self._closed(todo, self._options.concurrency or CONCURRENCY, until)
        return {"all": Part(answers, time.perf_counter() - began)}

    async def warm_up(self, seed: str) -> None:
        """Requests that do not count, with prompts of their own. Raises ConfigError when one fails."""
        todo = islice(sessions(self._options, f"{seed}/warmup"), self._options.warmup)
        for answer in await self._closed(todo, self._options.concurrency or CONCURRENCY, _FOREVER):
            if answer.failure is not None:
                raise ConfigError(f"the warm-up failed: {answer.failure.kind}: {answer.failure.message}")

    async def _closed(self, todo: Iterator[Session], clients: int, until: float) -> list[Answer]:
        answers: list[Answer] = []

        async def client() -> None:
            for session in todo:  # shared: each takes the next one
                if time.perf_counter() >= until:
                    return
                await self._converse(session, answers, until=until)

        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(client())
        return answers

    async def _open(self, todo: Iterator[Session], seed: str, until: float) -> list[Answer]:
        """Sessions start when they are due, whether or not earlier ones were answered; over --max-concurrency they wait
        here, in order, and the wait is reported, not counted as the server's."""
        answers: list[Answer] = []
        gate = asyncio.Semaphore(self._options.max_concurrency or 1 << 30)
        offsets = arrivals(self._options, seed) if self._options.request_rate is not None else None
        began = time.perf_counter()

        async def start(session: Session, due: float) -> None:
            async with gate:
                await self._converse(session, answers, due, until)

        async with asyncio.TaskGroup() as group:
            for session in todo:
                due = began + (next(offsets) if offsets else session.at or 0.0)
                if due >= until:
                    break
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                group.create_task(start(session, due))
        return answers

    async def _disturbed(self, seed: str) -> dict[str, Part]:
        alone, _ = await self._phase(f"{seed}/alone", disturb=False)
        disturbed, long = await self._phase(f"{seed}/disturbed", disturb=True)
        return {"alone": alone, "disturbed": disturbed, "long": long}

    async def _phase(self, seed: str, disturb: bool) -> tuple[Part, Part]:
        """Streams, and the long prompts beside them. Waits count from when all streams run (then the first long prompt
        is sent) until the first stream ends: neither their own prefill nor a half-empty batch is measured."""
        streams: list[Answer] = []
        long: list[Answer] = []
        began = time.perf_counter()
        first = islice(sessions(self._options, seed), self._options.streams)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._converse(session, streams)) for session in first]
            while sum(bool(answer.times) for answer in streams) < len(tasks) and not any(task.done() for task in tasks):
                await asyncio.sleep(TICK)
            since = time.perf_counter()
            for session in long_prompts(self._options, seed):
                if disturb:
                    group.create_task(self._converse(session, long))
                interval = self._options.long_interval if disturb else None
                if (await asyncio.wait(tasks, timeout=interval, return_when=asyncio.FIRST_COMPLETED))[0]:
                    break
        until = min((answer.times[-1] for answer in streams if answer.times), default=since)
        duration = time.perf_counter() - began
        return Part(streams, duration, (since, until)), Part(long, duration)

    async def _converse(
        self, session: Session, answers: list[Answer], due: float | None = None, until: float = _FOREVER
    ) -> None:
        """The turns one after the other, later ones as soon as the one before was answered, and none after `until`. A
        failed turn ends the session; those behind it count as failed too."""
        dialogue = Dialogue(self._options, self._model, len(session.turns))
        failed = False
        for number, turn in enumerate(session.turns):
            now = time.perf_counter()
            if number > 0 and now >= until:
                return
            answer = Answer(turn.output_len, keep=len(session.turns) > 1, due=due if due and not number else now)
            answers.append(answer)
            if failed:
                answer.fail("not sent", "an earlier turn of its conversation failed")
                continue
            await self._client.post(dialogue.path, dialogue.body(turn), answer)
            if answer.failure is None:
                dialogue.heard(answer)
            failed = answer.failure is not None
