"""The map of a study: its trials over two settings, coloured by score, with what collapsed and was given up.

Draws on axes that it is given, in the colours that it is given. Knows nothing of files or pages.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dinoray.pipeline.figures.palette import NUM_SCALE, TOKENS, Palette, scale
from dinoray.pipeline.reporting.plots import as_svg, dress, sheet
from dinoray.pipeline.study.findings.ranking import score_of
from dinoray.pipeline.study.findings.sentences import metric_name, score_text, stopped_for
from dinoray.pipeline.study.findings.summary import Findings
from dinoray.pipeline.study.page.axes import Range, drawn_keys, plain, point_of, score_range, shown, ticks
from dinoray.pipeline.study.space import CENTER_MOMENTUM, TEACHER_TEMP
from dinoray.pipeline.study.trials import TrialRecord

_MIN_FOR_GROUND = 6
_GRID = 45
_MARKERS = {"uniform collapse": "x", "single-prototype collapse": "+"}


def score_map(tried: Sequence[TrialRecord], found: Findings, *, is_alone: bool = False) -> str:
    """As SVG, wider where it stands alone in its row; empty when no setting was searched or nothing has ended."""
    if not map_keys(found) or not any(one.outcome for one in tried):
        return ""
    with sheet(9 if is_alone else 6.4, 4.7) as figure:
        draw_map(figure, figure.add_subplot(), tried, found, TOKENS)
        return as_svg(figure)


def map_keys(found: Findings) -> list[str]:
    """The settings along its axes: two, one, or none."""
    return drawn_keys(found.space, found.importance, (TEACHER_TEMP, CENTER_MOMENTUM))


def draw_map(figure: Any, axes: Any, tried: Sequence[TrialRecord], found: Findings, palette: Palette) -> None:
    """Two settings: where trials lie, and colours for scores. One: scores over it."""
    keys = map_keys(found)
    scores = score_range(tried)
    dress(axes, palette)
    axes.grid(color=palette["rule"], linewidth=0.6)
    axes.set_xlim(-0.04, 1.04)
    axes.set_ylim(-0.05, 1.05)
    _label(axes, found, keys, scores)
    means = {candidate.number: candidate.mean for candidate in found.candidates}

    def where(one: TrialRecord) -> tuple[float, float] | None:
        point = point_of(one, found.space, keys)
        if point is None or len(keys) > 1:
            return None if point is None else (point[0], point[1])
        score = means.get(one.trial.number, score_of(one))
        if one.status == "collapsed" or score is None or scores is None:
            return point[0], 0.0
        return point[0], scores.share(score)

    if len(keys) > 1 and scores is not None:
        _draw_ground(axes, tried, found, keys, scores, palette)
    for one in shown(tried):
        place, score = where(one), means.get(one.trial.number, score_of(one))
        if place is None:
            continue
        if one.status == "collapsed" and one.outcome:
            _draw_collapse(axes, place, one.outcome.verdict, palette)
        elif score is not None and scores is not None and one.status in ("finished", "stopped"):
            stopped = stopped_for(is_population=found.is_population) if one.status == "stopped" else ""
            _draw_score(axes, place, scale(palette)[scores.level(score)], palette, stopped=stopped)
        if found.best and one.trial.number == found.best.number:
            axes.scatter(
                *place,
                s=190,
                facecolors="none",
                edgecolors=palette["ink"],
                linewidths=1.6,
                zorder=5,
                label="best",
            )
            _name(axes, place, found.best.name, palette)
    _explain(figure, axes, palette)
    if scores is not None and len(keys) > 1:
        _draw_scale(figure, axes, scores, found.objective, palette)


def _label(axes: Any, found: Findings, keys: Sequence[str], scores: Range | None) -> None:
    across = ticks(found.space[keys[0]])
    axes.set_xticks([t.place for t in across], [t.label for t in across])
    axes.set_xlabel(plain(keys[0], 48))
    if len(keys) > 1:
        up = ticks(found.space[keys[1]])
        axes.set_yticks([t.place for t in up], [t.label for t in up])
        axes.set_ylabel(plain(keys[1], 40))
    elif scores is not None:
        places = [0, 0.25, 0.5, 0.75, 1]
        axes.set_yticks(places, _score_labels(places, scores, found.objective))
        axes.set_ylabel(plain(metric_name(found.objective), 40))


def _score_labels(places: Sequence[float], scores: Range, objective: str) -> list[str]:
    return [score_text(objective, scores.low + place * (scores.high - scores.low)) for place in places]


def _draw_ground(
    axes: Any,
    tried: Sequence[TrialRecord],
    found: Findings,
    keys: Sequence[str],
    scores: Range,
    palette: Palette,
) -> None:
    """What neighbours let expect, faintly: means weighted by inverse distance; collapsed trials count as the worst."""
    known = []
    for one in shown(tried):
        point, score = point_of(one, found.space, keys), score_of(one)
        if point is None or one.status not in ("finished", "stopped", "collapsed"):
            continue
        if one.status == "collapsed":
            known.append((*point, 0.0))
        elif score is not None:
            known.append((*point, scores.share(score)))
    if len(known) >= _MIN_FOR_GROUND:
        across = np.linspace(0, 1, _GRID)
        values = expected(np.array(known), across)
        levels = np.linspace(0, 1, NUM_SCALE + 1)
        axes.contourf(across, across, values, levels=levels, colors=scale(palette), alpha=0.22, zorder=0)


def expected(known: npt.NDArray[np.float64], across: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Means of the values `known` [n, (x, y, value)] at the points of a grid [y,x], weighted by 1 / distance^3."""
    x, y = np.meshgrid(across, across)
    squares = (x[..., None] - known[:, 0]) ** 2 + (y[..., None] - known[:, 1]) ** 2 + 2e-3
    weights = squares**-1.5
    return (weights * known[:, 2]).sum(-1) / weights.sum(-1)


def _draw_score(
    axes: Any, place: tuple[float, float], colour: str, palette: Palette, *, stopped: str
) -> None:
    if stopped:  # its score is of fewer steps, so that a colour would compare what cannot be compared
        look = {"s": 40, "facecolors": "none", "edgecolors": palette["faint"], "linewidths": 1.2, "zorder": 3}
        axes.scatter(*place, **look, label=stopped)
    else:
        look = {"s": 62, "facecolors": colour, "edgecolors": palette["ink"], "linewidths": 0.5, "zorder": 4}
        axes.scatter(*place, **look, label="finished")


def _draw_collapse(axes: Any, place: tuple[float, float], verdict: str, palette: Palette) -> None:
    axes.scatter(
        *place,
        s=56,
        marker=_MARKERS.get(verdict, "1"),
        c=palette["warn"],
        linewidths=1.8,
        zorder=3,
        label=plain(verdict, 30),
    )


def _name(axes: Any, place: tuple[float, float], name: str, palette: Palette) -> None:
    right = place[0] < 0.85
    axes.annotate(
        name,
        place,
        xytext=(10 if right else -10, 6),
        textcoords="offset points",
        ha="left" if right else "right",
        color=palette["ink"],
        fontweight="bold",
        zorder=6,
    )


def _explain(figure: Any, axes: Any, palette: Palette) -> None:
    """A legend below, each sign once, in ink: colours are explained by the scale."""
    handles, labels = axes.get_legend_handles_labels()
    signs = dict(zip(labels, handles, strict=True))
    if signs:
        axes.legend(
            list(signs.values()),
            list(signs),
            loc="upper center",
            bbox_to_anchor=(0.5, -0.14),
            ncols=min(4, len(signs)),
            frameon=False,
            labelcolor=palette["ink"],
            handletextpad=0.3,
            columnspacing=1.4,
            markerscale=0.8,
        )


def _draw_scale(figure: Any, axes: Any, scores: Range, objective: str, palette: Palette) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    mapping = ScalarMappable(Normalize(scores.low, scores.high), ListedColormap(scale(palette)))
    bar = figure.colorbar(mapping, ax=axes, fraction=0.045, pad=0.02, aspect=24)
    places = [0, 1 / 3, 2 / 3, 1]
    bar.set_ticks(
        [scores.low + place * (scores.high - scores.low) for place in places],
        labels=_score_labels(places, scores, objective),
    )
    bar.ax.tick_params(colors=palette["faint"], length=3)
    bar.outline.set_visible(False)
    bar.set_label(plain(metric_name(objective), 30))
