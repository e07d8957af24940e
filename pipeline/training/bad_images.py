"""The ledger of images that could not be used: counted exactly, named in a file, bounded by config.

Each rank notes the bad rows of its batches; `share` merges all ranks' notes. No Ray here.
"""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from models.errors import DataError
from pipeline.data.source import Status
from pipeline.training.distributed import gather


class TooManyBadImagesError(DataError):
    """The run cannot go on with so many; all ranks count alike, so all raise it at the same step."""

    all_processes_raise_it = True


class Quarantine:
    """Counts of bad images by status over the whole run, and what was found since the last `share`."""

    def __init__(self, counts: Mapping[str, int]) -> None:
        self.counts = Counter(counts)
        self._found: list[dict[str, Any]] = []

    def note(self, batch: Mapping[str, Any]) -> None:
        """Take up the rows of a batch whose `status` is not OK."""
        for row in np.flatnonzero(batch["status"]):
            self._found.append(
                {
                    "position": int(batch["position"][row]),
                    "status": Status(int(batch["status"][row])).name.lower(),
                    **json.loads(str(batch["note"][row])),
                }
            )

    def share(self) -> list[dict[str, Any]]:
        """What all ranks found since the last call, by position; every rank counts it. A collective call."""
        found = gather(self._found)
        self._found = []
        records = sorted((r for part in found for r in part), key=lambda r: r["position"])
        self.counts.update(r["status"] for r in records)
        return records

    def check(self, *, num_seen: int, num_images: int, limit: float, file: str) -> None:
        """TooManyBadImagesError when more than `limit` of them are bad, of a first thousand (or epoch) or more."""
        bad = self.counts.total()
        if num_seen >= min(1000, num_images) and bad > limit * num_seen:
            raise TooManyBadImagesError(
                f"{bad} of {num_seen} images could not be used ({dict(self.counts)}), more than "
                f"data.max_bad_fraction={limit}; they are named in {file}"
            )
