"""capture/: one small JSON file per step that went wrong, the first few; further ones are counted.

The steps are counted from 1, as in metrics.jsonl. No Ray here.
"""

import json
import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any

from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.run_dir import capture_name, capture_names
from dinoray.pipeline.tracking.json_lines import json_number
from dinoray.pipeline.tracking.records import read_mapping

MAX_CAPTURES = 20
"""Steps that are captured, over all starts of a run."""


class CaptureFiles:
    """The captures of a run. Nothing is read or listed before the first one is written."""

    def __init__(self, run: Directory, *, limit: int = MAX_CAPTURES) -> None:
        self._run, self._folder, self._limit = run, run.child(run_dir.CAPTURE), limit
        self._lock = threading.Lock()
        self._names: set[str] | None = None
        self._more: Counter[str] = Counter()

    def write(self, record: Mapping[str, Any]) -> bool:
        """Write a record with its `step`, `rank` and `reason`; return False if it was only counted.

        A step that is repeated takes the place of its first capture. Raises DataError.
        """
        with self._lock:
            if self._names is None:
                self._names = set(capture_names(self._run))
                earlier = read_mapping(self._run, f"{run_dir.CAPTURE}/{run_dir.CAPTURE_COUNTS}")
                self._more.update(earlier.get("more") or {})
            name = capture_name(record["step"], record["rank"])
            if name not in self._names and len(self._names) >= self._limit:
                self._more[record["reason"]] += 1
                counts = {"captured": len(self._names), "more": self._more, "last_step": record["step"]}
                self._folder.write(run_dir.CAPTURE_COUNTS, json.dumps(counts).encode())
                return False
            self._names.add(name)
            self._folder.write(name, json.dumps(_plain(record), indent=1).encode())
            return True


def read_capture(run: Directory, step: int) -> dict[str, Any]:
    """Return the capture of a step, that of the lowest rank if several ranks wrote one; empty if there is none."""
    names = [name for name, of in sorted(capture_names(run).items()) if of == step]
    return read_mapping(run, f"{run_dir.CAPTURE}/{names[0]}") if names else {}


def captured(run: Directory) -> dict[int, str]:
    """Return the captured steps, ascending: step -> reason."""
    steps = sorted(set(capture_names(run).values()))
    return {step: str(read_capture(run, step).get("reason", "damaged")) for step in steps}


def _plain(value: Any) -> Any:
    """Return nested values with strings for numbers that JSON lacks."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return json_number(value)
