"""CUDA graphs of decode steps: the hundreds of launches of a step become one.

    key = (sequences, blocks of the longest), both rounded up: 1, 2, 4, 8, 16, 24, 32, … and powers of two
        first time    the step runs as ever, which compiles its kernels, and is captured: 0.1 to 0.3 s, once
        from then on  inputs ── one copy ──► the graph's own int64 tensor;  replay ──► first rows of `_outputs`

A graph's launches are fixed, so they must reach as far as anything with its key: attention is launched for the longest
context, and programs beyond a sequence's end stop at once. Hence a graph for each power of two: at most half of these
programs are idle, where one graph for the longest context of all would launch thousands for nothing. Tokens do not
depend on the key's second part, as attention always adds up the same runs of positions.

All graphs share one pool of memory: one runs at a time, and what counts is copied out of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tandem.engine.models.transformer import StepOutput

logger = logging.getLogger(__name__)

Run = Callable[[], None]
Step = Callable[[Tensor], StepOutput]


class Key(NamedTuple):
    size: int  # sequences
    width: int  # blocks of each


def padded_size(sequences: int) -> int:
    """1, 2, 4, 8, then multiples of 8."""
    return power_of_two(sequences) if sequences <= 8 else -(-sequences // 8) * 8


def power_of_two(number: int) -> int:
    """The least that is not below `number`."""
    return 1 << (number - 1).bit_length()


@dataclass(frozen=True, slots=True)
class Graph:
    inputs: Tensor  # (n,) int64 on the device
    replay: Run


class Graphs:
    """For one thread. Apart from capturing, never waits for the device."""

    def __init__(self, device: torch.device, max_sequences: int, capture: Callable[[Run], Run] | None = None) -> None:
        """`capture` makes a function that repeats what its argument launches; tests have their own."""
        self._device, self._max_sequences = device, max_sequences
        self._capture = capture or CudaCapture(device)
        self._graphs: dict[Key, Graph] = {}
        self._outputs: StepOutput | None = None  # of the largest batch

    def cover(self, sequences: int) -> bool:
        """Whether decode steps of so many sequences may be run here."""
        return sequences <= self._max_sequences

    def run(self, key: Key, host: Tensor, step: Step) -> StepOutput:
        """`step` of `host` (n,) int64, whose n the key determines. The output has key.size rows and is
        valid until the next run."""
        graph = self._graphs.get(key)
        if graph is None:
            return self._first(key, host, step)
        graph.inputs.copy_(host.pin_memory() if self._device.type == "cuda" else host, non_blocking=True)
        graph.replay()
        return _rows(self._room(), key.size)

    def _first(self, key: Key, host: Tensor, step: Step) -> StepOutput:
        """The step as ever, and then its graph, if it can be captured."""
        inputs = host.to(self._device)
        output = step(inputs)
        self._outputs = self._outputs or _larger(output, padded_size(self._max_sequences))
        room = _rows(self._outputs, key.size)

        def run() -> None:
            repeated = step(inputs)
            room.logits.copy_(repeated.logits)
            room.finite.copy_(repeated.finite)

        try:
            self._graphs[key] = Graph(inputs, self._capture(run))
        except RuntimeError as exc:  # out of memory is one, too
            reason = str(exc).splitlines()[0]
            logger.warning("Capturing a CUDA graph failed, decoding goes on without, more slowly: %s", reason)
            self._max_sequences = 0
            self._graphs.clear()
        return output

    def _room(self) -> StepOutput:
        assert self._outputs is not None, "made before the first graph"
        return self._outputs


class CudaCapture:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None  # of memory; the first graph's

    def __call__(self, run: Run) -> Run:
        """Raises RuntimeError. Other threads, which move blocks, may go on using the device meanwhile."""
        graph = torch.cuda.CUDAGraph()
        mode = "thread_local"
        with torch.cuda.device(self._device), torch.cuda.graph(graph, pool=self._pool, capture_error_mode=mode):
            run()
        self._pool = graph.pool()
        return graph.replay


def _larger(output: StepOutput, rows: int) -> StepOutput:
    """Room for as many rows as a step may have."""
    logits, finite = output.logits, output.finite
    return StepOutput(logits.new_empty(rows, logits.shape[1]), finite.new_empty(rows))


def _rows(output: StepOutput, count: int) -> StepOutput:
    return StepOutput(output.logits[:count], output.finite[:count])
