"""Looking into the workers of a LocalCluster, which are threads of the test, and hurting them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

DEMO_MODEL = Path(__file__).parents[2] / "engine" / "demo_model"

T = TypeVar("T")


def worker_of(server: Any) -> Any:
    """The PrefillWorker or DecodeWorker inside a server."""
    return server._shell._worker


def pace(server: Any, seconds: float) -> None:
    """Every step of the engine takes at least so long."""
    engine = worker_of(server)._engine
    forward = type(engine).forward

    def paced(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)  # stands for a larger model
        return forward(engine, *args, **kwargs)

    engine.forward = paced


def cut(server: Any) -> None:
    """As the death of its process looks from outside: its connections break, nothing more is answered."""
    shell = server._shell
    asyncio.run_coroutine_threadsafe(shell._server.stop(None), shell._loop).result(10)


def on_thread(server: Any, action: Callable[[], T]) -> T:
    """Runs `action` on the worker's thread, which alone may touch blocks and sequences."""
    done, results = threading.Event(), list[T]()

    def run() -> None:
        results.append(action())
        done.set()

    worker_of(server).inbox.put(run)
    assert done.wait(10), "the worker's thread does not take commands"
    return results[0]
