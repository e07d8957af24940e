"""Compiles what pipeline/ marks as `compiled`, once per machine, where numba can be had.

Where it cannot, `compiled` leaves a function as it is, and multicrop.py takes the kernel that needs no compiler.
The machine code lies under the cache folder, in a folder named after the sources that it was made of: numba
itself looks only at the file of the function it was asked for, not at those it calls. Knows nothing of images.
"""

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from models.errors import one_line
from pipeline.storage.cache import cache_folder

MISSING = ""
"""Why there is no numba; empty where there is."""
try:
    import numba
# An ImportError too where its version does not go with numpy's, and anything where its library does not load.
except Exception as error:
    MISSING = one_line(error)

Function = TypeVar("Function", bound=Callable[..., Any])

_SOURCES = (
    "kernels/simd.py",
    "kernels/numba_crops.py",
    "kernels/numba_colour.py",
    "params.py",
    "rng.py",
    "jit.py",
)


def compiled(function: Function) -> Function:
    """The function as machine code that runs without the interpreter's lock; inlined into what calls it."""
    if MISSING:
        return function
    return numba.njit(nogil=True, error_model="numpy")(function)


def compiled_and_kept(function: Function) -> Function:
    """As `compiled`, and kept on disk: for what Python itself calls."""
    if MISSING:
        return function
    dispatcher = numba.njit(nogil=True, error_model="numpy")(function)
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(_kernel_folder())
    try:
        dispatcher.enable_caching()
    finally:
        numba.config.CACHE_DIR = before
    return dispatcher


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Hold this machine's lock on compiling: of many processes that start together one compiles, the rest load."""
    folder = _kernel_folder()
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _kernel_folder() -> Path:
    digest = hashlib.blake2b(digest_size=8)
    for name in _SOURCES:
        digest.update((Path(__file__).parent / name).read_bytes())
    name = f"kernels-{digest.hexdigest()}"
    for folder in (cache_folder(), Path(tempfile.gettempdir()) / f"dinoray-{os.getuid()}"):
        try:
            (folder / name).mkdir(parents=True, exist_ok=True)
            if os.access(folder / name, os.W_OK):
                return folder / name
        except OSError:
            continue
    return Path(tempfile.mkdtemp(prefix="dinoray-"))
