"""Whether the train workers are fed, and by what: throughput and waiting beside nodes and augment actors over time.

Over wall time where the run's lines say when they were written, else over steps. No Ray here.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dinoray.pipeline.augment.augmenter import STAGES
from dinoray.pipeline.reporting.charts import Chart, drawn
from dinoray.pipeline.reporting.page import Html, section
from dinoray.pipeline.reporting.plots import Span
from dinoray.pipeline.tracking.records import Floats, Records, Series

_UNITS = ((3600.0, "hours", "h"), (60.0, "minutes", "min"), (1.0, "seconds", "s"))
_LEAST = 3
"""So much of a unit at least, else a smaller one is better read."""
_BREAK, _LEAST_BREAK_SECONDS = 10, 60.0
"""A break is so many times as long as lines usually are apart, and so long at least."""


_CHARTS = (
    Chart("Images per second", {"images_per_second": "images/s"}),
    Chart("Time spent waiting for data", {"data_wait": "data wait"}, percent=True),
    Chart("CPU time per image (ms)", {f"{stage}_cpu_ms": stage for stage in STAGES}),
    Chart(
        "Running nodes",
        {"nodes_cpu": "without GPUs", "nodes_gpu": "with GPUs", "nodes_head": "head"},
        counts=True,
    ),
    Chart(
        "Augment actors",
        {"augment_target": "requested", "augment_actors": "running"},
        counts=True,
    ),
    Chart("Cumulative cost (dollars)", {"dollars": "dollars"}),
)


class _Time(NamedTuple):
    """The wall time of a run: when its lines were written, and where it was silent."""

    times: Floats
    """Seconds, ascending; at least two."""

    @property
    def seconds(self) -> float:
        """From the first line to the last."""
        return float(self.times[-1] - self.times[0])

    @property
    def unit(self) -> tuple[float, str]:
        """What it is read in: so many seconds, and their name."""
        return _unit(self.seconds)[:2]

    @property
    def breaks(self) -> npt.NDArray[np.intp]:
        """Lines after which there was none for long, as places in `times`."""
        apart = np.diff(self.times)
        return np.flatnonzero(apart > max(_BREAK * float(np.median(apart)), _LEAST_BREAK_SECONDS))

    @property
    def silent_seconds(self) -> float:
        """All breaks together."""
        return float(np.diff(self.times)[self.breaks].sum())


def throughput_section(records: Records) -> Html:
    """The section; nothing when none of it was logged."""
    time = _time(records)
    if time is None:
        note = "The x-axis shows steps: this run's log lines have no timestamps."
    else:
        note = f"The x-axis shows {time.unit[1]} since the first log line."
        if len(time.breaks):
            note += " Gaps in the curves: the run was stopped or evaluating."
    span = Span(0.0, time.seconds / time.unit[0], time.unit[1]) if time is not None else None
    content = drawn(_CHARTS, lambda name: _series(records, name, time), span=span)
    return section("Throughput", content, note=note)


def cost_tiles(records: Records) -> Iterator[tuple[str, str, str]]:
    """How long the run has taken, and what it has cost, as far as that was logged."""
    time = _time(records)
    if time is not None:
        silent = f", including {_long(time.silent_seconds)} of gaps" if len(time.breaks) else ""
        yield "wall time", _long(time.seconds), f"since the first log line{silent}"
    dollars = records.series("dollars").values
    if np.isfinite(dollars).any():
        most = float(np.nanmax(dollars))
        yield "cost", f"${most:.2f}" if most >= 0.01 else "under 1 cent", "nodes, during the run"


def _unit(seconds: float) -> tuple[float, str, str]:
    return next((unit for unit in _UNITS if seconds >= _LEAST * unit[0]), _UNITS[-1])


def _long(seconds: float) -> str:
    of, _, name = _unit(seconds)
    return f"{seconds / of:.{1 if name == 'h' else 0}f} {name}"


def _time(records: Records) -> _Time | None:
    """None where fewer than two lines say when they were written, as those of an older version do not."""
    times = records.series("time", over="time").steps
    return _Time(times) if len(times) > 1 else None


def _series(records: Records, name: str, time: _Time | None) -> Series:
    """A metric over steps, or over time, broken where the run was silent."""
    if time is None:
        return records.series(name)
    found = records.series(name, over="time")
    after = np.searchsorted(found.steps, time.times[time.breaks], side="right")
    places = (found.steps - time.times[0]) / time.unit[0]
    return Series(np.insert(places, after, np.nan), np.insert(found.values, after, np.nan))
