"""Axes of a study's drawings: settings along the scale on which they were searched, scores as colours and words.

Knows nothing of files or pages.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dinoray.pipeline.figures.palette import NUM_SCALE
from dinoray.pipeline.reporting.plots import STEPS
from dinoray.pipeline.study.findings.ranking import place_in, score_of, searched
from dinoray.pipeline.study.findings.regions import short
from dinoray.pipeline.study.space import Domain
from dinoray.pipeline.study.trials import TrialRecord

_MAX_LETTERS = 18
_MIN_DISTANCE = 0.09
_ONE_MINUS = (0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999)


class Tick(NamedTuple):
    """A mark on an axis from 0 to 1."""

    place: float
    label: str


class Range(NamedTuple):
    """The least and the largest score that colours tell apart."""

    low: float
    high: float

    def share(self, score: float) -> float:
        """From 0 for the least to 1 for the largest, and no further."""
        return min(1.0, max(0.0, (score - self.low) / (self.high - self.low)))

    def level(self, score: float) -> int:
        """Of the palette's scale."""
        return min(NUM_SCALE - 1, int(self.share(score) * NUM_SCALE))


def score_range(tried: Sequence[TrialRecord]) -> Range | None:
    """Of what was trained to the end, or if nothing was, of what was given up; None without any score."""
    for status in ("finished", "stopped"):
        scores = [s for one in tried if one.status == status and (s := score_of(one)) is not None]
        if scores:
            low, high = min(scores), max(scores)
            room = (high - low) * 0.01 or abs(high) * 0.05 or 0.05
            return Range(low - room, high + room)
    return None


def plain(text: Any, limit: int = _MAX_LETTERS) -> str:
    """A name that can be drawn: printable, its end left out where it is long."""
    text = "".join(c if c.isprintable() else " " for c in str(text).encode("utf-8", "replace").decode())
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def ticks(domain: Domain) -> list[Tick]:
    """A handful of round values, or all choices, where they lie; the ends where nothing round is between."""
    low, high = domain.values[0], domain.values[-1]
    if domain.kind == "choice":
        marks = [Tick(domain.place(value), plain(short(value))) for value in domain.values]
        return marks[:: -(-len(marks) // 8)]
    if domain.kind == "one_minus_log":
        values = [value for value in _ONE_MINUS if low <= value <= high]
    elif domain.kind == "log":
        values = [v for e in range(-12, 13) for m in (1, 2, 5) if low <= (v := float(f"{m}e{e}")) <= high]
        decades = [value for value in values if f"{value:e}"[0] == "1"]
        values = decades if len(decades) > 3 else values
    else:
        values = _round_values(low, high, whole=domain.kind == "int")
    if len(values) < 2:
        values = [low, high]
    marks = []
    for value in values:
        mark = Tick(domain.place(value), f"{value:.6g}")
        if not marks or abs(mark.place - marks[-1].place) >= _MIN_DISTANCE:
            marks.append(mark)
    return marks


def _round_values(low: float, high: float, *, whole: bool) -> list[Any]:
    from matplotlib.ticker import MaxNLocator  # half a second that only reports need

    found = MaxNLocator(6, steps=STEPS, integer=whole).tick_values(low, high)
    rounded = [int(value) if whole else float(f"{value:.9g}") for value in found]
    return [value for value in rounded if low <= value <= high]


def drawn_keys(
    space: Mapping[str, Domain], importance: Mapping[str, float] | None, preferred: Sequence[str]
) -> list[str]:
    """The two settings of a map: the preferred ones if both were searched, else those that matter most."""
    if all(key in space for key in preferred):
        return list(preferred)
    return [*(importance or {}), *(key for key in space if key not in (importance or {}))][:2]


def point_of(one: TrialRecord, space: Mapping[str, Domain], keys: Sequence[str]) -> tuple[float, ...] | None:
    """Where a trial lies along `keys`; None when it has no place on one of them."""
    places = [place_in(space[key], one.trial.params.get(key)) for key in keys]
    return tuple(place for place in places if place is not None) if None not in places else None


def shown(tried: Sequence[TrialRecord]) -> list[TrialRecord]:
    """One trial of each set of parameters, and all that collapsed."""
    first = searched(tried)
    return [*first, *(one for one in tried if one.status == "collapsed" and one not in first)]
