"""Two ranks compute and store what one does, exchange blocks with it, and never outlive their parent."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from tandem.common.errors import WorkerFailed
from tandem.engine import group, parallel
from tandem.engine.batch import Scheduled
from tandem.engine.engine import Engine
from tests.engine.model_zoo import Greedy, build, engine_config, generate, sequence, tokens

PROMPTS = [tokens(length, 40 + length) for length in (1, 8, 30, 61)]
COUNT = 10
DEADLINE = 30.0  # seconds
PARENT = """
import json, os, sys
from tandem.engine.config import EngineConfig
from tandem.engine.engine import Engine
engine = Engine.load(EngineConfig(**json.loads(sys.argv[1])))
tasks = f"/proc/{os.getpid()}/task"
print(*(open(f"{tasks}/{task}/children").read() for task in os.listdir(tasks)), flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    build("llama-biases-tied", path)  # biases are added once, and the odd vocabulary splits unevenly
    return path


@pytest.fixture(scope="module")
def one(directory: Path) -> Engine:
    return Engine.load(engine_config(directory))


@pytest.fixture(scope="module")
def two(directory: Path) -> Iterator[Engine]:
    threads, before = torch.get_num_threads(), _children()
    engine = Engine.load(engine_config(directory, tensor_parallel_size=2))
    assert len(_children()) == len(before) + 1
    yield engine
    engine.close()
    assert _children() == before
    engine.close()
    torch.set_num_threads(threads)


def test_two_ranks_write_what_one_writes(one: Engine, two: Engine) -> None:
    assert generate(two, PROMPTS, COUNT) == generate(one, PROMPTS, COUNT)
    assert two.layout == one.layout
    assert two.num_blocks == 2 * one.num_blocks  # each rank has the budget, and half of the heads


def test_blocks_of_two_ranks_are_whole(one: Engine, two: Engine) -> None:
    engines, read = (one, two), []
    for engine in engines:
        made = Greedy(engine).add(PROMPTS[2], 1)
        engine.forward([Scheduled(made, len(PROMPTS[2]))])
        read.append(engine.store.read(made.blocks[:3]).view(torch.float32))
    assert (read[0] - read[1]).abs().max() < 1e-4 < read[0].abs().max()


def test_blocks_survive_the_round_trip(one: Engine, two: Engine) -> None:
    generator = torch.Generator().manual_seed(1)
    payload = torch.randint(0, 256, (4, one.layout.block_bytes), dtype=torch.uint8, generator=generator)
    two.store.write([9, 2, 30, 4], payload)
    assert torch.equal(two.store.read([9, 2, 30, 4]), payload)
    assert torch.equal(two.store.read([4, 9]), payload[[3, 0]])
    two.store.copy(30, 11)
    assert torch.equal(two.store.read([11]), payload[2:3])
    layers = payload[:, two.layout.layer_bytes :]  # of the second layer on
    two.store.write([50, 51, 52, 53], layers, first_layer=1, num_layers=two.layout.layers - 1)
    assert torch.equal(two.store.read([50, 51, 52, 53])[:, two.layout.layer_bytes :], layers)
    assert not two.store.read([50, 51, 52, 53])[:, : two.layout.layer_bytes].any()
    two.store.zero([51, 53])
    assert not two.store.read([51, 53]).any() and two.store.read([50]).any() and two.store.read([52]).any()
    one.store.write([5, 6, 7, 8], two.store.read([9, 2, 30, 4]))
    assert torch.equal(one.store.read([5, 6, 7, 8]), payload)


def test_two_ranks_have_no_memory_in_one_piece(two: Engine) -> None:
    calls = list[tuple[int, int]]()
    item = sequence(tokens(5, 2), [70])
    assert two.forward([Scheduled(item, 5)], lambda *layers: calls.append(layers))
    assert calls == [] and two.store.memory is None and two.store.fd is None


def test_a_poisoned_prompt_on_two_ranks(two: Engine) -> None:
    item = sequence(tokens(30, 2), [71, 72, 73, 74])
    item.computed = 8
    two.store.write([71], torch.full((1, two.layout.block_bytes), 0xFF, dtype=torch.uint8))
    (failed,) = two.forward([Scheduled(item, 8)])
    assert failed.error
    two.store.zero(item.blocks)


@pytest.mark.parametrize("one_prefills", [True, False])
def test_prefill_and_decode_may_differ_in_degree(one: Engine, two: Engine, one_prefills: bool) -> None:
    source, target = (one, two) if one_prefills else (two, one)
    prompt = PROMPTS[3]
    prefill, decode = Greedy(source), Greedy(target, next_block=40)
    here = prefill.add(prompt, 1)
    prefill.run()
    target.store.write(list(range(30, 38)), source.store.read(here.blocks[:8]))
    there = decode.add(prompt + here.output_ids, COUNT - 1, list(range(30, 38)), computed=len(prompt))
    decode.run()
    assert [here.output_ids + there.output_ids] == generate(one, [prompt], COUNT)


def test_a_dead_rank_is_an_error_not_a_hang(directory: Path) -> None:
    engine = Engine.load(engine_config(directory, tensor_parallel_size=2))
    try:
        item = sequence(PROMPTS[0], [0])
        assert engine.forward([Scheduled(item, 1)])
        pid = _children()[-1]
        os.kill(pid, signal.SIGKILL)
        assert _ended(pid)
        with pytest.raises(WorkerFailed, match="tensor-parallel rank 1"):
            engine.forward([Scheduled(item, 1)])
        with pytest.raises(WorkerFailed):
            engine.store.read([0])
    finally:
        engine.close()


def test_a_stuck_rank_is_an_error_not_a_hang(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "STEP_TIMEOUT", timedelta(seconds=1))
    monkeypatch.setattr(parallel, "STOP_TIMEOUT", 0.1)
    engine = Engine.load(engine_config(directory, tensor_parallel_size=2))
    pid = _children()[-1]
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(WorkerFailed, match="lost its group"):
        engine.forward([Scheduled(sequence(PROMPTS[0], [0]), 1)])
    engine.close()
    assert _ended(pid)


def test_a_step_that_fails_half_way_breaks_the_group(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 waits for rank 0 in a collective: it must not take the next step's for that one."""
    engine = Engine.load(engine_config(directory, tensor_parallel_size=2))
    item = Scheduled(sequence(PROMPTS[0], [0]), 1)
    with monkeypatch.context() as patch:
        patch.setattr(group.Group, "all_reduce", _out_of_memory)
        with pytest.raises(WorkerFailed, match="out of memory"):
            engine.forward([item])
    with pytest.raises(WorkerFailed, match="out of memory"):
        engine.forward([item])
    engine.close()


def _out_of_memory(group: group.Group, values: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("out of memory")


def test_ranks_die_with_their_parent(directory: Path) -> None:
    config = json.dumps(asdict(engine_config(directory, tensor_parallel_size=2)))
    command = [sys.executable, "-c", PARENT, config]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline().split()[0])
        descriptor = os.pidfd_open(child)
        parent.kill()
    assert select.select([descriptor], [], [], DEADLINE)[0]
    os.close(descriptor)


def _children() -> list[int]:
    tasks = Path(f"/proc/{os.getpid()}/task")
    return sorted(int(pid) for task in tasks.iterdir() for pid in (task / "children").read_text().split())


def _ended(pid: int) -> bool:
    """Whether the process ends in time; it may have been reaped already."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], DEADLINE)[0])
    finally:
        os.close(descriptor)
