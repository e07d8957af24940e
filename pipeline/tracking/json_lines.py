"""Files with one JSON object per line, local or on S3."""

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dinoray.pipeline.storage.files import Directory, MissingObject, is_s3
from dinoray.pipeline.storage.local_files import append_to_file, replace_file


class JsonLines:
    """A file with one JSON object per line that can be appended to, local or on S3."""

    def __init__(
        self, run: Directory, name: str, *, keep: Callable[[dict[str, Any]], bool], staging: Path
    ) -> None:
        self._run, self._name, self._path = run, name, staging / name
        old = whole_lines(run, name)
        kept = "".join(f"{line}\n" for line in old if keep(json.loads(line)))
        run.on_disk(partial(replace_file, str(self._path), kept.encode()), path=str(self._path))
        self._dirty = bool(old)

    def append(self, record: Mapping[str, Any]) -> None:
        """Append one object as a line. Non-finite numbers become strings, since JSON has none."""
        line = json.dumps({k: json_number(v) for k, v in record.items()}) + "\n"
        self._run.on_disk(partial(append_to_file, str(self._path), line.encode()), path=str(self._path))
        self._dirty = True

    def sync(self) -> None:
        """Upload the file if it changed; a local run directory needs no upload."""
        if self._dirty and is_s3(self._run.uri):
            self._run.write(self._name, self._path.read_bytes())
        self._dirty = False


def whole_lines(run: Directory, name: str) -> list[str]:
    """Return the lines of a file; none if it does not exist. A last line that a kill has cut off is left out, and so
    are damaged lines, which would end each resume."""
    try:
        lines = run.read(name).decode(errors="replace").split("\n")
    except MissingObject:
        return []
    return [line for line in lines if line and _is_whole(line)]


def _is_whole(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def json_number(value: Any) -> Any:
    """Return a value as it is written: a non-finite number as a string."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
