"""The connector benchmark: its arithmetic, and that it moves bytes between two processes."""

from __future__ import annotations

import pytest
import torch

from benchmarks.transfer import Seconds, line, measure, summarize


def test_rates_are_medians_and_ratios_are_of_one_round_each() -> None:
    """The machine slows down in the second and third round: the medians of the rates follow, the ratios do not."""
    rounds = [Seconds(copy=(1.0, 0.5), link=(2.0, 1.0), raw=(1.0, 0.25))] * 2
    rounds += [Seconds(copy=(4.0, 0.5), link=(8.0, 1.0), raw=(4.0, 0.25))] * 3
    row = summarize("small", 1, "shm", 8_000_000_000, rounds)
    assert (row.copy, row.link, row.raw) == (2.0, 1.0, 2.0)
    assert (row.link_to_copy, row.raw_to_copy) == (0.5, 1.0)
    assert (row.link_to_copy_cpu, row.raw_to_copy_cpu) == (0.5, 2.0)
    assert line(row).startswith("| small | 1 | shm | 2.00 | 1.00 | 0.50 |")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("connector", ["shm", "tcp"])
def test_a_small_run_between_two_processes(connector: str) -> None:
    (row,) = measure(connector, "small", [1], rounds=2, device=torch.device("cpu"))
    assert len(row.rounds) == 2
    assert min(row.copy, row.link, row.raw, row.link_to_copy_cpu) > 0
