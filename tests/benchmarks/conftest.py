"""Benchmarks are scripts: each imports the others by the bare names of their files."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
