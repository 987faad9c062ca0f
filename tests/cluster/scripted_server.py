"""An OpenAI-like server in a thread, whose answers to POST are scripts: what is sent, when, and how it breaks off."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]
Step = float | bytes | int | None  # seconds to wait; bytes to send; a status other than 200; None: cut the connection
Script = Callable[[Json], Iterable[Step]]

DONE = b"data: [DONE]\n\n"


def event(tokens: int | None = None, text: str = "x", **choice: Any) -> bytes:
    """A chunk of a text completion. `tokens`: usage so far, as with continuous_usage_stats."""
    usage = {"usage": {"prompt_tokens": 3, "completion_tokens": tokens}} if tokens is not None else {}
    return sse({"choices": [{"index": 0, "text": text, "finish_reason": None} | choice]} | usage)


def final_usage(tokens: int, prompt: int = 3, cached: int = 0) -> bytes:
    details = {"prompt_tokens_details": {"cached_tokens": cached}}
    return sse({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": tokens} | details})


def sse(payload: Json) -> bytes:
    return b"data: " + json.dumps(payload).encode() + b"\n\n"


def plain(body: Json, first: float = 0.0, gap: float = 0.0) -> Iterator[Step]:
    """As many tokens as were asked for, each in its own event."""
    yield first
    for number in range(1, body["max_tokens"] + 1):
        yield event(number, token_ids=[100 + number])
        yield gap
    yield final_usage(body["max_tokens"], prompt=len(body.get("prompt", ())))
    yield DONE


@dataclass
class ScriptedServer:
    script: Script = plain
    url: str = ""
    bodies: list[Json] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    received: list[float] = field(default_factory=list)  # time.perf_counter of each POST
    written: list[float] = field(default_factory=list)  # … of each piece of an answer
    connections: int = 0
    active: int = 0
    most_active: int = 0
    looks: int = 0  # at the status
    next_status: Callable[[], Json] = lambda: {"workers": []}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while await self._one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client left, or the test is over
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        if head.startswith("GET"):
            self.looks += "/status" in head
            found = self.next_status() if "/status" in head else {"data": [{"id": "scripted"}]}
            text = json.dumps(found).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(text), text))
            return True
        length = int(head.lower().split("content-length: ")[1].split("\r\n")[0])
        body = json.loads(await reader.readexactly(length))
        self.heads.append(head)
        self.bodies.append(body)
        self.received.append(time.perf_counter())
        self.active += 1
        self.most_active = max(self.active, self.most_active)
        try:
            return await self._play(self.script(body), writer)
        finally:
            self.active -= 1

    async def _play(self, steps: Iterable[Step], writer: asyncio.StreamWriter) -> bool:
        status, started = 200, False
        for step in steps:
            if step is None:
                writer.transport.abort()
                return False
            if isinstance(step, bytes):
                if not started:
                    writer.write(b"HTTP/1.1 %d Said\r\nTransfer-Encoding: chunked\r\n\r\n" % status)
                    started = True
                self.written.append(time.perf_counter())
                writer.write(b"%x\r\n%s\r\n" % (len(step), step))
                await writer.drain()
            elif isinstance(step, float):
                await asyncio.sleep(step)
            else:
                status = step
        writer.write(b"0\r\n\r\n")
        return True


@contextmanager
def serving(script: Script = plain) -> Iterator[ScriptedServer]:
    server = ScriptedServer(script)
    ready, loop = threading.Event(), asyncio.new_event_loop()

    async def main(stop: asyncio.Event) -> None:
        listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        ready.set()
        await stop.wait()
        listener.close()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    stop = asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(main(stop)), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        assert not thread.is_alive()
        loop.close()
