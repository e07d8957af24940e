"""Charts of a report: what changes is drawn, what stays the same over the whole run is one line below. No Ray here."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dinoray.pipeline.reporting.page import Html, charts, escape
from dinoray.pipeline.reporting.plots import Curve, Level, Span, chart
from dinoray.pipeline.tracking.records import Series

_SAME = 1e-9
"""Relative difference below which values are the same."""


class Chart(NamedTuple):
    """One chart, by what it draws."""

    title: str
    names: dict[str, str]
    """Metric -> label."""
    percent: bool = False
    counts: bool = False
    """Of whole things: a curve that is always zero is left out."""
    levels: tuple[Level, ...] = ()
    always: bool = False
    """Drawn also where it is constant, because that means something."""


def with_start(wanted: Chart, start: Mapping[str, Any] | None) -> Chart:
    """The chart with a line at the score of the initial weights: that of its last metric, if it has one."""
    for name, label in reversed(wanted.names.items()):
        value = None if start is None else start.get(name)
        if isinstance(value, int | float) and np.isfinite(value):
            words = f"start, {label}" if len(wanted.names) > 1 else "start"
            return wanted._replace(levels=(*wanted.levels, Level(words, value)))
    return wanted


def drawn(wanted: Sequence[Chart], series_of: Callable[[str], Series], *, span: Span | None = None) -> Html:
    """The charts that have anything to draw, in their order, and a line with those that are constant."""
    shown: list[tuple[str, str]] = []
    constant: list[str] = []
    for one in wanted:
        curves = list(_curves(one, series_of))
        if not curves:
            continue
        if one.always or not all(_is_constant(curve.series) for curve in curves):
            svg = chart(curves, levels=one.levels, percent=one.percent, counts=one.counts, span=span)
            shown.append((one.title, svg))
        else:
            constant.append(_in_words(one, curves))
    line = f'<p class="constant">Constant: {escape("; ".join(constant))}.</p>' if constant else ""
    return Html(charts(shown) + line)


def _curves(wanted: Chart, series_of: Callable[[str], Series]) -> Iterator[Curve]:
    for name, label in wanted.names.items():
        series = series_of(name)
        known = series.values[np.isfinite(series.values)]
        if len(known) and not (wanted.counts and (known <= 0).all()):
            yield Curve(label, series)


def _is_constant(series: Series) -> bool:
    """Whether it has one value, at several steps and without a gap."""
    values = series.values[np.isfinite(series.steps)]
    if len(values) < 2 or not np.isfinite(values).all():
        return False
    return bool(np.ptp(values) <= _SAME * np.abs(values).max())


def _in_words(wanted: Chart, curves: Sequence[Curve]) -> str:
    values = [f"{c.series.last:.0%}" if wanted.percent else f"{c.series.last:.4g}" for c in curves]
    if len(wanted.names) == 1:
        return f"{wanted.title} {values[0]}"
    parts = ", ".join(f"{curve.label} {value}" for curve, value in zip(curves, values, strict=True))
    return f"{wanted.title}: {parts}"
