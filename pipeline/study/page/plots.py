"""Drawings of a study: curves of all trials, parallel coordinates, what matters; and the picture that stands alone.

Those for the page are SVG in its colours, empty where there is nothing to draw; the picture is PNG in light colours.
"""

import io
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dinoray.pipeline.figures.palette import LIGHT, TOKENS, Palette, scale
from dinoray.pipeline.reporting.plots import STEPS, as_svg, dress, sheet
from dinoray.pipeline.study.findings.ranking import number_of, place_in, score_of
from dinoray.pipeline.study.findings.sentences import metric_name, score_text
from dinoray.pipeline.study.findings.summary import Findings
from dinoray.pipeline.study.page.axes import Range, plain, score_range, shown, ticks
from dinoray.pipeline.study.page.score_map import draw_map, map_keys
from dinoray.pipeline.study.trials import TrialRecord
from dinoray.pipeline.tracking.records import Series
from dinoray.pipeline.tracking.start import start_of

_MAX_AXES = 9


def curve_charts(tried: Sequence[TrialRecord], found: Findings) -> Iterator[tuple[str, str]]:
    """(title, SVG) of each metric over steps."""
    for metric in curve_metrics(tried, found.objective):
        with sheet(3.6, 2.2) as figure:
            draw_curves(figure.add_subplot(), tried, found, metric, TOKENS)
            yield curve_title(metric), as_svg(figure)


def curve_title(metric: str) -> str:
    """What a chart shows."""
    return metric_name(metric) + {"rankme": ": effective rank of the features"}.get(metric, "")


def curve_metrics(tried: Sequence[TrialRecord], objective: str) -> list[str]:
    """The objective, k-NN accuracy, RankMe and the teacher's entropy, as far as they were measured."""
    knn = sorted({name for one in tried for name in one.records.names(r"knn_\d+")}, key=lambda n: (len(n), n))
    wanted = dict.fromkeys([objective, *([] if objective in knn else knn[-1:]), "rankme", "entropy_ratio"])
    return [name for name in wanted if any(not math.isnan(one.records.series(name).last) for one in tried)]


def draw_curves(
    axes: Any, tried: Sequence[TrialRecord], found: Findings, metric: str, palette: Palette
) -> None:
    """One line a trial: by score where it was trained to the end, the best on top; else by what became of it."""
    from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

    scores = score_range(tried)
    order = {"unfinished": 0, "failed": 0, "stopped": 1, "collapsed": 2, "finished": 3}
    for one in sorted(tried, key=lambda one: (order[one.status], score_of(one) or 0.0)):
        series = _finite(one.records.series(metric))
        if len(series.steps):
            _draw_curve(axes, series, one, scores, palette, is_best=_is_best(one, found))
    dress(axes, palette)
    _draw_start(axes, tried, metric, palette)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=STEPS))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
    if metric.startswith("knn_") or metric == "entropy_ratio":
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.margins(x=0.02, y=0.08)


def _draw_start(axes: Any, tried: Sequence[TrialRecord], metric: str, palette: Palette) -> None:
    """The line to beat: what the trials' initial weights scored, on average."""
    starts = [start_of(one.records.lines) or {} for one in tried if one.trial.continues is None]
    known = [value for start in starts if (value := number_of(start.get(metric))) is not None]
    if not known:
        return
    height = sum(known) / len(known)
    axes.axhline(height, color=palette["faint"], linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate(
        "start",
        (1, height),
        xycoords=("axes fraction", "data"),
        xytext=(-2, 2),
        textcoords="offset points",
        ha="right",
        fontsize=7,
        color=palette["faint"],
    )


def _finite(series: Series) -> Series:
    known = np.isfinite(series.values)
    return Series(series.steps[known], series.values[known])


def _is_best(one: TrialRecord, found: Findings) -> bool:
    return found.best is not None and one.trial.number == found.best.number


def _draw_curve(
    axes: Any, series: Series, one: TrialRecord, scores: Range | None, palette: Palette, *, is_best: bool
) -> None:
    steps, values, score = series.steps, series.values, score_of(one)
    if one.status == "collapsed":
        axes.plot(steps, values, color=palette["warn"], linewidth=1, alpha=0.85)
        axes.plot(steps[-1:], values[-1:], "x", color=palette["warn"], markersize=5, markeredgewidth=1.4)
    elif one.status == "finished" and score is not None and scores is not None:
        if is_best:
            _draw_casing(axes, steps, values, palette)
        colour = scale(palette)[scores.level(score)]
        axes.plot(steps, values, color=colour, linewidth=1.6 if is_best else 1.3, zorder=5 if is_best else 3)
    else:
        axes.plot(steps, values, color=palette["faint"], linewidth=0.9, alpha=0.6, linestyle=(0, (4, 2)))
    if len(steps) == 1 and one.status != "collapsed":
        axes.plot(steps, values, "o", color=palette["faint"], markersize=3)


def _draw_casing(axes: Any, x: Any, y: Any, palette: Palette) -> None:
    """What makes the best one's line stand out among lines of nearly its colour."""
    axes.plot(x, y, color=palette["ink"], linewidth=5, zorder=4)
    axes.plot(x, y, color=palette["card"], linewidth=3.4, zorder=4)


def parallel_coordinates(tried: Sequence[TrialRecord], found: Findings) -> str:
    """A line a set of parameters, through its value on each axis to its score; collapsed ones end at the foot."""
    keys, scores = list(found.space)[: _MAX_AXES - 1], score_range(tried)
    if len(keys) < 2 or not any(one.outcome for one in tried):
        return ""  # of one setting the map shows as much
    means = {candidate.number: candidate.mean for candidate in found.candidates}
    with sheet(max(7.4, 1.5 * (len(keys) + 1)), 3.6) as figure:
        axes = figure.add_subplot()
        for one in shown(tried):
            places = [place_in(found.space[key], one.trial.params.get(key)) for key in keys]
            score = means.get(one.trial.number, score_of(one))
            if one.status == "collapsed":
                line = {"color": TOKENS["warn"], "linewidth": 1.1, "alpha": 0.8, "zorder": 2}
                end = 0.0
            elif score is None or scores is None:
                continue
            else:
                end, colour = scores.share(score), scale(TOKENS)[scores.level(score)]
                line = {"color": colour, "linewidth": 1.3, "zorder": 3}
                if one.status != "finished":
                    line = {
                        "color": TOKENS["faint"],
                        "linewidth": 0.9,
                        "alpha": 0.6,
                        "linestyle": (0, (4, 2)),
                    }
            heights = [np.nan if place is None else place for place in [*places, end]]
            if _is_best(one, found):
                _draw_casing(axes, range(len(heights)), heights, TOKENS)
                line |= {"linewidth": 1.6, "zorder": 5}
            axes.plot(heights, **line)
        _draw_verticals(axes, keys, found, scores)
        return as_svg(figure)


def _draw_verticals(axes: Any, keys: Sequence[str], found: Findings, scores: Range | None) -> None:
    dress(axes)
    axes.grid(visible=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_yticks([])
    marks = [[(tick.place, tick.label) for tick in ticks(found.space[key])] for key in keys]
    marks.append(
        [
            (place, score_text(found.objective, scores.low + place * (scores.high - scores.low)))
            for place in (0, 0.25, 0.5, 0.75, 1)
        ]
        if scores
        else []
    )
    for i, column in enumerate(marks):
        axes.axvline(i, color=TOKENS["faint"], linewidth=0.9, zorder=1)
        for place, label in column:
            axes.annotate(
                label,
                (i, place),
                xytext=(5 if i == len(keys) else -5, 0),
                textcoords="offset points",
                ha="left" if i == len(keys) else "right",
                va="center",
                fontsize=7.5,
                color=TOKENS["ink"],
                zorder=6,
                bbox={"facecolor": TOKENS["card"], "edgecolor": "none", "alpha": 0.85, "pad": 0.6},
            )
    names = [plain(key, 30).replace(".", ".\n", 1) for key in keys]
    axes.set_xticks(range(len(marks)), [*names, plain(metric_name(found.objective), 20)])
    axes.tick_params(axis="x", length=0, colors=TOKENS["ink"], pad=8)
    axes.set_xlim(-0.35, len(marks) - 0.65)
    axes.set_ylim(-0.04, 1.04)


def importance_bars(found: Findings) -> str:
    """How much of the differences in rank each setting explains by itself."""
    if not found.importance:
        return ""
    shares = list(found.importance.items())[:12]
    with sheet(3.7, 0.25 + 0.28 * len(shares)) as figure:
        axes = figure.add_subplot()
        heights = range(len(shares))
        axes.barh(heights, [share for _, share in shares], height=0.6, color=TOKENS["series-1"])
        for i, (_, share) in enumerate(shares):
            axes.annotate(
                f"{share:.0%}",
                (share, i),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                color=TOKENS["faint"],
            )
        dress(axes)
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        axes.set_xticks([])
        axes.set_yticks(heights, [plain(key, 34) for key, _ in shares])
        axes.tick_params(axis="y", length=0, colors=TOKENS["ink"])
        axes.set_ylim(len(shares) - 0.4, -0.6)
        axes.set_xlim(0, max(0.05, *(share for _, share in shares)) * 1.15)
        return as_svg(figure)


def study_picture(tried: Sequence[TrialRecord], found: Findings, title: str, remark: str) -> bytes:
    """The map and the curves as one PNG, under a title and a line below it."""
    metrics = curve_metrics(tried, found.objective)[:3]
    with sheet(11, 5.2, LIGHT) as figure:
        figure.patch.set(facecolor=LIGHT["paper"], alpha=1)
        figure.text(0.012, 0.95, plain(title, 80), fontsize=12, fontweight="bold")
        figure.text(0.012, 0.905, plain(remark, 150), color=LIGHT["faint"], fontsize=9)
        figure.get_layout_engine().set(rect=(0, 0, 1, 0.88))
        has_map = bool(map_keys(found)) and any(one.outcome for one in tried)
        grid = figure.add_gridspec(max(1, len(metrics)), 2, width_ratios=[1.25, 1])
        if has_map:
            draw_map(figure, figure.add_subplot(grid[:, 0]), tried, found, LIGHT)
        for i, metric in enumerate(metrics):
            axes = figure.add_subplot(grid[i, 1])
            draw_curves(axes, tried, found, metric, LIGHT)
            axes.set_title(curve_title(metric), fontsize=8, loc="left", color=LIGHT["ink"])
        if not has_map and not metrics:
            figure.text(0.5, 0.5, "no measurements yet", ha="center", color=LIGHT["faint"], fontsize=12)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
        return file.getvalue()
