"""Read what a run has logged so far: metrics, verdicts, config, pictures.

Stands between the run directory, which another process may be writing to, and reporting/run_report.py.
Missing or damaged data are left out; damage is counted, never raised. Storage that denies access is still an
error. No Ray here.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import yaml

from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.files import Directory, MissingObject

Floats = npt.NDArray[np.float64]

_FIGURE = re.compile(r"step_(\d{8,})\.png")


class Series(NamedTuple):
    """One metric over the run: `steps` ascending, `values` with NaN for non-finite values.

    A point whose step is also NaN is a break: plots do not join the points before and after it.
    """

    steps: Floats
    values: Floats

    @property
    def last(self) -> float:
        """The newest finite value; NaN if there is none."""
        finite = self.values[np.isfinite(self.values)]
        return float(finite[-1]) if len(finite) else math.nan


class Records:
    """The lines of a metrics.jsonl file."""

    def __init__(self, data: bytes) -> None:
        self._lines: list[dict[str, Any]] = []
        self.num_damaged = 0
        whole, _, last = data.rpartition(b"\n")
        for line in [*whole.split(b"\n"), last]:
            record = _json(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                self._lines.append(record)
            elif (
                line.strip() and line is not last
            ):  # the last line is being written, or was when the run was killed
                self.num_damaged += 1
        self._lines.sort(key=lambda record: record["step"])
        self._names = {name for record in self._lines for name in record}
        self._series: dict[tuple[str, str], Series] = {}

    def __len__(self) -> int:
        return len(self._lines)

    @property
    def lines(self) -> Sequence[Mapping[str, Any]]:
        """All lines that have a step, by step."""
        return self._lines

    @property
    def last_step(self) -> int | None:
        """The newest step with metrics; None if there is none."""
        return self._lines[-1]["step"] if self._lines else None

    def names(self, pattern: str) -> list[str]:
        """Return metrics whose whole name matches, sorted so that numbers in names are in numeric order."""
        found = {name for name in self._names if re.fullmatch(pattern, name)}
        return sorted(found, key=lambda name: (len(name), name))

    def series(self, name: str, *, over: str = "step") -> Series:
        """Return all logged values of a metric, over steps or another number in the same lines.

        If two values have the same place, the later value is used.
        """
        if (name, over) not in self._series:
            self._series[name, over] = self._collect(name, over)
        return self._series[name, over]

    def _collect(self, name: str, over: str) -> Series:
        points = {
            _number(record[over]): _number(record[name])
            for record in self._lines
            if _is_number(record.get(name)) and _is_number(record.get(over))
        }
        places, values = (np.array(list(numbers), np.float64) for numbers in (points, points.values()))
        values[~np.isfinite(values)] = np.nan
        order = np.argsort(places)
        order = order[np.isfinite(places[order])]
        return Series(places[order], values[order])

    def verdicts(self) -> list[tuple[int, str]]:
        """Return (first step, verdict) for each change of the verdict."""
        changes: list[tuple[int, str]] = []
        for record in self._lines:
            verdict = record.get("verdict")
            if isinstance(verdict, str) and (not changes or changes[-1][1] != verdict):
                changes.append((record["step"], verdict))
        return changes


def read_records(run: Directory) -> Records:
    """Read metrics.jsonl; if it does not exist yet, the result has no lines."""
    return Records(read(run, run_dir.METRICS) or b"")


def read(run: Directory, name: str) -> bytes | None:
    """Return the bytes of a file of the run; None if it does not exist."""
    try:
        return run.read(name)
    except MissingObject:
        return None


def read_mapping(run: Directory, name: str) -> dict[str, Any]:
    """Return the mapping in a YAML or JSON file; empty if it is missing, damaged or not a mapping."""
    try:
        text = (read(run, name) or b"{}").decode()
        # The YAML parser reads 1e-05, which JSON writes, as text.
        tree = json.loads(text) if name.endswith(".json") else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, RecursionError):
        return {}
    return {str(key): value for key, value in tree.items()} if isinstance(tree, dict) else {}


def read_head(run: Directory, name: str, limit: int) -> tuple[list[dict[str, Any]], int]:
    """Return the objects in the first `limit` lines of a JSON Lines file, and the total number of objects.

    Further objects are only counted, by line ends: the file of a long run may have millions of lines.
    """
    *lines, rest = (read(run, name) or b"").split(b"\n", limit)
    if b"\n" not in rest:  # the last line, which may be complete
        lines.append(rest)
    rows = [row for line in lines if isinstance(row := _json(line), dict)]
    return rows, len(rows) + rest.count(b"\n")


def attention_figures(run: Directory) -> list[tuple[int, str]]:
    """Return (step, file name) of each evaluation's attention figure, by step."""
    matches = [match for name in run.child(run_dir.ATTENTION).list() if (match := _FIGURE.fullmatch(name))]
    return sorted((int(match[1]), f"{run_dir.ATTENTION}/{match[0]}") for match in matches)


def _json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _is_number(value: Any) -> bool:
    """Return True for numbers, and for the strings of non-finite numbers, which JSON lacks."""
    return type(value) in (float, int) or value in ("nan", "inf", "-inf")  # a bool is neither


def _number(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.nan


def spent(records: Records) -> float:
    """Return the dollars that earlier starts of the run cost, including steps that are repeated."""
    values = records.series("dollars").values
    return float(values.max()) if len(values) else 0.0
