"""gRPC between the router and the workers, and from P to D: channels, servers, authentication, errors.

Every connection is TLS in which both ends prove that they hold the cluster key (common/credentials.py), before either
sends anything else. Errors cross as gRPC status + metadata `tandem-code`, so that both sides raise the same class of
common/errors.py.
"""

from __future__ import annotations

import re
import socket
from typing import Any, NoReturn, cast

import grpc
import grpc.aio

from tandem.common.credentials import HOST_NAME, credentials
from tandem.common.errors import (
    BY_CODE,
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    InternalError,
    TandemError,
    WorkerFailed,
)
from tandem.common.worker_config import KEY_VARIABLE

MAX_MESSAGE_BYTES = 64 << 20  # a leg with limits.MAX_PROMPT_TOKENS, or every block hash of a large pool
MAX_METADATA_BYTES = 8 << 10  # of one call
MAX_STREAMS = 4096  # calls at a time over one connection; more wait, within their deadline
HANDSHAKE_TIMEOUT_MS = 10_000  # who connects and does not authenticate holds a socket no longer
MAX_DETAIL_BYTES = 2048  # percent-encoded it must still fit the metadata
MAX_PARAM_BYTES = 256

CODE = "tandem-code"
PARAM = "tandem-param-bin"
RETRY_AFTER = "tandem-retry-after"

_COMMON_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),  # else refused at random from the other one on
    # A peer that stands still, or whose machine vanished, sends no FIN: only an unanswered ping tells, in 5 s at most.
    ("grpc.keepalive_time_ms", 2_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.ping_timeout_ms", 3_000),  # what really ends it: grpc#39239; by default a minute
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
_SERVER_OPTIONS = (
    *_COMMON_OPTIONS,
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.max_concurrent_streams", MAX_STREAMS),
    ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT_MS),
    ("grpc.so_reuseport", 0),  # else a second process would silently share a busy port
)
_CHANNEL_OPTIONS: tuple[tuple[str, int | str], ...] = (
    *_COMMON_OPTIONS,
    ("grpc.ssl_target_name_override", HOST_NAME),
    ("grpc.enable_http_proxy", 0),  # internal traffic never leaves through http_proxy
    ("grpc.use_local_subchannel_pool", 1),  # a channel's back-off is its own
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)

# What a status without `tandem-code` means: it comes from gRPC itself, mostly from a connection that broke.
_FOREIGN: dict[grpc.StatusCode, type[TandemError]] = {
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.RESOURCE_EXHAUSTED: InternalError,  # a message over the size limit
    grpc.StatusCode.UNIMPLEMENTED: ConfigError,  # another version, or no worker of ours
}
_NOT_OURS = "TSI_PROTOCOL_FAILURE"  # how a status names a failed proof, and a peer without TLS
_ADDRESS = re.compile(r"ipv[46]:(\S+): ")


def create_server() -> grpc.aio.Server:
    """Call it inside the event loop it will run in, then `bind` it."""
    return grpc.aio.server(options=_SERVER_OPTIONS)


def create_channel(address: str, cluster_key: bytes) -> grpc.aio.Channel:
    """Connects lazily, and only to holders of the same key. `address` is host:port, IPv6 hosts in brackets."""
    return grpc.aio.secure_channel(address, _client_credentials(cluster_key), options=_CHANNEL_OPTIONS)


def create_sync_channel(address: str, cluster_key: bytes) -> grpc.Channel:
    """For callers that are threads; otherwise as `create_channel`."""
    return grpc.secure_channel(address, _client_credentials(cluster_key), options=_CHANNEL_OPTIONS)


def format_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def bind(server: grpc.aio.Server, host: str, port: int, cluster_key: bytes) -> int:
    """Listen on one address, for holders of the same key; port 0 takes a free one. Returns the port.

    Raises ConfigError naming the address.
    """
    _probe(host, port)
    own = credentials(cluster_key)
    tls = grpc.ssl_server_credentials([(own.private_key, own.certificate)], own.authority, require_client_auth=True)
    try:
        return server.add_secure_port(format_address(host, port), tls)
    except RuntimeError as exc:
        raise ConfigError(_cannot_listen(host, port, "it was taken a moment ago")) from exc


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: TandemError) -> NoReturn:
    """End the call with `error`; never returns. The caller's `to_error` rebuilds it."""
    metadata: list[tuple[str, str | bytes]] = [(CODE, error.code)]
    if error.param is not None:
        metadata.append((PARAM, error.param.encode()[:MAX_PARAM_BYTES]))
    if error.retry_after is not None:
        metadata.append((RETRY_AFTER, repr(float(error.retry_after))))
    details = error.message.encode()[:MAX_DETAIL_BYTES].decode(errors="ignore")
    await context.abort(grpc.StatusCode[error.grpc_code], details, cast(Any, tuple(metadata)))
    raise AssertionError("context.abort returned")


def to_error(exc: grpc.RpcError) -> TandemError:
    """The error a failed call means to us. Use as `raise to_error(exc) from exc`."""
    call = cast(Any, exc)  # grpc.RpcError is declared bare; both AioRpcError and the sync one have these
    status: grpc.StatusCode = call.code()
    details: str = call.details() or status.name
    metadata = {str(key): value for key, value in call.trailing_metadata() or ()}
    cls = BY_CODE.get(_text(metadata.get(CODE)))
    if cls is None:
        return _foreign(status, details)
    param = _text(metadata.get(PARAM)) or None
    return cls(details, param=param, retry_after=_seconds(_text(metadata.get(RETRY_AFTER))))


def _client_credentials(cluster_key: bytes) -> grpc.ChannelCredentials:
    own = credentials(cluster_key)
    return grpc.ssl_channel_credentials(own.authority, own.private_key, own.certificate)


def _foreign(status: grpc.StatusCode, details: str) -> TandemError:
    if _NOT_OURS in details:
        found = _ADDRESS.search(details)
        peer = f"the peer at {found[1]}" if found else "the peer"
        return WorkerFailed(f"{peer} does not hold this cluster's key; check that {KEY_VARIABLE} is the same on both")
    cls = _FOREIGN.get(status, WorkerFailed)
    return cls(f"call to worker failed with {status.name}: {details}")


def _text(value: str | bytes | None) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value or ""


def _seconds(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value < 1e9 else None


def _probe(host: str, port: int) -> None:
    """gRPC hides why it cannot bind and logs to stderr; a plain socket says it. Raises ConfigError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC: TIME_WAIT does not count as busy
            probe.bind(address)
            probe.listen(1)
    except (OSError, OverflowError, UnicodeError) as exc:
        reason = (exc.strerror if isinstance(exc, OSError) else None) or str(exc)
        raise ConfigError(_cannot_listen(host, port, reason)) from exc


def _cannot_listen(host: str, port: int, reason: str) -> str:
    return f"cannot listen on {format_address(host, port)}: {reason}; choose another --host or --port"
