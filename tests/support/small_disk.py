"""A disk of a few kilobytes: a tmpfs, which only root may mount."""

import contextlib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class SmallDisk:
    """A mounted disk."""

    folder: Path

    def resize(self, num_bytes: int) -> None:
        """Give the disk another size."""
        command = ["mount", "-o", f"remount,size={num_bytes}", str(self.folder)]
        subprocess.run(command, check=True, capture_output=True)

    def fill(self) -> Path:
        """Write a file that takes all space that is left, and return it."""
        path = self.folder / "filler"
        with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        return path


@contextlib.contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[SmallDisk]:
    """A disk of `num_bytes`, in whole pages of 4 KiB; skips the test where no disk can be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no disk can be mounted here")
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, capture_output=True)
