"""What one router is told; resolved once, never changed."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSettings:
    """Secrets are kept out of repr()."""

    model_dir: str  # with the tokenizer's files; weights are not read
    redis_url: str = field(repr=False)  # may hold a password
    cluster_key: bytes = field(repr=False)
    served_model_names: tuple[str, ...]  # the first is the one in /v1/models
    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free port
    cluster: str = "default"
    api_keys: tuple[str, ...] = field(default=(), repr=False)  # none: everybody may ask
    prefill_expected: int = 0  # prefill workers; 0: decode workers prefill, and that is no degradation
    max_model_len: int | None = None  # tokens; None: the smallest of the workers
    generation_config: str = "auto"  # auto: sampling defaults from the model's generation_config.json | none
    request_timeout: float = 600.0  # seconds
    migration_limit: int = 3  # attempts of one request
    worker_wait: float = 5.0  # seconds that a new request waits for a first worker
    recovery_wait: float = 30.0  # … and one that lost its worker for the next
    max_num_queued_reqs: int = 512  # sequences waiting for their first token
    max_num_queued_tokens: int = 1 << 20  # … and their prompt tokens
    max_queue_wait: float = 60.0  # seconds that the queue may need to drain when a request joins it
    queue_timeout: float = 300.0  # seconds from a request's arrival to its first token
    max_body_bytes: int = 1 << 20
    keep_alive: float = 15.0  # seconds of silence before an SSE comment
    send_timeout: float = 30.0  # seconds a client may take no byte
    shutdown_timeout: float = 30.0  # seconds that streams get to finish after SIGTERM
    log_level: str = "info"
