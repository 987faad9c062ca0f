"""HTTP's side of answers: error bodies, bodies in, server-sent events out, and the client that leaves meanwhile."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from tandem.common.errors import Cancelled, InternalError, InvalidRequest, Overloaded, TandemError
from tandem.router.completions import DONE, event
from tandem.router.outbox import Outbox

log = logging.getLogger("tandem.router")

BODY_TIMEOUT = 10.0  # seconds a client may take to send its request
KEEP_ALIVE = b": keep-alive\n\n"
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold tokens back
]

T = TypeVar("T")
Produce = Callable[[Outbox], Coroutine[Any, Any, None]]


class BodyTooLarge(InvalidRequest):
    http_status = 413
    code = "request_too_large"


class BodyTimeout(InvalidRequest):
    http_status = 408
    code = "request_timeout"


class UnsupportedMediaType(InvalidRequest):
    http_status = 415
    code = "unsupported_media_type"


class NotFound(InvalidRequest):
    http_status = 404
    code = "not_found"


class MethodNotAllowed(InvalidRequest):
    http_status = 405
    code = "method_not_allowed"


def error_body(error: TandemError) -> dict[str, Any]:
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def error_response(error: TandemError) -> JSONResponse:
    headers: dict[str, str] = {}
    if error.http_status in (429, 503):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after or 1)))
    if isinstance(error, BodyTimeout):
        headers["Connection"] = "close"  # the rest of the body is not waited for
    return JSONResponse(error_body(error), error.http_status, headers)


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body, at most `limit` bytes, as JSON by its declared type. Raises InvalidRequest, Cancelled."""
    kind = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if kind != "application/json":
        raise UnsupportedMediaType(f"the request body must be application/json, not {kind[:64]!r}")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            async for chunk in request.stream():
                # Too large a body is read on, and dropped: a client that still sends would not see our answer.
                if len(body) <= limit:
                    body += chunk
    except TimeoutError as exc:
        raise BodyTimeout(f"the request body did not arrive within {BODY_TIMEOUT:g} s") from exc
    except ClientDisconnect as exc:
        raise Cancelled("the client left while sending its request") from exc
    if len(body) > limit:
        raise BodyTooLarge(f"the request body is over {limit} bytes")
    return bytes(body)


async def client_gone(receive: Receive) -> None:
    """Returns when the client has left. The request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
    """The result of `work`, which is cancelled when the client leaves first, or behind `timeout` seconds.

    Raises Cancelled, TimeoutError.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(client_gone(receive))
    try:
        done, _ = await asyncio.wait((task, gone), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            raise TimeoutError
        if task.cancelled():  # nobody here did: the server answers all the same
            raise InternalError("the answer was cancelled inside the server; try again")
        if task.done():
            return task.result()
        raise Cancelled("the client left before its answer was complete")
    finally:
        await _end(task, gone)


class EventStream(Response):
    """An ASGI response of server-sent events that `produce` puts into an outbox.

    The status line waits for the first event or KEEP_ALIVE's interval, so an error before it still gets its own
    status; an error behind it is an event. Leaving, for whatever reason, cancels `produce` before it returns.
    """

    def __init__(self, produce: Produce, keep_alive: float) -> None:
        """`keep_alive`: seconds of silence that a comment ends."""
        super().__init__()
        self._produce = produce
        self._keep_alive = keep_alive
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        outbox = Outbox()
        producer = asyncio.create_task(self._guard(outbox))
        gone = asyncio.create_task(client_gone(receive))
        gone.add_done_callback(lambda _: outbox.close(Cancelled("the client left before its answer was complete")))
        try:
            await self._write(outbox, scope, receive, send)
        except asyncio.CancelledError:  # the server stops and its grace is over
            if self._started:
                with suppress(TimeoutError):  # a client that reads slowly does not hold the server
                    async with asyncio.timeout(0):
                        await self._finish(Overloaded("the server is shutting down; ask again"), send)
            raise
        finally:
            await _end(producer, gone)

    async def _guard(self, outbox: Outbox) -> None:
        """Whatever ends the producer closes its outbox: a client must not wait for one that is gone."""
        try:
            await self._produce(outbox)
        except Exception as exc:
            log.exception("a stream ended by a bug: %s", exc)
        finally:
            outbox.close(InternalError("the server failed while answering; it has been logged"))

    async def _write(self, outbox: Outbox, scope: Scope, receive: Receive, send: Send) -> None:
        data = await outbox.take(self._keep_alive)
        if data is None and outbox.error is not None:
            await error_response(outbox.error)(scope, receive, send)
            return
        self._started = True
        await send({"type": "http.response.start", "status": 200, "headers": list(STREAM_HEADERS)})
        while data is not None:
            await send({"type": "http.response.body", "body": data or KEEP_ALIVE, "more_body": True})
            data = await outbox.take(self._keep_alive)
        await self._finish(outbox.error, send)

    async def _finish(self, error: TandemError | None, send: Send) -> None:
        last = event(error_body(error)) + DONE if error else b""
        await send({"type": "http.response.body", "body": last, "more_body": False})


async def _end(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
