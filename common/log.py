"""Logging of every process: one short line per event on stderr, `time level name message`, secrets hidden."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable

from tandem.common.errors import ConfigError
from tandem.common.redact import redact

LEVELS = ("debug", "info", "warning", "error", "critical")
MIN_SECRET = 8  # shorter ones would hide ordinary words

# A newline or escape sequence inside a message could forge a line, or drive the reader's terminal.
_CONTROL = {code: repr(chr(code))[1:-1] for code in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029) if code != 9}


def configure(level: str = "info", secrets: Iterable[str] = ()) -> None:
    """Set up the root logger; calling again replaces the former set-up. `secrets` are hidden wherever they appear.

    Raises ConfigError for an unknown level.
    """
    if level.lower() not in LEVELS:
        raise ConfigError(f"unknown log level {level!r}; the levels are {', '.join(LEVELS)}")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(tuple(secret for secret in secrets if len(secret) >= MIN_SECRET)))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)


class _Formatter(logging.Formatter):
    def __init__(self, secrets: tuple[str, ...]) -> None:
        super().__init__("%(asctime)s.%(msecs)03d %(levelname)-7s %(name)s %(message)s", "%H:%M:%S")
        self._secrets = secrets

    def formatMessage(self, record: logging.LogRecord) -> str:
        return super().formatMessage(record).translate(_CONTROL)

    def format(self, record: logging.LogRecord) -> str:
        """Redacts the finished text, so tracebacks are covered too."""
        return redact(super().format(record), self._secrets)
