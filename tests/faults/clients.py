"""Clients in a closed loop, each comparing what it is told with what the same request got without faults.

prompts ──recorded once, without faults──► expected answers ◄──compared── Crowd: N clients, until told to stop
"""

from __future__ import annotations

import asyncio
import json
import random
import ssl
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Container
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

VOCAB = 512
HUNG = 45.0  # seconds after which a request counts as hung; the router's --request-timeout is below
LEAVE = 0.5  # seconds after which, at the latest, a client that leaves has left
MANY = httpx.Limits(max_connections=None)
PLAIN = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # no certificates: loading them takes each client 50 ms
PATIENT = httpx.Timeout(2 * HUNG)  # the one deadline is `ask`'s

Json = dict[str, Any]
End = Literal["done", "error", "left", "lost", "hung"]
"""A whole answer; one error, as a status or an event; the client left; the connection broke; nothing came."""


@dataclass(slots=True)
class Choice:
    token_ids: list[int] = field(default_factory=list[int])
    text: str = ""
    finish_reasons: list[str] = field(default_factory=list[str])


@dataclass(slots=True)
class Answer:
    request: int  # index of the request's body
    end: End = "hung"
    choices: dict[int, Choice] = field(default_factory=dict[int, Choice])
    problems: list[str] = field(default_factory=list[str])  # breaches of the stream's form
    detail: str = ""
    retry_after: float | None = None  # seconds, of a refusal
    events: int = 0
    gap: float = 0.0  # seconds, the longest between two events
    seconds: float = 0.0  # from the request to its end
    _last: float = 0.0  # when the last event came

    def take(self, event: Json) -> None:
        if "error" in event:
            self.end, self.detail = "error", json.dumps(event["error"])
            return
        now = time.monotonic()
        self.gap = max(self.gap, now - self._last if self.events else 0.0)
        self.events, self._last = self.events + 1, now
        for part in event["choices"]:
            choice = self.choices.setdefault(part["index"], Choice())
            if choice.finish_reasons:
                self.problems.append(f"choice {part['index']} goes on after its end")
            choice.token_ids += part.get("token_ids") or []
            choice.text += part["text"]
            if part["finish_reason"]:
                choice.finish_reasons.append(part["finish_reason"])


def make_bodies(seed: int) -> list[Json]:
    """Requests of all kinds: prompts of 1 to 600 tokens, a third behind a shared prefix; greedy and seeded, penalties,
    two choices. Stop strings come in `with_stops`, when the texts are known."""
    rng = random.Random(seed)
    shared = [rng.randrange(VOCAB) for _ in range(200)]
    kinds: list[Json] = [
        {},
        {"temperature": 0.8, "seed": 7},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.4},
        {"n": 2, "temperature": 1.0, "seed": 11},
        {"n": 2},
        {"temperature": 0.7, "seed": 3, "top_p": 0.9, "presence_penalty": 0.5},
    ]
    bodies: list[Json] = []
    for index, length in enumerate([1, 2, 15, 16, 17, 33, 64, 100, 129, 250, 400, 600]):
        fresh = [rng.randrange(VOCAB) for _ in range(length)]
        for each, prompt in enumerate((fresh, (shared + fresh)[:600])):
            settings = kinds[(index + each) % len(kinds)]
            bodies.append({
                "model": "m", "prompt": prompt, "max_tokens": rng.choice([8, 16, 32]), "temperature": 0,
                "ignore_eos": True, "return_token_ids": True, "stream": True, **settings,
            })  # fmt: skip
    return bodies


def with_stops(bodies: list[Json], answers: list[Answer]) -> list[Json]:
    """`bodies`, and some of them again with a stop string out of the middle of their answer's text."""
    stopped: list[Json] = []
    for body, answer in list(zip(bodies, answers, strict=True))[::4]:
        text = answer.choices[0].text
        if len(text) > 12 and "\ufffd" not in text[len(text) // 2 :][:3]:
            stopped.append(body | {"stop": [text[len(text) // 2 :][:3]]})
    assert stopped, "no answer had a text to stop at"
    return bodies + stopped


async def ask(client: httpx.AsyncClient, request: int, body: Json, leave_after: float | None = None) -> Answer:
    """One request to its end; `leave_after` so many seconds the client is gone."""
    answer = Answer(request)
    await follow(client, body, answer, leave_after)
    return answer


async def follow(client: httpx.AsyncClient, body: Json, answer: Answer, leave_after: float | None = None) -> None:
    """`ask`, with an answer that can be looked at while it grows."""
    started = time.monotonic()
    try:
        async with asyncio.timeout(HUNG if leave_after is None else leave_after):
            await _stream(client, body, answer)
    except TimeoutError:
        answer.end = "hung" if leave_after is None else "left"
    except httpx.TransportError as exc:
        answer.end, answer.detail = "lost", repr(exc)
    finally:
        answer.seconds = time.monotonic() - started


async def _stream(client: httpx.AsyncClient, body: Json, answer: Answer) -> None:
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            await response.aread()
            answer.end, answer.detail = "error", f"{response.status_code}: {response.text}"
            answer.retry_after = float(response.headers.get("retry-after", "nan"))
            return
        over = False
        async for line in response.aiter_lines():
            if over and line:
                answer.problems.append(f"after [DONE]: {line}")
            elif line == "data: [DONE]":
                over = True
            elif line.startswith("data: "):
                answer.take(json.loads(line[6:]))
    if answer.end != "error":
        answer.end = "done"
        if not over:
            answer.problems.append("the stream ended without [DONE]")


def record(url: str, bodies: list[Json]) -> list[Answer]:
    """The answers to `bodies`, asked at once. Every one must be whole."""

    async def run() -> list[Answer]:
        async with httpx.AsyncClient(base_url=url, timeout=PATIENT, limits=MANY, verify=PLAIN) as client:
            return await asyncio.gather(*(ask(client, index, body) for index, body in enumerate(bodies)))

    answers = asyncio.run(run())
    wrong = [answer for answer in answers if answer.end != "done" or answer.problems]
    assert not wrong, wrong
    return answers


class Crowd(AbstractContextManager["Crowd"]):
    """`clients` clients, a few of which leave in the middle of an answer; each begins anew when its request ended.

    After a lost connection a client waits for `resume`.
    """

    def __init__(self, url: str, bodies: list[Json], *, clients: int = 20, leavers: int = 3, seed: int = 0) -> None:
        self.answers: list[Answer] = []
        self.under_way = 0
        self._url, self._bodies, self._clients, self._leavers, self._seed = url, bodies, clients, leavers, seed
        self._stop = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._resumed = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_forever, name="crowd", daemon=True)

    def __enter__(self) -> Crowd:
        self._thread.start()
        self._running: Future[None] = asyncio.run_coroutine_threadsafe(self._run(), self._loop)
        return self

    def __exit__(self, *exc: object) -> None:
        """Every request under way gets to its end, and is counted."""
        self._stop.set()
        self.resume()
        try:
            self._running.result(HUNG + 10.0)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(5.0)
            self._loop.close()

    @property
    def whole(self) -> int:
        """Answers that came whole."""
        return sum(answer.end == "done" for answer in self.answers)

    def wait_served(self, more: int, timeout: float = 40.0) -> None:
        """Until so many more answers came whole."""
        self._until(lambda: self.whole, self.whole + more, timeout)

    def wait_lost(self, timeout: float = 5.0) -> None:
        """Until every client that waits for an answer has lost its connection."""
        self._until(lambda: -self.under_way, 0, timeout)

    def resume(self) -> None:
        self._loop.call_soon_threadsafe(self._resumed.set)

    def _until(self, number: Callable[[], int], wanted: int, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while number() < wanted:
            assert time.monotonic() < deadline, f"{number()} < {wanted} after {timeout} s; ends: {self.ends()}"
            time.sleep(0.01)

    def ends(self) -> Counter[str]:
        return Counter(answer.end for answer in self.answers)

    def median(self, first: int = 0) -> float:
        """Seconds per token, from a request to its end, of the whole answers from the `first` one on."""
        whole = [answer for answer in self.answers[first:] if answer.end == "done"]
        return statistics.median(answer.seconds / len(answer.choices[0].token_ids) for answer in whole)

    async def _run(self) -> None:
        await asyncio.gather(*(self._client(number) for number in range(self._clients)))

    async def _client(self, number: int) -> None:
        rng = random.Random(f"{self._seed} {number}")
        async with httpx.AsyncClient(base_url=self._url, timeout=PATIENT, verify=PLAIN) as client:
            while not self._stop.is_set():
                request = rng.randrange(len(self._bodies))
                leave_after = rng.uniform(0.0, LEAVE) if number < self._leavers else None
                self.under_way += 1
                answer = await ask(client, request, self._bodies[request], leave_after)
                self.under_way -= 1
                self.answers.append(answer)
                if answer.end == "lost":
                    await self._resumed.wait()

    def check(self, expected: list[Answer], *, lost: bool = False) -> None:
        """Of every answer; connections may be lost only if `lost`. Prints what became of them."""
        print(f"{self} (seed {self._seed})")
        try:
            check(self.answers, expected, {"done", "left", "lost"} if lost else {"done", "left"})
        except AssertionError as exc:
            raise AssertionError(f"{exc}\nseed {self._seed}; {self}") from None

    def __str__(self) -> str:
        ends, gap = self.ends(), max((answer.gap for answer in self.answers), default=0.0)
        failed = len(self.answers) - ends["done"] - ends["left"]
        return (
            f"{len(self.answers)} requests: {ends['done']} whole, {ends['left']} left by their client, {failed} failed "
            f"({ends['error']} in error, {ends['lost']} lost, {ends['hung']} hung); longest gap {gap:.2f} s"
        )


def check(answers: list[Answer], expected: list[Answer], ends: Container[End] = ("done",)) -> None:
    """Every request ended once, in one of the ways `ends`, and with what was expected of it."""
    bad = [answer for answer in answers if answer.end not in ends or answer.problems]
    assert not bad, f"{len(bad)} of {len(answers)} ended badly, the first: {bad[0]}"
    wrong = [answer for answer in answers if not _agrees(answer, expected[answer.request])]
    assert not wrong, (
        f"{len(wrong)} of {len(answers)} answers differ, the first:\n{wrong[0]}\nexpected {expected[wrong[0].request]}"
    )


def _agrees(answer: Answer, expected: Answer) -> bool:
    """A whole answer is the expected one; what came of another is the begin of it."""
    if answer.end == "done":
        return answer.choices == expected.choices
    return all(
        expected.choices[index].text.startswith(choice.text)
        and expected.choices[index].token_ids[: len(choice.token_ids)] == choice.token_ids
        for index, choice in answer.choices.items()
    )
