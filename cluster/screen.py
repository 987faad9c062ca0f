"""What `tandem serve` shows: a bar per loading worker on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from tandem.cluster.controller import ClusterView, WorkerView


class Screen:
    """Use as a context; inside it the bars live. Lines may come from any thread."""

    def __init__(self, console: Console | None = None, quiet: tuple[str, ...] = ()) -> None:
        self._console = console or Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._live = self._console.is_terminal
        self._started = time.monotonic()
        self._bars: dict[str, TaskID] = {}
        self._seen: dict[str, tuple[str, int]] = {}  # per worker: phase, failures
        self._seen.update((name, ("ready", 0)) for name in quiet)  # no news
        columns = (TextColumn("{task.description:<12}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
        self._progress = Progress(
            *columns, console=self._console, transient=True, disable=not self._live, refresh_per_second=4
        )

    def __enter__(self) -> Screen:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._progress.stop()

    def line(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def step(self, text: str) -> None:
        """A line with the seconds since the start."""
        self.line(f"[{time.monotonic() - self._started:5.1f} s] {text}")

    def update(self, view: ClusterView) -> None:
        """Say what changed since the last view."""
        for worker in view.workers:
            self._bar(worker)
            now = (worker.phase, worker.failures)
            before = self._seen.get(worker.name)
            if now != before:
                self._seen[worker.name] = now
                self._announce(worker, before)
        for name in self._seen.keys() - {worker.name for worker in view.workers}:
            del self._seen[name]
            self._remove_bar(name)
            self.step(f"{name}: gone")

    def ready(self, url: str, model: str, chat: bool, keyed: bool, dashboard_url: str) -> None:
        self.line("")
        self.step(f"Tandem serves {model} at {url}")
        self.line("")
        self.line(f"  {curl(url, model, chat, keyed)}")
        self.line("")
        self.line(f"  tandem chat --url {url}     tandem status --url {url}     Ctrl-C ends it")
        if dashboard_url:
            self.line(f"  Ray dashboard: {dashboard_url}   (token: ray get-auth-token)")
        self.line("")

    def _bar(self, worker: WorkerView) -> None:
        if worker.phase != "loading":
            self._remove_bar(worker.name)
            return
        if worker.name not in self._bars:
            self._bars[worker.name] = self._progress.add_task(worker.name, total=None)
        total = worker.report.total or None
        self._progress.update(self._bars[worker.name], completed=worker.report.loaded, total=total)

    def _remove_bar(self, name: str) -> None:
        task = self._bars.pop(name, None)
        if task is not None:
            self._progress.remove_task(task)

    def _announce(self, worker: WorkerView, before: tuple[str, int] | None) -> None:
        if worker.phase == "ready" and (before is None or before[0] != "ready"):
            self.step(f"{worker.name}: ready, pid {worker.report.pid}: {facts(worker)}")
        elif worker.phase == "backoff" or (before is not None and worker.failures > before[1]):
            self.step(f"{worker.name}: {worker.detail}; starting it again")
        elif worker.phase == "draining":
            self.step(f"{worker.name}: draining")
        elif worker.phase == "loading" and before is None:
            self.step(f"{worker.name}: starting")


def facts(worker: WorkerView) -> str:
    """KV blocks and tokens, and what was chosen and why."""
    known = dict(worker.report.facts)
    blocks, tokens = known.pop("kv_blocks", ""), known.pop("kv_tokens", "")
    size = [f"{int(blocks):,} KV blocks, {int(tokens):,} tokens"] if blocks.isdecimal() and tokens.isdecimal() else []
    return "; ".join([*size, *(f"{key.replace('_', ' ')} {value}" for key, value in known.items())])


def curl(url: str, model: str, chat: bool, keyed: bool) -> str:
    """One line that works when pasted into a shell."""
    body: dict[str, object] = {"model": model}
    body |= {"messages": [{"role": "user", "content": "What is Tandem?"}]} if chat else {"prompt": "Tandem is"}
    path = "chat/completions" if chat else "completions"
    key = ' -H "Authorization: Bearer $TANDEM_API_KEY"' if keyed else ""
    text = json.dumps(body).replace("'", "'\\''")
    return f"curl {url}/v1/{path} -H 'Content-Type: application/json'{key} -d '{text}'"
