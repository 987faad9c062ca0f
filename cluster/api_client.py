"""The few requests that `tandem chat` and `tandem status` make."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, cast

import httpx

from tandem.common.errors import ConfigError

TIMEOUT = httpx.Timeout(10.0, read=120.0)  # seconds; the router sends a comment at least every 15 s


class ApiError(ConfigError):
    """The server refused, or is not there."""


class ApiClient:
    def __init__(self, url: str, api_key: str | None) -> None:
        self._url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        try:
            self._client = httpx.Client(base_url=self._url, headers=headers, timeout=TIMEOUT, trust_env=False)
        except (httpx.InvalidURL, UnicodeError) as exc:
            raise ApiError(f"{url!r} is not a URL: {exc}") from exc

    def get(self, path: str) -> dict[str, Any]:
        """Raises ApiError."""
        try:
            response = self._client.get(path)
            _raise_for(response.status_code, response.content)
            return cast(dict[str, Any], response.json())
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as exc:
            raise self._unreachable(exc) from exc

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a streamed answer. Raises ApiError, also for an error event."""
        try:
            with self._client.stream("POST", path, json=dict(body)) as response:
                if response.status_code != 200:
                    _raise_for(response.status_code, response.read())
                for line in response.iter_lines():
                    if line == "data: [DONE]":
                        return
                    if line.startswith("data: "):
                        yield _event(line.removeprefix("data: "))
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as exc:
            raise self._unreachable(exc) from exc

    def _unreachable(self, exc: Exception) -> ApiError:
        reason = str(exc) or type(exc).__name__
        return ApiError(f"no answer from {self._url}: {reason}; is `tandem serve` running there?")


def _event(text: str) -> dict[str, Any]:
    event = cast(dict[str, Any], json.loads(text))
    if "error" in event:
        raise ApiError(_message(event))
    return event


def _raise_for(status: int, content: bytes) -> None:
    if status == 200:
        return
    try:
        message = _message(json.loads(content))
    except (ValueError, TypeError, KeyError):
        message = content[:200].decode("utf-8", "replace")
    raise ApiError(f"HTTP {status}: {message}")


def _message(body: dict[str, Any]) -> str:
    return str(body["error"]["message"])
