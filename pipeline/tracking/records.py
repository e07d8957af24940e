"""What a run has written down so far, as far as it can be read: metrics, verdicts, config, pictures.

Between the run directory, which another process may be writing to, and reporting/run_report.py. Whatever is missing
or damaged is left out, and damage is counted, never raised; storage that is closed to us still is an error. No Ray
here.
"""

import json
import math
import re
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import yaml

from pipeline.storage.files import Directory, MissingObject

Floats = npt.NDArray[np.float64]

_FIGURE = re.compile(r"step_(\d{8,})\.png")


class Series(NamedTuple):
    """One metric over the run: `steps` ascending, `values` with NaN where it was not finite.

    A point whose step is NaN as well is a break: what lies before is not joined to what follows.
    """

    steps: Floats
    values: Floats

    @property
    def last(self) -> float:
        """The newest value that is a number; NaN when there is none."""
        finite = self.values[np.isfinite(self.values)]
        return float(finite[-1]) if len(finite) else math.nan


class Records:
    """The lines of a metrics.jsonl."""

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
            ):  # the last one is being written, or was when the run was killed
                self.num_damaged += 1
        self._lines.sort(key=lambda record: record["step"])
        self._names = {name for record in self._lines for name in record}
        self._series: dict[tuple[str, str], Series] = {}

    def __len__(self) -> int:
        return len(self._lines)

    @property
    def last_step(self) -> int | None:
        """The newest step with metrics; None before the first."""
        return self._lines[-1]["step"] if self._lines else None

    def names(self, pattern: str) -> list[str]:
        """Metrics whose whole name matches, sorted, numbers by their size."""
        found = {name for name in self._names if re.fullmatch(pattern, name)}
        return sorted(found, key=lambda name: (len(name), name))

    def series(self, name: str, *, over: str = "step") -> Series:
        """A metric wherever it was logged, over steps or another number that its lines have.

        Of two values at one place the later counts.
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
        """(step from which it holds, verdict), one per change."""
        changes: list[tuple[int, str]] = []
        for record in self._lines:
            verdict = record.get("verdict")
            if isinstance(verdict, str) and (not changes or changes[-1][1] != verdict):
                changes.append((record["step"], verdict))
        return changes


def read_records(run: Directory) -> Records:
    """metrics.jsonl; no lines when there is none yet."""
    return Records(read(run, "metrics.jsonl") or b"")


def read(run: Directory, name: str) -> bytes | None:
    """A file of the run; None when it is not there."""
    try:
        return run.read(name)
    except MissingObject:
        return None


def read_mapping(run: Directory, name: str) -> dict[str, Any]:
    """A YAML or JSON file that holds a mapping; empty when it is missing, damaged or something else."""
    try:
        text = (read(run, name) or b"{}").decode()
        # YAML takes 1e-05, which JSON writes, for text.
        tree = json.loads(text) if name.endswith(".json") else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, RecursionError):
        return {}
    return {str(key): value for key, value in tree.items()} if isinstance(tree, dict) else {}


def read_head(run: Directory, name: str, limit: int) -> tuple[list[dict[str, Any]], int]:
    """The objects in the first `limit` lines of a JSON Lines file, and how many there are in all.

    What lies behind them is counted by its line ends: the file of a long run may have millions.
    """
    *lines, rest = (read(run, name) or b"").split(b"\n", limit)
    if b"\n" not in rest:  # the last line, which may be whole
        lines.append(rest)
    rows = [row for line in lines if isinstance(row := _json(line), dict)]
    return rows, len(rows) + rest.count(b"\n")


def attention_figures(run: Directory) -> list[tuple[int, str]]:
    """(step, file name) of the attention figures that evaluations have drawn, by step."""
    matches = [match for name in run.child("attention").list() if (match := _FIGURE.fullmatch(name))]
    return sorted((int(match[1]), f"attention/{match[0]}") for match in matches)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of a tree of mappings by their dotted names."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def _json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _is_number(value: Any) -> bool:
    """Numbers, and the strings that stand for numbers that JSON has not."""
    return type(value) in (float, int) or value in ("nan", "inf", "-inf")  # True is neither


def _number(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.nan


def spent(run: Directory) -> float:
    """Dollars that earlier lives of the run have come to, those of steps that are repeated included."""
    values = read_records(run).series("dollars").values
    return float(values.max()) if len(values) else 0.0
