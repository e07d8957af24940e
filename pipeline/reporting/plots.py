"""Curves of a run as SVG that stands inside a page and takes its colours from it, so that dark and light both work.

Knows nothing of runs or files: named series in, text out, the same text for the same series.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dinoray.pipeline.figures.palette import TOKENS, Palette, themed
from dinoray.pipeline.tracking.records import Series

_MAX_POINTS = 300
STEPS = [1, 2, 5, 10]
"""Multiples of them make good ticks."""
_LETTERS_PER_INCH, _LETTERS_OF_A_SIGN = 15, 5
"""Of a legend's text, and what a sign beside a label takes."""
_WIDTH, _HEIGHT = 3.6, 2.1  # inches of 100 px: about what a phone shows, so that text keeps its size there
_SERIES = [TOKENS[f"series-{i}"] for i in (1, 2, 3, 4)]


class Curve(NamedTuple):
    """A named series in a chart."""

    label: str
    series: Series


class Level(NamedTuple):
    """A horizontal line that says what a value would mean."""

    label: str
    value: float


class Span(NamedTuple):
    """What charts stand over that is not steps: the same for each, so that they can be read one below the other."""

    begin: float
    end: float
    unit: str


def downsample(series: Series, limit: int = _MAX_POINTS) -> tuple[Series, npt.NDArray, npt.NDArray]:
    """At most `limit` points: means of equal runs of points, with the least and largest value of each.

    Values that are not finite are left out of their run; a run of nothing else is a gap. Breaks stay, and come on top.
    """
    number = len(series.steps)
    if number <= limit:
        return series, series.values, series.values
    breaks = np.flatnonzero(np.isnan(series.steps))
    pieces = np.split(np.arange(number), np.union1d(breaks, breaks + 1))
    parts = [
        part
        for piece in pieces
        for part in np.array_split(piece, max(1, limit * len(piece) // number))
        if len(part)
    ]
    columns = []
    for part in parts:
        values = series.values[part]
        values = values[np.isfinite(values)]
        summary = (values.mean(), values.min(), values.max()) if len(values) else (np.nan,) * 3
        columns.append((series.steps[part].mean(), *summary))
    steps, means, lows, highs = np.array(columns).T
    return Series(steps, means), lows, highs


def chart(
    curves: Sequence[Curve],
    *,
    levels: Sequence[Level] = (),
    percent: bool = False,
    counts: bool = False,
    span: Span | None = None,
) -> str:
    """An SVG of curves over steps, or over `span`, with a band from least to largest where points were merged.

    `counts`: of whole things, which change at once and stay; curves that lie on one another are both seen.
    """
    from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, PercentFormatter

    with sheet(_WIDTH, _HEIGHT) as figure:
        axes = figure.add_subplot()
        for i, (curve, colour) in enumerate(zip(curves, _SERIES, strict=False)):
            given = _changes(curve.series) if counts else curve.series
            series, lows, highs = downsample(given)
            if len(given.steps) > len(series.steps):
                axes.fill_between(series.steps, lows, highs, color=colour, alpha=0.22, linewidth=0)
            few = len(series.steps) <= 40 and not counts
            axes.plot(
                series.steps,
                series.values,
                color=colour,
                linewidth=1.5 + 1.2 * (len(curves) - 1 - i) * counts,
                drawstyle="steps-post" if counts else None,
                marker="o" if few else None,
                markersize=3,
                label=curve.label,
            )
        for level in levels:
            axes.axhline(
                level.value, color=TOKENS["faint"], linewidth=1, linestyle=(0, (4, 3)), label=level.label
            )
        dress(axes)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=span is None, steps=STEPS))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=counts, steps=STEPS))
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        axes.margins(x=0.01, y=0.08)
        if span:
            axes.xaxis.set_major_formatter(FuncFormatter(lambda place, _: f"{place:g}"))
            axes.set_xlabel(span.unit, loc="right", color=TOKENS["faint"], labelpad=0)
            axes.set_xlim(span.begin, span.end)
        if counts:
            axes.set_ylim(bottom=0)
        if counts or len(curves) + len(levels) > 1:
            legend_above(figure, axes)
        return as_svg(figure)


def _changes(series: Series) -> Series:
    """The first and the last point of each run of equal values."""
    changes = series.values[1:] != series.values[:-1]
    kept = np.append(True, changes) | np.append(changes, True)
    return Series(series.steps[kept], series.values[kept])


@contextmanager
def sheet(width: float, height: float, palette: Palette = TOKENS) -> Iterator[Any]:
    """A matplotlib figure of so many inches of 100 px, see-through, to be drawn on and saved within the `with`."""
    # Half a second that only reports need.
    import matplotlib
    from matplotlib.figure import Figure

    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": "dinoray",
        "font.size": 8,
        "text.color": palette["ink"],
        "axes.labelcolor": palette["ink"],
        "text.parse_math": False,
        "axes.formatter.useoffset": False,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
        figure.patch.set_alpha(0)
        yield figure


def dress(axes: Any, palette: Palette = TOKENS) -> None:
    """Axes as all charts have them: two spines, faint ticks, rules for reading off values."""
    axes.patch.set_alpha(0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(palette["rule"])
    axes.tick_params(colors=palette["faint"], length=3)
    axes.grid(axis="y", color=palette["rule"], linewidth=0.6)
    axes.set_axisbelow(True)


def legend_above(figure: Any, axes: Any, palette: Palette = TOKENS) -> None:
    """A legend above the axes, where it covers no curve, in as many rows as its labels need."""
    handles, labels = axes.get_legend_handles_labels()
    lengths = [len(label) + _LETTERS_OF_A_SIGN for label in labels]
    room = int(figure.get_figwidth() * _LETTERS_PER_INCH)
    columns = len(labels) if sum(lengths) <= room else max(1, min(len(labels), room // max(lengths)))
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=columns,
        frameon=False,
        fontsize=8,
        labelcolor=palette["ink"],
        handlelength=1.4,
        columnspacing=1.2,
        borderaxespad=0,
        borderpad=0.2,
    )


def as_svg(figure: Any) -> str:
    """The drawing as text that takes the page's colours."""
    file = io.StringIO()
    figure.savefig(file, format="svg")
    return themed(file.getvalue())
