"""What happens to every request, as pure ASGI: each layer sees a client leave, which BaseHTTPMiddleware would hide."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tandem.common.errors import InternalError, InvalidApiKey, Overloaded, TandemError
from tandem.router.metrics import RouterMetrics
from tandem.router.responses import error_response

log = logging.getLogger("tandem.router")

OPEN_PATHS = frozenset({"/health", "/livez", "/readyz", "/metrics"})  # everything else needs the key, also what is new

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class RequestId:
    """Echoes X-Request-Id, or mints one; ours never leaves the HTTP layer, and no client's enters it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)

        async def tagged(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, tagged)


class HttpMetrics:
    """Counts answers by route, method and status; 499 where the client left before there was one."""

    def __init__(self, app: ASGIApp, metrics: RouterMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 499

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            route: Any = scope.get("route")
            handler = getattr(route, "path", "other")  # never the raw path: a label's values must be few
            self._metrics.http_requests.labels(handler, _method(scope), status).inc()


class LastWord:
    """The innermost: a handler that ends without an answer, by a bug or because the server stops, gets one here, in
    our form, and the layers outside see it as any other."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        error: TandemError
        try:
            await self._app(scope, receive, noted)
            return
        except asyncio.CancelledError:  # the server stops and its grace is over; it takes answers until we return
            if started:
                return  # what could still be said has been (EventStream)
            error = Overloaded("the server is shutting down; ask again", retry_after=1.0)
        except Exception as exc:
            if started:
                raise
            log.exception("a request ended by a bug: %s", exc)
            error = InternalError("the server failed while answering; it has been logged")
        await error_response(error)(scope, receive, send)


class ApiKey:
    """Refuses requests without `Authorization: Bearer <one of keys>`, except on OPEN_PATHS."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._digests and scope["path"] not in OPEN_PATHS:
            scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not self._known(key.strip()):
                error = InvalidApiKey("the API key is missing or wrong; send it as 'Authorization: Bearer <key>'")
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _known(self, key: str) -> bool:
        """Compares with every key, in a time that tells nothing about them."""
        digest = _digest(key)
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _method(scope: Scope) -> str:
    method: str = scope["method"]
    return method if method in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH") else "other"
