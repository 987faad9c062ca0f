"""The benchmarks of how cost grows: their arithmetic, their pictures, and that they measure what they say."""

from __future__ import annotations

import os
import re
import socket
import time
from pathlib import Path

import pytest

from benchmarks import block_memory, picture, quantization, router_cpu, step
from benchmarks.server import processor_time, router_listening_on, wakes
from tandem.cluster.bench.report import Spread
from tandem.engine.models.registry import parse_config


def router_points() -> list[router_cpu.Point]:
    """3 ms a request and 0.25 ms a token in the median round, but for one client, whose tokens cost more."""
    return [
        router_cpu.Point(clients, length, 48, [2 * cost, cost, cost / 2], [10.0, 10.0, 20.0], [16.0] * 3)
        for length in (8, 64)
        for clients in (1, 8, 128)
        for cost in [3e-3 + length * (0.25e-3 if clients > 1 else 0.5e-3)]
    ]


def test_a_requests_and_a_tokens_cost_are_told_apart() -> None:
    expected = router_cpu.Expected.of(router_points())
    assert expected.cpu == pytest.approx({8: 5e-3, 64: 19e-3})
    assert (expected.request, expected.token) == pytest.approx((3e-3, 0.25e-3))
    assert str(expected) == "3.00 ms a request and 250 µs an output token"
    point = router_points()[1]
    assert router_cpu.line(point, expected) == "| 8 | 8 | 48 | 5.00 | 2.50 – 10.00 | 625 | 1.00 | 2.00 | 10.0 | 5% |"


def test_answers_of_one_length_have_no_cost_of_a_token() -> None:
    expected = router_cpu.Expected.of([router_cpu.Point(1, 8, 48, [0.005], [1.0])])
    assert (expected.request, expected.token) == (0.005, 0.0)


def test_processor_time_is_the_processs_own() -> None:
    before, ours = processor_time(os.getpid()), time.process_time()
    while time.process_time() < ours + 0.02:
        pass
    assert processor_time(os.getpid()) - before == pytest.approx(time.process_time() - ours, abs=0.01)


def test_a_thread_that_sleeps_is_woken() -> None:
    before = wakes(os.getpid())
    for _ in range(5):
        time.sleep(0.001)
    assert before + 5 <= wakes(os.getpid()) < before + 50


def test_the_router_is_whoever_listens_on_the_port() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        assert router_listening_on(url) is None
        listener.listen()
        assert router_listening_on(url) == os.getpid()


@pytest.mark.timeout(120)
def test_a_block_takes_its_bytes_and_what_is_remembered_of_it() -> None:
    """A hash alone has 65 bytes in Python; the pool keeps it and entries in a dictionary and three lists."""
    size, blocks = block_memory.LAYOUT.block_bytes, 16384
    point = block_memory.measure(blocks, rounds=1)
    each = {part: point.resident(part).median / blocks for part in block_memory.PARTS}
    assert each["cache"] == pytest.approx(size, rel=0.02)
    assert 80 < each["index"] < 400
    assert 130 < each["pool"] < 600


def test_the_slope_is_that_of_the_best_line_through_zero() -> None:
    """What small numbers of blocks hide in memory that was there already hardly counts."""
    points = [
        block_memory.Point(blocks, {"cache": [blocks * 4096], "pool": [blocks * 300 - 9000], "index": [0, 1, 7]})
        for blocks in (1024, 131072)
    ]
    assert block_memory.expected(points, "cache") == 4096
    assert block_memory.expected(points, "pool") == pytest.approx(300, abs=0.1)
    assert block_memory.line(points[0]).startswith("| 1024 | 4.00 (4096; 4096 – 4096) | 0.28 (291; 291 – 291) |")


def block_points() -> list[block_memory.Point]:
    sizes = {"cache": 4096, "pool": 300, "index": 150}
    return [
        block_memory.Point(blocks, {part: [blocks * size, blocks * size * 2] for part, size in sizes.items()})
        for blocks in (1024, 4096)
    ]


def step_points() -> list[step.Point]:
    """All points of the default sweep; a step takes 1 ms a sequence."""
    sweep = step.Sweep([2**n for n in range(7)], [128 << n for n in range(7)], [16 << n for n in range(8)])
    return [step.Point(*point, point[1] * 1e-3, 0.5e-3, 0.1, 0.5e-3, 1e-3, 1e6, 1e9, 0.0) for point in sweep.points()]


def test_a_decode_step_multiplies_with_every_weight_and_sees_all_kv() -> None:
    config = parse_config(step.SMOLLM2, Path("config.json"))
    cost = step.Cost(config, weight_bytes=1000.0, token_bytes=10.0)
    weights = 134_515_008 - 61 * 576  # SmolLM2-135M's parameters, without its norms'
    attention = 4 * 30 * 9 * 64 * 500
    assert cost.operations(1, 500, 1) == 2 * weights + attention
    assert cost.operations(8, 500, 1) == 8 * cost.operations(1, 500, 1)
    assert cost.moved(8, 500) == 1000 + 8 * 500 * 10
    of_one_more = 2 * (30 * (576 * 3 * 64 * 2) + 29 * (576 * 2 * 576 + 3 * 576 * 1536)) + 4 * 29 * 9 * 64 * 499
    assert cost.operations(1, 500, 2) == cost.operations(1, 500, 1) + of_one_more


def test_fewer_bits_are_compared_by_the_fastest_tenth_and_the_median() -> None:
    plain, eight = [float(n) for n in range(20, 40)], [float(n) for n in range(10, 30)]
    row = quantization.Row.of("decode", "int8", eight, plain)
    assert (row.fastest, row.median, row.times) == (12.0, 19.5, 22 / 12)
    assert str(row) == "| decode | int8 | 20 | 12000.0 | 19500.0 | 1.83 | 1.51 |"


def test_the_same_figures_make_the_same_small_picture(tmp_path: Path) -> None:
    for copy in "ab":
        points = router_points()
        router_cpu.plot(points, router_cpu.Expected.of(points), tmp_path / f"router-{copy}.svg")
        block_memory.plot(block_points(), tmp_path / f"blocks-{copy}.svg")
        step.plot(step_points(), tmp_path / f"step-{copy}.svg", "title")
    for name in ("router", "blocks", "step"):
        first, second = ((tmp_path / f"{name}-{copy}.svg").read_bytes() for copy in "ab")
        assert first == second
        assert len(first) < 60_000
    text = (tmp_path / "router-a.svg").read_text()
    for label in (
        "clients at a time",
        "CPU of the router, ms a request",
        "64 output tokens",
        "expected: constant, 19.00",
    ):
        assert label in text
    assert "KV blocks" in (tmp_path / "blocks-a.svg").read_text()
    text = (tmp_path / "step-a.svg").read_text()
    assert text.count(">expected<") == 3 and "context, 8 at once" in text and "_child" not in text


def test_bars_reach_from_the_least_to_the_most(tmp_path: Path) -> None:
    """A bar's ends, read from the picture, stand to the axis as the figures do: 0 at the bottom, 1.35 × 8 on top."""
    path = tmp_path / "bars.svg"
    curve = picture.Curve("measured", [1, 2], [Spread(4, 2, 8)] * 2, [4, 4])
    picture.draw([picture.Panel("x", "y", [curve], log_y=False)], "title", path)
    text = path.read_text()
    assert "expected" not in text

    def heights(group: str) -> list[float]:
        drawn = re.search(rf'<g id="{group}">\s*<path d="([^"]+)"', text)
        assert drawn is not None
        return [float(number) for number in re.findall(r"[ML] [\d.]+ ([\d.]+)", drawn[1])]

    frame, bar = heights("patch_2"), heights("LineCollection_1")
    bottom, top = max(frame), min(frame)
    assert [(bottom - y) / (bottom - top) * 1.35 * 8 for y in sorted(bar)] == pytest.approx([8, 2], abs=0.01)
