"""What people see: chat and status against a small HTTP server, and the lines of `tandem serve`."""

from __future__ import annotations

import io
import json
import shlex
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from rich.console import Console

from tandem.cluster.api_client import ApiError
from tandem.cluster.chat import Chat, ChatOptions
from tandem.cluster.controller import ClusterView, SlotPhase, WorkerView
from tandem.cluster.screen import Screen, curl
from tandem.cluster.status import show
from tandem.common.hosted import Report

KV = {"total": 100, "free": 60, "cached": 15, "owned": 25, "reserved": 0, "quarantined": 0}
WORKER = {
    "name": "decode-0", "role": "decode", "state": "ready", "pid": 42, "incarnation": "f00d", "running": 3,
    "waiting": 1, "waiting_tokens": 9, "kv": KV,
}  # fmt: skip
STATUS = {"model": "tiny", "cluster": "default", "registry": "up", "max_model_len": 99, "workers": [WORKER]}


@dataclass
class FakeApi:
    """Answers GET from `pages`, POST with the lines of `streams` in turn; keeps what it was sent."""

    pages: dict[str, dict[str, Any]]
    streams: list[list[str]] = field(default_factory=list[list[str]])
    bodies: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    keys: list[str | None] = field(default_factory=list[str | None])
    url: str = ""


@pytest.fixture
def api() -> Iterator[FakeApi]:
    fake = FakeApi({"/status": STATUS, "/v1/models": {"data": [{"id": "tiny"}]}})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            fake.keys.append(self.headers["Authorization"])
            page = fake.pages.get(self.path)
            self._send(200 if page else 401, json.dumps(page or {"error": {"message": "wrong key"}}))

        def do_POST(self) -> None:
            fake.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self._send(200, "".join(f"{line}\n\n" for line in fake.streams.pop(0)))

        def _send(self, code: int, text: str) -> None:
            self.send_response(code)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        fake.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield fake
        server.shutdown()


def chunk(text: str) -> str:
    return "data: " + json.dumps({"choices": [{"delta": {"content": text}}]})


def talk(api: FakeApi, monkeypatch: pytest.MonkeyPatch, *typed: str, options: ChatOptions | None = None) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in typed)))
    Chat(api.url, None, options or ChatOptions()).run()


def test_status_as_json_is_what_the_router_said(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    show(api.url, "a-key", as_json=True)
    assert json.loads(capsys.readouterr().out) == STATUS
    assert api.keys == ["Bearer a-key"]


def test_status_as_a_table(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    show(api.url, None, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["decode-0", "decode", "ready", "42", "3", "1", "25%", "15%", "100", "f00d"]
    assert "tiny: 1 decode; registry up" in lines


def test_status_tells_why_it_was_refused(api: FakeApi) -> None:
    del api.pages["/status"]
    with pytest.raises(ApiError, match="401: wrong key"):
        show(api.url, None, as_json=False)


def test_chat_streams_and_remembers(
    api: FakeApi, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    api.streams = [[": keep-alive", chunk("Hel"), chunk("lo"), "data: [DONE]"], [chunk("Bye"), "data: [DONE]"]]
    talk(api, monkeypatch, "Hi", "", "And?", options=ChatOptions(system="Be kind.", max_tokens=7, temperature=0.0))
    assert capsys.readouterr().out.splitlines()[1:] == ["Hello", "Bye"]
    assert api.bodies[1] == {
        "model": "tiny",
        "stream": True,
        "max_tokens": 7,
        "temperature": 0.0,
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "And?"},
        ],
    }


def test_chat_forgets_when_told(api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    api.streams = [[chunk("one"), "data: [DONE]"], [chunk("two"), "data: [DONE]"]]
    talk(api, monkeypatch, "Hi", "/clear", "Again")
    assert api.bodies[1]["messages"] == [{"role": "user", "content": "Again"}]


def test_chat_shows_an_error_event_and_goes_on(
    api: FakeApi, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = "data: " + json.dumps({"error": {"message": "the worker died", "code": "worker_failed"}})
    api.streams = [[error, "data: [DONE]"], [chunk("fine"), "data: [DONE]"]]
    talk(api, monkeypatch, "Hi", "Again")
    assert capsys.readouterr().out.splitlines()[1:] == ["[the worker died]", "fine"]
    assert api.bodies[1]["messages"] == [{"role": "user", "content": "Again"}], "an unanswered question is dropped"


def test_a_model_cannot_drive_the_terminal(
    api: FakeApi, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    api.streams = [[chunk("\x1b]0;owned\x07\n\tok"), "data: [DONE]"]]
    talk(api, monkeypatch, "Hi")
    assert "\\x1b]0;owned\\x07\n\tok" in capsys.readouterr().out


def view(phase: SlotPhase, failures: int = 0, detail: str = "") -> ClusterView:
    facts = (("kv_blocks", "2441"), ("kv_tokens", "39056"), ("attention", "cpu (the model is on the CPU)"))
    report = Report("ready", pid=42, incarnation="f00d", loaded=5, total=10, facts=facts)
    return ClusterView({"decode": 1}, (WorkerView("decode-0", "decode", phase, report, failures, detail),))


def screened(*views: ClusterView) -> str:
    text = io.StringIO()
    with Screen(Console(file=text, width=40, soft_wrap=True)) as screen:
        for item in views:
            screen.update(item)
    return text.getvalue()


def test_each_change_of_a_worker_is_one_plain_line() -> None:
    loading, ready = view("loading"), view("ready")
    died = view("loading", failures=1, detail="its process died")
    gone = ClusterView({"decode": 0}, ())
    lines = screened(loading, loading, ready, ready, died, view("ready", 1), view("draining", 1), gone).splitlines()
    assert [line.partition("] ")[2] for line in lines] == [
        "decode-0: starting",
        "decode-0: ready, pid 42: 2,441 KV blocks, 39,056 tokens; attention cpu (the model is on the CPU)",
        "decode-0: its process died; starting it again",
        "decode-0: ready, pid 42: 2,441 KV blocks, 39,056 tokens; attention cpu (the model is on the CPU)",
        "decode-0: draining",
        "decode-0: gone",
    ]


@pytest.mark.parametrize("chat", [True, False])
def test_the_curl_line_survives_a_shell(chat: bool) -> None:
    words = shlex.split(curl("http://127.0.0.1:8000", 'it\'s "quoted" $HOME', chat, keyed=True))
    assert words[0] == "curl"
    assert words[1] == f"http://127.0.0.1:8000/v1/{'chat/completions' if chat else 'completions'}"
    body = json.loads(words[words.index("-d") + 1])
    assert body["model"] == 'it\'s "quoted" $HOME'
    assert ("messages" in body, "prompt" in body) == (chat, not chat)
    assert "Authorization: Bearer $TANDEM_API_KEY" in words
