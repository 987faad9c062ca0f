"""The picture of a curve: TTFT and ITL against the load, and against the throughput that came of it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tandem.cluster.bench.report import Spread, comparison
from tandem.cluster.bench.run import Results
from tandem.common.errors import ConfigError

_STYLES = {"p50": "-", "p99": "--"}
_THROUGHPUT = "output tokens/s"


def require() -> None:
    """Raises ConfigError without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib, which is not installed: pip install 'tandem[bench]'")


def draw(results: Results, path: Path) -> None:
    """A PNG or SVG, by the name's end. Points are medians over the rounds, bars reach from the least to the most."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(11, 8), layout="constrained")
    panels = figure.subplots(2, 2)
    labels = list(dict.fromkeys(run.point for run in results.runs))
    loads = _positions(labels)
    rows = {(row.part, row.measure, row.point): row for row in comparison(results)}
    curves = [(server.name, part) for server in results.servers for part in results.runs[0].parts]
    for color, (server, part) in enumerate(curves):

        def series(measure: str, server: str = server, part: str = part) -> list[Spread | None]:
            return [rows[part, measure, label].values[server] for label in labels]

        throughputs = [at and at.median for at in series(_THROUGHPUT)]
        for column, latency in enumerate(("TTFT", "ITL")):
            for stat, style in _STYLES.items():
                name = f"{server}{'' if part == 'all' else f', {part}'}, {stat}"
                for panel, across in ((panels[0][column], loads), (panels[1][column], throughputs)):
                    line = {"color": f"C{color}", "linestyle": style, "label": name}
                    _line(panel, across, series(f"{latency} {stat} ms"), line)
    for column, latency in enumerate(("TTFT", "ITL")):
        for row, label in enumerate(((results.options.sweep or "load").partition("=")[0], _THROUGHPUT)):
            panels[row][column].set(xlabel=label, ylabel=f"{latency}, ms", ylim=(0, None))
            panels[row][column].grid(alpha=0.3)
        panels[0][column].set_xticks(loads, labels)
    if panels[0][0].has_data():
        panels[0][0].legend()
    figure.suptitle(f"{results.options.workload.value}: medians of {results.options.rounds} rounds, bars: min to max")
    figure.savefig(path)


def _line(panel: Any, across: Sequence[float | None], up: Sequence[Spread | None], line: dict[str, str]) -> None:
    known = [(x, y) for x, y in zip(across, up, strict=True) if x is not None and y is not None]
    if known:
        bars = [y.median - y.min for _, y in known], [y.max - y.median for _, y in known]
        panel.errorbar([x for x, _ in known], [y.median for _, y in known], bars, marker="o", capsize=3, **line)


def _positions(labels: Sequence[str]) -> list[float]:
    """Where the points stand: at their load, or side by side where it is no number."""
    try:
        return [float(label) for label in labels]
    except ValueError:
        return [float(index) for index in range(len(labels))]
