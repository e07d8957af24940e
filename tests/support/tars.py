"""Tar files of images, made by Python's tarfile or by the program tar."""

import io
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path

from samples import write_all


def tar_of(members: Mapping[str, bytes], *, format: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar file of these members, in their order."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=format) as tar:
        for name, data in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
    return sink.getvalue()


def packed_by_tar(folder: Path, files: Mapping[str, bytes], *options: str) -> bytes:
    """What the program tar makes of a folder of these files."""
    write_all(folder, dict(files))
    command = ["tar", "-C", str(folder), "--sort=name", *options, "-cf", "-", "."]
    return subprocess.run(command, check=True, capture_output=True).stdout
