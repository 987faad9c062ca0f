"""Every error Tandem tells someone about, and the one table that says how.

    TandemError
    ├── InvalidRequest            the client must change the request
    │   ├── ContextLengthExceeded
    │   ├── ModelNotFound
    │   └── InvalidApiKey
    ├── RateLimited               this client sends too much
    ├── Overloaded                no room, or no worker, at the moment
    ├── DeadlineExceeded
    ├── Cancelled                 the client, or the router on its behalf, gave the request up
    ├── WorkerFailed              a worker died or answered nonsense
    ├── TransferFailed            a KV hand-off did not verify, or timed out
    │   └── TicketRefused
    ├── ConfigError               the operator must change a flag, a file or the environment
    │   └── ModelError            … namely the model directory
    └── InternalError             a bug of ours

Each class carries its HTTP status, the OpenAI error `type` and `code`, its gRPC status name, and whether the same
request may succeed when tried again. Foreign exceptions are translated where they enter, with `raise … from`.
"""

from __future__ import annotations

from typing import ClassVar


class TandemError(Exception):
    """Base of the tree. The message says what happened, where, and what to do."""

    http_status: ClassVar[int] = 500
    type: ClassVar[str] = "internal_server_error"
    code: ClassVar[str] = "internal_error"
    grpc_code: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param  # the request field at fault
        self.retry_after = retry_after  # seconds


class InvalidRequest(TandemError):
    http_status = 400
    type = "invalid_request_error"
    code = "invalid_request"
    grpc_code = "INVALID_ARGUMENT"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"
    grpc_code = "OUT_OF_RANGE"


class ModelNotFound(InvalidRequest):
    http_status = 404
    code = "model_not_found"
    grpc_code = "NOT_FOUND"


class InvalidApiKey(InvalidRequest):
    http_status = 401
    code = "invalid_api_key"
    grpc_code = "UNAUTHENTICATED"


class RateLimited(TandemError):
    http_status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"
    grpc_code = "RESOURCE_EXHAUSTED"
    retryable = True


class Overloaded(TandemError):
    http_status = 503
    type = "service_unavailable_error"
    code = "engine_overloaded"
    grpc_code = "UNAVAILABLE"
    retryable = True


class DeadlineExceeded(TandemError):
    http_status = 504
    type = "timeout_error"
    code = "deadline_exceeded"
    grpc_code = "DEADLINE_EXCEEDED"


class Cancelled(TandemError):
    http_status = 499
    type = "request_cancelled"
    code = "request_cancelled"
    grpc_code = "CANCELLED"


class WorkerFailed(TandemError):
    http_status = 502
    type = "worker_error"
    code = "worker_failed"
    grpc_code = "ABORTED"
    retryable = True


class TransferFailed(TandemError):
    http_status = 504
    type = "kv_transfer_error"
    code = "kv_transfer_timeout"
    grpc_code = "DATA_LOSS"
    retryable = True


class TicketRefused(TransferFailed):
    code = "ticket_refused"
    grpc_code = "PERMISSION_DENIED"


class ConfigError(TandemError):
    code = "configuration_error"
    grpc_code = "FAILED_PRECONDITION"


class ModelError(ConfigError):
    code = "model_error"


class InternalError(TandemError):
    pass


ALL: tuple[type[TandemError], ...] = (
    InvalidRequest, ContextLengthExceeded, ModelNotFound, InvalidApiKey, RateLimited, Overloaded, DeadlineExceeded,
    Cancelled, WorkerFailed, TransferFailed, TicketRefused, ConfigError, ModelError, InternalError,
)  # fmt: skip
BY_CODE: dict[str, type[TandemError]] = {cls.code: cls for cls in ALL}
