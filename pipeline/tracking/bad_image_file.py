"""quarantine.jsonl: one line per image that could not be used, with the epochs in which it was replaced.

Its positions are written too, so that a resumed run can drop those that it will reach again.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.files import Directory, is_s3
from dinoray.pipeline.storage.local_files import append_to_file, replace_file
from dinoray.pipeline.tracking.json_lines import whole_lines

_MAX_NAMES = 100_000
"""Images that are named, all in the memory of rank 0. Further ones are only counted."""


class BadImageFile:
    """The file of a run that starts or resumes at `resume_position`.

    `tell` takes a line for the user, once there are too many images to name them all.
    """

    def __init__(
        self,
        run: Directory,
        *,
        num_images: int,
        resume_position: int,
        staging: Path,
        tell: Callable[[str], None],
    ) -> None:
        self._run, self._num_images, self._tell = run, num_images, tell
        self._path = str(staging / run_dir.QUARANTINE)
        self._images: dict[str, dict[str, Any]] = {}
        self._is_full = self._is_stale = False
        old = whole_lines(run, run_dir.QUARANTINE)
        for line in map(json.loads, old):
            for position in _take_positions(line):
                if position < resume_position:
                    self._count({**line, "position": position})
        self._write()
        self._is_uploaded = not old

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Add records of `key`, `position` and what is known of the image; new images are in the file at once."""
        new = [self._count(record) for record in records]
        lines = "".join(_line(image) for image in new if image).encode()
        self._run.on_disk(partial(append_to_file, self._path, lines), path=self._path)
        self._is_uploaded = self._is_uploaded and not records

    def sync(self) -> None:
        """Write the epochs that were added, and upload the file if the run directory is on S3."""
        if self._is_stale:
            self._write()
        if not self._is_uploaded and is_s3(self._run.uri):
            self._run.write(run_dir.QUARANTINE, Path(self._path).read_bytes())
        self._is_uploaded = True

    def _write(self) -> None:
        lines = "".join(map(_line, self._images.values())).encode()
        # As a whole: others read it while the run goes on.
        self._run.on_disk(partial(replace_file, self._path, lines), path=self._path)
        self._is_stale = False

    def _count(self, record: Mapping[str, Any]) -> dict[str, Any] | None:
        """Merge a record into the image of its key; return the image if it is new."""
        key, position = str(record["key"]), int(record["position"])
        known = self._images.get(key)
        if known is None and len(self._images) == _MAX_NAMES:
            if not self._is_full:
                self._tell(
                    f"warning: {_MAX_NAMES:,} bad images are named in {self._run.join(run_dir.QUARANTINE)}; "
                    "further ones are only counted"
                )
            self._is_full = True
            return None
        facts = {name: value for name, value in record.items() if name not in ("position", "epochs")}
        positions = sorted({*(known["positions"] if known else ()), position})
        image = {**facts, "epochs": [p // self._num_images for p in positions], "positions": positions}
        self._images[key] = image
        self._is_stale |= known is not None
        return None if known else image


def replaced_positions(run: Directory) -> dict[int, dict[str, Any]]:
    """Return what a run noted of the images that it replaced, by position."""
    images = [json.loads(line) for line in whole_lines(run, run_dir.QUARANTINE)]
    return {position: image for image in images for position in _take_positions(image)}


def _take_positions(image: dict[str, Any]) -> list[int]:
    """Take the positions out of a line's object. Earlier versions wrote a line for each position."""
    return image.pop("positions", None) or [image["position"]]


def _line(image: Mapping[str, Any]) -> str:
    return json.dumps(image) + "\n"
