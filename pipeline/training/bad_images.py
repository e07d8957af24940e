"""Account for every position of the stream: its image was trained on, or could not be used and was replaced.

Each rank counts the rows of its batches; `share` merges the counts and records of all ranks. No Ray here.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dinoray.models.errors import DataError, DinorayError
from dinoray.pipeline.data.reading.bad_kinds import FIRST_CHECK, kind_of
from dinoray.pipeline.data.reading.source import Status
from dinoray.pipeline.training.distributed import gather

_WINDOW = 100_000
"""Positions, or an epoch if that is shorter: so many that chance moves the share of bad images by under a tenth."""
_NUM_REASONS = 5
_MAX_KINDS = 100
"""Reasons of a damaged store may all differ: further ones are counted as one."""


class TooManyBadImagesError(DataError):
    """Too many bad images to continue. All ranks have the same counts, so all raise it at the same step."""

    raised_by_all_ranks = True


class Kind(NamedTuple):
    """Images with the same trouble."""

    times: int
    key: str
    """The latest such image, and its reason."""
    reason: str


class Mark(NamedTuple):
    """The counts at the beginning of a window."""

    positions: int = 0
    bad: int = 0


class Quarantine:
    """Counts over the whole run, and records of bad images since the last `share`."""

    def __init__(self, *, first: int = 0) -> None:
        self.first = first
        """The run's first position; those before it were another run's, which this one goes on from."""
        self.trained = 0
        """Positions whose own image was used."""
        self.counts: Counter[str] = Counter()
        """Replaced positions by status."""
        self._kinds: dict[str, Kind] = {}
        self._marks = [Mark(first)]  # of the window before this one, if any, and of this one
        self._found: list[dict[str, Any]] = []
        self._used = 0

    @classmethod
    def restored(cls, meta: Mapping[str, Any]) -> "Quarantine":
        """Return the counts of a checkpoint's meta data, of earlier versions too.

        Those did not keep the first position: what another run trained on then counts as this run's.
        """
        quarantine = cls(first=meta.get("first_position", 0))
        quarantine.counts.update(meta["bad_images"])
        quarantine.trained = meta["positions"] - quarantine.first - quarantine.counts.total()
        quarantine._kinds = {kind: Kind(*about) for kind, about in meta.get("bad_kinds", {}).items()}
        quarantine._marks = [Mark(*mark) for mark in meta.get("bad_windows", quarantine._marks)]
        return quarantine

    def meta(self) -> dict[str, Any]:
        """Return what `restored` needs, beside `positions`, for JSON."""
        return {
            "first_position": self.first,
            "bad_images": dict(self.counts),
            "bad_kinds": self._kinds,
            "bad_windows": self._marks,
        }

    def note(self, batch: Mapping[str, Any]) -> None:
        """Count the rows of a batch, and record those whose `status` is not OK."""
        bad = np.flatnonzero(batch["status"])
        self._used += len(batch["status"]) - len(bad)
        for row in bad:
            self._found.append(
                {
                    "position": int(batch["position"][row]),
                    "status": Status(int(batch["status"][row])).name.lower(),
                    **json.loads(str(batch["note"][row])),
                }
            )

    def share(self, *, positions: int) -> list[dict[str, Any]]:
        """Return all ranks' records since the last call, by position, and count them. A collective call.

        Raises DinorayError if not each of the `positions` of the stream so far was trained on or replaced.
        """
        shared = gather((self._used, self._found))
        self._used, self._found = 0, []
        records = sorted((r for _, part in shared for r in part), key=lambda r: r["position"])
        self.trained += sum(used for used, _ in shared)
        self.counts.update(r["status"] for r in records)
        for record in records:
            self._count_kind(record)
        if self.trained + self.counts.total() != positions - self.first:
            raise DinorayError(
                f"{positions - self.first} positions of the stream are {self.trained} images trained on and "
                f"{self.counts.total()} replaced: images were lost or came twice"
            )
        return records

    def check(
        self, *, num_seen: int, num_images: int, limit: float, file: str, most_passes: float = 1
    ) -> None:
        """Raise TooManyBadImagesError if a share above `limit` is bad, of the latest one to two windows.

        A window is an epoch, of large sets 100,000 positions. The first check is at 1000 images, or an epoch. A single
        bad image of a small set never ends a run, unless `limit` is 0, however often it comes: `most_passes` times an
        epoch.
        """
        total, first = self.counts.total(), self._marks[0]
        seen, bad = num_seen - first.positions, total - first.bad
        of_one = math.ceil(seen * most_passes / num_images) if limit else 0
        if seen >= min(FIRST_CHECK, num_images) and bad > max(limit * seen, of_one):
            raise TooManyBadImagesError(
                f"{bad} of the last {seen} images could not be used, more than data.max_bad_fraction={limit}; "
                f"in the whole run: {'; '.join(self._commonest())}; "
                f"mend or remove them, or raise data.max_bad_fraction; they are named in {file}"
            )
        if num_seen - self._marks[-1].positions >= min(_WINDOW, num_images):
            self._marks = [*self._marks[-1:], Mark(num_seen, total)]

    def _count_kind(self, record: Mapping[str, Any]) -> None:
        kind = kind_of(record["status"], record["reason"])
        if kind not in self._kinds and len(self._kinds) >= _MAX_KINDS:
            kind = "other"
        times, *_ = self._kinds.get(kind, (0,))
        self._kinds[kind] = Kind(times + 1, record["key"], record["reason"])

    def _commonest(self) -> Sequence[str]:
        """Return the commonest kinds in words, with the latest image of each."""
        kinds = sorted(self._kinds.items(), key=lambda kind: -kind[1].times)
        return [f"{about.times} {kind} ({about.key}: {about.reason})" for kind, about in kinds[:_NUM_REASONS]]
