"""`python -m tandem.router`: one router process. What cannot work ends it at once, with one line and exit code 1."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from types import FrameType

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from tandem.common import log
from tandem.common.errors import ConfigError, Overloaded, TandemError
from tandem.common.registry import Registry
from tandem.common.rpc import format_address
from tandem.common.worker_config import cluster_key_from_env
from tandem.router.app import Services, create_app
from tandem.router.http_protocol import bounded_protocol
from tandem.router.responses import error_response
from tandem.router.settings import RouterSettings

logger = logging.getLogger("tandem.router")

BACKLOG = 2048
ALWAYS_OPEN = ("/livez", "/metrics", "/status", "/version")


def parse_settings(argv: Sequence[str] | None = None) -> RouterSettings:
    """Raises ConfigError."""
    given = vars(_parser().parse_args(argv))
    api_keys = [*(given.pop("api_key") or ()), *filter(None, [os.environ.get("TANDEM_API_KEY")])]
    names = given.pop("served_model_name") or [os.path.basename(os.path.normpath(given["model_dir"]))]
    known = {field.name for field in fields(RouterSettings)}
    return RouterSettings(
        api_keys=tuple(api_keys),
        served_model_names=tuple(names),
        cluster_key=cluster_key_from_env(),
        **{name: value for name, value in given.items() if name in known and value is not None},
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tandem.router", description=__doc__)
    add = parser.add_argument
    add("--host", help="address to listen on (default 127.0.0.1)")
    add("--port", type=int, help="0: any free port (default 8000)")
    add("--redis-url", default=os.environ.get("TANDEM_REDIS_URL", "redis://127.0.0.1:6379/0"))
    add("--cluster", help="which of several clusters in one Redis (default 'default')")
    add("--model-dir", required=True, help="directory with the tokenizer's files and config.json")
    add("--served-model-name", nargs="+", metavar="NAME", help="names clients may use; the first is listed first")
    add("--api-key", nargs="+", metavar="KEY", help="require one of these; better: environment TANDEM_API_KEY")
    add("--prefill-expected", type=int, metavar="N", help="prefill workers to wait for before being ready")
    add("--max-model-len", type=int, help="tokens of prompt and answer together (default: what the workers have)")
    add("--generation-config", choices=("auto", "none"), help="take sampling defaults from the model (auto)")
    add("--request-timeout", type=float, metavar="SECONDS", help="a request's deadline (default 600)")
    add("--migration-limit", type=int, metavar="N", help="attempts of one request (default 3)")
    add("--max-num-queued-reqs", type=int, metavar="N", help="choices that may wait for their first token (512)")
    add("--max-num-queued-tokens", type=int, metavar="N", help="… and their prompt tokens (1048576)")
    add("--max-queue-wait", type=float, metavar="SECONDS", help="expected for a first token; beyond it, 503 (60)")
    add("--queue-timeout", type=float, metavar="SECONDS", help="a request without its first token gets 503 (300)")
    add("--max-body-bytes", type=int, metavar="N", help="of one request (default 1 MiB)")
    add("--shutdown-timeout", type=float, metavar="SECONDS", help="that streams get after SIGTERM (default 30)")
    add("--log-level", default="info", choices=log.LEVELS)
    return parser


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, so that a busy port is known before anything is loaded. Raises ConfigError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except BaseException:
            listener.close()
            raise
    except (OSError, OverflowError, UnicodeError) as exc:
        where = format_address(host, port)
        raise ConfigError(f"cannot listen on {where}: {exc}; choose another --host or --port") from exc
    return listener


class Door:
    """ASGI middleware around the app: knows how many requests are inside and, once `closed`, lets no more in."""

    def __init__(self, app: ASGIApp) -> None:
        self.closed = False
        self.inside = 0
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif self.closed and scope["path"] not in ALWAYS_OPEN:
            response = error_response(Overloaded("this router is shutting down; try again", retry_after=1.0))
            response.headers["connection"] = "close"
            await response(scope, receive, send)
        else:
            self.inside += 1
            try:
                await self._app(scope, receive, send)
            finally:
                self.inside -= 1


class RouterServer(uvicorn.Server):
    """SIGTERM and SIGINT close the door and let those inside finish within `patience` seconds; a second one ends them
    at once. Either way the exit code is 0. While it waits it still listens, so that who comes gets an answer."""

    def __init__(self, config: uvicorn.Config, door: Door, patience: float) -> None:
        super().__init__(config)
        self._door, self._patience, self._deadline = door, patience, 0.0
        self._told = False  # that it shuts down

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        patience = self._patience
        if self._door.closed:
            patience = self.config.timeout_graceful_shutdown = 0
        self._door.closed, self._deadline = True, time.monotonic() + patience

    async def on_tick(self, counter: int) -> bool:
        if self._door.closed and not self._told:
            self._told = True
            left = max(0.0, self._deadline - time.monotonic())
            logger.info("shutting down; %d requests are inside and get up to %.0f s", self._door.inside, left)
        if self._door.closed and (not self._door.inside or time.monotonic() >= self._deadline):
            if self._door.inside:
                logger.warning("shutting down; %d requests are ended: their time is over", self._door.inside)
            self.should_exit = True
        return await super().on_tick(counter)


def serve(settings: RouterSettings) -> None:
    """Until a signal. Raises TandemError when the router cannot start."""
    listener = listen(settings.host, settings.port)
    with listener:
        services = Services.create(settings, Registry(settings.redis_url, settings.cluster_key, settings.cluster))
        door = Door(create_app(services))
        config = uvicorn.Config(
            door,
            http=bounded_protocol(settings.send_timeout),
            log_config=None,
            access_log=False,
            lifespan="on",
            server_header=False,
            proxy_headers=False,  # nothing of ours trusts X-Forwarded-For
            timeout_graceful_shutdown=1,  # behind `patience`, for connections to close
        )
        host, port = listener.getsockname()[:2]
        logger.info("router listening on http://%s", format_address(host, port))
        gc.collect()
        gc.freeze()  # what is loaded stays: a full collection would stop the event loop for some 50 ms
        RouterServer(config, door, settings.shutdown_timeout).run(sockets=[listener])


def main(argv: Sequence[str] | None = None) -> int:
    try:
        settings = parse_settings(argv)
        log.configure(settings.log_level, settings.api_keys)
        serve(settings)
    except TandemError as exc:
        print(f"tandem.router: error: {exc.message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
