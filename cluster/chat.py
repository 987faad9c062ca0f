"""`tandem chat`: a conversation in the terminal, streamed."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from tandem.cluster.api_client import ApiClient, ApiError

# What a model writes must not drive the terminal: C0 and C1 control characters become visible.
_VISIBLE = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}

_HELP = "Ctrl-C interrupts an answer, Ctrl-D leaves, /clear forgets the conversation."


@dataclass(frozen=True, slots=True)
class ChatOptions:
    model: str | None = None
    system: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None


class Chat:
    def __init__(self, url: str, api_key: str | None, options: ChatOptions) -> None:
        self._client = ApiClient(url, api_key)
        self._options = options
        self._history: list[dict[str, str]] = []
        self._model = options.model or ""

    def run(self) -> None:
        """Until the end of input. Raises ApiError when the server is not there."""
        self._model = self._model or str(self._client.get("/v1/models")["data"][0]["id"])
        _write(f"{self._model}. {_HELP}\n")
        self._clear()
        while (text := _read()) is not None:
            if text == "/clear":
                self._clear()
            elif text:
                self._turn(text)

    def _clear(self) -> None:
        system = self._options.system
        self._history = [{"role": "system", "content": system}] if system else []

    def _turn(self, text: str) -> None:
        """One question and its answer; an interrupted answer stays in the history as far as it came."""
        self._history.append({"role": "user", "content": text})
        answer = ""
        try:
            for piece in self._answer():
                answer += piece
                _write(piece.translate(_VISIBLE))
        except KeyboardInterrupt:
            _write(" [interrupted]")
        except ApiError as exc:
            _write(f"[{exc.message}]".translate(_VISIBLE))
        _write("\n")
        if answer:
            self._history.append({"role": "assistant", "content": answer})
        else:
            self._history.pop()

    def _answer(self) -> Any:
        body: dict[str, Any] = {"model": self._model, "messages": self._history, "stream": True}
        for name in ("max_tokens", "temperature"):
            if (value := getattr(self._options, name)) is not None:
                body[name] = value
        for event in self._client.stream("/v1/chat/completions", body):
            for choice in event.get("choices", []):
                yield choice.get("delta", {}).get("content") or ""


def _read() -> str | None:
    """A line without surrounding blanks; None at the end of input. Ctrl-C gives up the line."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        _write("\n")
        return ""


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
