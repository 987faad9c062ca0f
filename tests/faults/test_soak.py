"""The soak itself (E53), for some seconds; and that it sees what grows."""

from __future__ import annotations

import random
import re
import subprocess
import sys

import numpy as np
import pytest

from tests.faults.process_cluster import ROOT, ROUTER
from tests.faults.soak import WORKERS, Sample, growth, schedule, slope

SEED = 53


def series(minutes: int, rss_an_hour: float = 0.0, fds_an_hour: float = 0.0) -> list[Sample]:
    """A noisy life, a sample every two seconds, behind a steep beginning."""
    rng = random.Random(SEED)
    hours = [second / 3600 for second in range(0, minutes * 60, 2)]
    return [
        Sample(h, 200 + min(h, 0.05) * 400 + rss_an_hour * h + rng.gauss(0, 0.2), 30 + fds_an_hour * h, 8)
        for h in hours
    ]


def test_the_slope_is_that_of_least_squares_over_the_second_half() -> None:
    samples = series(60, rss_an_hour=3.0)
    late = np.array(samples[len(samples) // 2 :])
    assert slope(samples, "rss") == pytest.approx(np.polyfit(late[:, 0], late[:, 1], 1)[0])
    assert slope(samples, "rss") == pytest.approx(3.0, abs=0.3)
    assert slope(samples, "threads") == 0.0


def test_growth_is_seen_and_its_absence_too() -> None:
    assert not growth(ROUTER, series(60, rss_an_hour=0.5, fds_an_hour=8), True)
    assert "rss" in growth(ROUTER, series(60, rss_an_hour=1.5), True)[0]
    assert not growth(ROUTER, series(30, rss_an_hour=1.5), False)
    assert "fds" in growth("decode-0", series(60, fds_an_hour=20), False)[0]


def test_a_seed_names_the_faults_and_in_the_end_nobody_dies() -> None:
    faults = schedule(SEED, 400)
    assert faults == schedule(SEED, 400) != schedule(SEED + 1, 400)
    assert {fault.target for fault in faults if fault.fatal} == {ROUTER, *WORKERS, "prefill", "decode"}
    assert not any("lost" in fault.allowed for fault in faults[100:])
    assert not any(fault.fatal and fault.target != ROUTER for fault in faults[300:])


@pytest.mark.faults
def test_a_short_soak() -> None:
    command = [sys.executable, "tests/faults/soak.py", "--minutes", "0.1", "--every", "2", "--seed", str(SEED)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"^\d\d:\d\d:\d\d .*: served \d+, ready after \d+\.\d s$", done.stdout, re.MULTILINE)) == 3
    names = re.findall(r"^(\S+) \d+ \d+\.\d -(?: \d+){6}$", done.stdout, re.MULTILINE)
    assert names == sorted([ROUTER, *WORKERS])
    assert done.stdout.endswith("\n0 violations\n")
