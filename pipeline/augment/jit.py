"""Compile the functions marked `compiled`, once per machine, where numba is available.

Without numba, `compiled` leaves a function as it is, and multicrop.py uses the kernel that needs no compiler.
The machine code is stored under the cache folder, in a folder named after its source files. numba itself
would check only the file of the requested function, not the files of the functions it calls. No images here.
"""

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from dinoray.models.errors import one_line
from dinoray.pipeline.storage.cache import cache_folder

MISSING = ""
"""Reason why numba is unavailable; empty if it is available."""
try:
    import numba
# ImportError also occurs if numba's version does not match numpy's; a broken library can raise anything.
except Exception as error:
    MISSING = one_line(error)

Function = TypeVar("Function", bound=Callable[..., Any])

_SOURCES = (
    "kernels/simd.py",
    "kernels/numba_crops.py",
    "kernels/numba_colour.py",
    "params.py",
    "later_draws.py",
    "stains.py",
    "rng.py",
    "jit.py",
)


def compiled(function: Function) -> Function:
    """Compile the function to machine code that releases the interpreter's lock; callers inline it."""
    if MISSING:
        return function
    return numba.njit(nogil=True, error_model="numpy")(function)


def njit_cached(function: Function) -> Function:
    """Compile as `compiled` does and cache on disk: for functions that Python itself calls."""
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
    """Hold this machine's lock on compiling: one of many starting processes compiles, the rest load."""
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
