"""`python -m tandem.router`: one router process. What cannot work ends it at once, with one line and exit code 1."""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import fields
from types import FrameType

import uvicorn

from tandem.common import log
from tandem.common.errors import ConfigError, TandemError
from tandem.common.registry import Registry
from tandem.common.rpc import format_address
from tandem.common.worker_config import cluster_key_from_env
from tandem.router.app import Services, create_app
from tandem.router.settings import RouterSettings

logger = logging.getLogger("tandem.router")

BACKLOG = 2048
MAX_HEADER_BYTES = 16 << 10


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


class RouterServer(uvicorn.Server):
    """SIGTERM and SIGINT let running streams finish; a second one ends them at once. Either way the exit code is 0."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True


def serve(settings: RouterSettings) -> None:
    """Until a signal. Raises TandemError when the router cannot start."""
    listener = listen(settings.host, settings.port)
    with listener:
        services = Services.create(settings, Registry(settings.redis_url, settings.cluster))
        config = uvicorn.Config(
            create_app(services),
            log_config=None,
            access_log=False,
            lifespan="on",
            server_header=False,
            proxy_headers=False,  # nothing of ours trusts X-Forwarded-For
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            # with 0 uvicorn reports a missed deadline even when nothing is left to wait for
            timeout_graceful_shutdown=max(1, round(settings.shutdown_timeout)),
        )
        host, port = listener.getsockname()[:2]
        logger.info("router listening on http://%s", format_address(host, port))
        RouterServer(config).run(sockets=[listener])


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
