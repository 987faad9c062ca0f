"""gRPC between the router and the workers, and from P to D: channels, servers, authentication, errors.

Every call proves that its caller holds the cluster key: metadata `tandem-auth` = HMAC-SHA-256(key, "tandem.rpc.v1").
That keeps strangers and other clusters out of a trusted network; it is no encryption.
Errors cross as gRPC status + metadata `tandem-code`, so that both sides raise the same class of common/errors.py.
"""

from __future__ import annotations

import hmac
import socket
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, NoReturn, cast

import grpc
import grpc.aio

from tandem.common.errors import (
    BY_CODE,
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    InternalError,
    TandemError,
    WorkerFailed,
)

MAX_MESSAGE_BYTES = 64 << 20
MAX_DETAIL_BYTES = 2048  # percent-encoded it must still fit the 8 KiB that gRPC allows for trailing metadata
MAX_PARAM_BYTES = 256

AUTH = "tandem-auth"
CODE = "tandem-code"
PARAM = "tandem-param-bin"
RETRY_AFTER = "tandem-retry-after"

_COMMON_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A peer whose machine vanished sends no FIN: only an unanswered ping tells.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # what really ends it: grpc#39239; by default a minute
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
_SERVER_OPTIONS = (
    *_COMMON_OPTIONS,
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),  # else a second process would silently share a busy port
)
_CHANNEL_OPTIONS = (
    *_COMMON_OPTIONS,
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
    grpc.StatusCode.UNAUTHENTICATED: ConfigError,
}


def create_server(cluster_key: bytes) -> grpc.aio.Server:
    """A server that answers only callers with the same key. Call it inside the event loop it will run in."""
    return grpc.aio.server(interceptors=[_ServerAuth(cluster_key)], options=_SERVER_OPTIONS)


def create_channel(address: str, cluster_key: bytes) -> grpc.aio.Channel:
    """Connects lazily. `address` is host:port, IPv6 hosts in brackets."""
    interceptors: list[Any] = [kind(_token(cluster_key)) for kind in _CLIENT_AUTH]
    return grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS, interceptors=interceptors)


def create_sync_channel(address: str, cluster_key: bytes) -> grpc.Channel:
    """For callers that are threads; otherwise as `create_channel`."""
    channel = grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)
    return grpc.intercept_channel(channel, _SyncAuth(_token(cluster_key)))


def format_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def bind(server: grpc.aio.Server, host: str, port: int) -> int:
    """Listen on one address; port 0 takes a free one. Returns the port. Raises ConfigError naming the address."""
    _probe(host, port)
    try:
        return server.add_insecure_port(format_address(host, port))
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


def _foreign(status: grpc.StatusCode, details: str) -> TandemError:
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


def _token(cluster_key: bytes) -> str:
    return hmac.digest(cluster_key, b"tandem.rpc.v1", "sha256").hex()


class _ServerAuth(grpc.aio.ServerInterceptor):
    def __init__(self, cluster_key: bytes) -> None:
        self._token = _token(cluster_key).encode()
        # As a stream-stream handler it refuses calls of every kind without waiting for a request.
        self._refuse = grpc.stream_stream_rpc_method_handler(_refuse)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        metadata: Any = handler_call_details.invocation_metadata
        given = [value for key, value in metadata or () if key == AUTH]
        if len(given) == 1 and hmac.compare_digest(_text(given[0]).encode(), self._token):
            return await continuation(handler_call_details)
        return self._refuse


async def _refuse(_: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    error = ConfigError("the caller's cluster key is not this worker's; check TANDEM_CLUSTER_KEY on both")
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, error.message, cast(Any, ((CODE, error.code),)))


class _ClientAuth:
    """Adds the token. One subclass per kind of call, because grpc.aio sorts interceptors by their base class."""

    def __init__(self, token: str) -> None:
        self._token = token

    async def _call(self, continuation: Callable[..., Awaitable[Any]], details: Any, request: Any) -> Any:
        metadata = grpc.aio.Metadata(*(details.metadata or ()), (AUTH, self._token))
        return await continuation(details._replace(metadata=metadata), request)


class _UnaryUnaryAuth(_ClientAuth, grpc.aio.UnaryUnaryClientInterceptor):  # pyright: ignore[reportMissingTypeArgument]
    intercept_unary_unary = _ClientAuth._call  # pyright: ignore[reportAssignmentType, reportPrivateUsage]


class _UnaryStreamAuth(_ClientAuth, grpc.aio.UnaryStreamClientInterceptor):  # pyright: ignore[reportMissingTypeArgument]
    intercept_unary_stream = _ClientAuth._call  # pyright: ignore[reportAssignmentType, reportPrivateUsage]


class _StreamUnaryAuth(_ClientAuth, grpc.aio.StreamUnaryClientInterceptor):  # pyright: ignore[reportMissingTypeArgument]
    intercept_stream_unary = _ClientAuth._call  # pyright: ignore[reportAssignmentType, reportPrivateUsage]


class _StreamStreamAuth(_ClientAuth, grpc.aio.StreamStreamClientInterceptor):  # pyright: ignore[reportMissingTypeArgument]
    intercept_stream_stream = _ClientAuth._call  # pyright: ignore[reportAssignmentType, reportPrivateUsage]


_CLIENT_AUTH = (_UnaryUnaryAuth, _UnaryStreamAuth, _StreamUnaryAuth, _StreamStreamAuth)


class _CallDetails(NamedTuple):
    """grpc.ClientCallDetails, which cannot be instantiated, with its metadata replaced."""

    method: str
    timeout: float | None
    metadata: tuple[tuple[str, str | bytes], ...]
    credentials: grpc.CallCredentials | None
    wait_for_ready: bool | None
    compression: grpc.Compression | None


class _SyncAuth(
    grpc.UnaryUnaryClientInterceptor,  # pyright: ignore[reportMissingTypeArgument]
    grpc.UnaryStreamClientInterceptor,  # pyright: ignore[reportMissingTypeArgument]
    grpc.StreamUnaryClientInterceptor,  # pyright: ignore[reportMissingTypeArgument]
    grpc.StreamStreamClientInterceptor,  # pyright: ignore[reportMissingTypeArgument]
):
    def __init__(self, token: str) -> None:
        self._token = token

    def _call(self, continuation: Callable[[Any, Any], Any], details: Any, request: Any) -> Any:
        metadata = (*(details.metadata or ()), (AUTH, self._token))
        rest = (details.credentials, details.wait_for_ready, details.compression)
        return continuation(_CallDetails(details.method, details.timeout, metadata, *rest), request)

    intercept_unary_unary = _call  # pyright: ignore[reportAssignmentType]
    intercept_unary_stream = _call  # pyright: ignore[reportAssignmentType]
    intercept_stream_unary = _call  # pyright: ignore[reportAssignmentType]
    intercept_stream_stream = _call  # pyright: ignore[reportAssignmentType]
