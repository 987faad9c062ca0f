"""Pictures of how cost grows: what was measured, with bars from the least to the most, and the line that was expected.

The same figures make the same file, byte for byte, and the text of an SVG stays text, which keeps it small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.cluster.bench.report import Spread

WIDTH = 7.3  # inches: 525 points, to be read at 700 pixels
ROOM = 0.35  # of a panel's height, above the points, for the legend
PARAMETERS: Any = {"svg.hashsalt": "tandem", "svg.fonttype": "none", "font.size": 9, "legend.fontsize": 8}


@dataclass(frozen=True, slots=True)
class Curve:
    label: str
    x: Sequence[float]
    measured: Sequence[Spread]
    expected: Sequence[float]
    expectation: str = ""  # what the line is; of several curves, one may say it for all


@dataclass(frozen=True, slots=True)
class Panel:
    x_label: str  # with units, as y_label
    y_label: str
    curves: Sequence[Curve]
    log_y: bool = True  # otherwise from zero up; the other axis is logarithmic always


def draw(panels: Sequence[Panel], title: str, path: Path) -> None:
    """A PNG, SVG or PDF, by the name's end: two panels a row."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(PARAMETERS):
        columns = min(2, len(panels))
        rows = -(-len(panels) // columns)
        figure: Any = Figure(figsize=(WIDTH, 3.6 * rows + 0.4), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axis, panel in zip(axes, panels, strict=False):
            _panel(axis, panel)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        figure.suptitle(title, fontsize=9)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _panel(axis: Any, panel: Panel) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    legend: list[Any] = []
    for index, curve in enumerate(panel.curves):
        medians = [spread.median for spread in curve.measured]
        below = [spread.median - spread.min for spread in curve.measured]
        above = [spread.max - spread.median for spread in curve.measured]
        color = f"C{index}"
        bars = axis.errorbar(curve.x, medians, [below, above], fmt="o", ms=4, color=color, label=curve.label)
        legend += [bars, *axis.plot(curve.x, curve.expected, "--", lw=1, color=color, label=curve.expectation)]
    ticks = sorted({x for curve in panel.curves for x in curve.x})
    axis.set(xlabel=panel.x_label, ylabel=panel.y_label, xscale="log")
    axis.set_xticks(ticks, [_short(tick) for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.grid(alpha=0.3)
    axis.tick_params(length=0)  # the grid says it
    if panel.log_y:
        axis.set(yscale="log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_locator(NullLocator())
        least, most = axis.get_ylim()
        axis.set_ylim(least, most * (most / least) ** ROOM)  # a third of the decades more
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    else:
        axis.set(ylim=(0, (1 + ROOM) * max(spread.max for curve in panel.curves for spread in curve.measured)))
    axis.legend(handles=[handle for handle in legend if not handle.get_label().startswith("_")], loc="best")


def _short(count: float) -> str:
    """1024 as "1k"."""
    return f"{count / 1024:g}k" if count >= 1024 and count % 1024 == 0 else f"{count:g}"
