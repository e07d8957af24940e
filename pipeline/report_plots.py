"""Curves of a run as SVG that stands inside a page and takes its colours from it, so that dark and light both work.

Knows nothing of runs or files: named series in, text out, the same text for the same series.
"""

import io
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.report_records import Series

_MAX_POINTS = 300
_STEPS = [1, 2, 5, 10]
_WIDTH, _HEIGHT = 4.6, 2.35  # inches of 100 px
# Drawn in colours that no other thing has, which then become the page's variables.
_TOKENS = {
    "#010101": "var(--ink)",
    "#010102": "var(--faint)",
    "#010103": "var(--rule)",
    "#010111": "var(--series-1)",
    "#010112": "var(--series-2)",
    "#010113": "var(--series-3)",
    "#010114": "var(--series-4)",
}
_INK, _FAINT, _RULE, *_SERIES = _TOKENS


class Curve(NamedTuple):
    """A named series in a chart."""

    label: str
    series: Series


class Level(NamedTuple):
    """A horizontal line that says what a value would mean."""

    label: str
    value: float


def downsample(series: Series, limit: int = _MAX_POINTS) -> tuple[Series, npt.NDArray, npt.NDArray]:
    """At most `limit` points: means of equal runs of points, with the least and largest value of each.

    Values that are not finite are left out of their run; a run of nothing else is a gap.
    """
    if len(series.steps) <= limit:
        return series, series.values, series.values
    parts = np.array_split(np.arange(len(series.steps)), limit)
    columns = []
    for part in parts:
        values = series.values[part]
        values = values[np.isfinite(values)]
        summary = (values.mean(), values.min(), values.max()) if len(values) else (np.nan,) * 3
        columns.append((series.steps[part].mean(), *summary))
    steps, means, lows, highs = np.array(columns).T
    return Series(steps, means), lows, highs


def chart(curves: Sequence[Curve], *, levels: Sequence[Level] = (), percent: bool = False) -> str:
    """An SVG of curves over steps, with a band from least to largest where points were merged."""
    # Half a second that only reports need.
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": "dinoray",
        "font.size": 8,
        "text.color": _INK,
        "text.parse_math": False,
        "axes.formatter.useoffset": False,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(_WIDTH, _HEIGHT), dpi=100, layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        for curve, colour in zip(curves, _SERIES, strict=False):
            series, lows, highs = downsample(curve.series)
            if len(curve.series.steps) > len(series.steps):
                axes.fill_between(series.steps, lows, highs, color=colour, alpha=0.22, linewidth=0)
            few = len(series.steps) <= 40
            axes.plot(
                series.steps,
                series.values,
                color=colour,
                linewidth=1.5,
                marker="o" if few else None,
                markersize=3,
                label=curve.label,
            )
        for level in levels:
            axes.axhline(level.value, color=_FAINT, linewidth=1, linestyle=(0, (4, 3)), label=level.label)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(_RULE)
        axes.tick_params(colors=_FAINT, length=3)
        axes.grid(axis="y", color=_RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=_STEPS))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        axes.margins(x=0.01, y=0.08)
        if len(curves) + len(levels) > 1:
            axes.legend(frameon=False, fontsize=8, labelcolor=_INK, handlelength=1.4, loc="best")
        file = io.StringIO()
        figure.savefig(file, format="svg")
    return _themed(file.getvalue())


def _themed(svg: str) -> str:
    """The <svg> element alone, undated, in the page's colours, as wide as its place."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg [^>]*?)width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?)height="[^"]*"', r"\1", svg, count=1)
    for token, variable in _TOKENS.items():
        svg = svg.replace(token, variable)
    return svg.strip()
