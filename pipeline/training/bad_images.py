"""Count images that could not be used, record them for quarantine.jsonl, and check the configured limit.

Each rank notes the bad rows of its batches; `share` merges the records of all ranks. No Ray here.
"""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from dinoray.models.errors import DataError
from dinoray.pipeline.data.source import Status
from dinoray.pipeline.training.distributed import gather


class TooManyBadImagesError(DataError):
    """Too many bad images to continue. All ranks have the same counts, so all raise it at the same step."""

    raised_by_all_ranks = True


class Quarantine:
    """Counts of bad images by status over the whole run, and records since the last `share`."""

    def __init__(self, counts: Mapping[str, int]) -> None:
        self.counts = Counter(counts)
        self._found: list[dict[str, Any]] = []

    def note(self, batch: Mapping[str, Any]) -> None:
        """Record the rows of a batch whose `status` is not OK."""
        for row in np.flatnonzero(batch["status"]):
            self._found.append(
                {
                    "position": int(batch["position"][row]),
                    "status": Status(int(batch["status"][row])).name.lower(),
                    **json.loads(str(batch["note"][row])),
                }
            )

    def share(self) -> list[dict[str, Any]]:
        """Return all ranks' records since the last call, by position, and count them. A collective call."""
        found = gather(self._found)
        self._found = []
        records = sorted((r for part in found for r in part), key=lambda r: r["position"])
        self.counts.update(r["status"] for r in records)
        return records

    def check(self, *, num_seen: int, num_images: int, limit: float, file: str) -> None:
        """Raise TooManyBadImagesError if a share above `limit` is bad, from 1000 images (or an epoch) on."""
        bad = self.counts.total()
        if num_seen >= min(1000, num_images) and bad > limit * num_seen:
            raise TooManyBadImagesError(
                f"{bad} of {num_seen} images could not be used ({dict(self.counts)}), more than "
                f"data.max_bad_fraction={limit}; they are named in {file}"
            )
