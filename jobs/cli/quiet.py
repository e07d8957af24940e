"""Keep what Ray prints in a job's own process off its output.

Ray prints there in three ways, and each has its own switch: Python's loggers; a thread that passes on errors of the
cluster, whatever `log_to_driver` is; and the C++ core, which writes to file descriptor 2. RAY_BACKEND_LOG_LEVEL takes
effect on the core only once a driver is connected. The logs of Ray's session hold all of these lines.
"""

import logging
import os
import sys
import warnings
from typing import Any

from dinoray.pipeline.ray_private.core import silence_errors


def quiet_ray(*, verbose: bool) -> dict[str, Any]:
    """Options of ray.init with which Ray prints nothing of its own in this process, unless `verbose`."""
    level = logging.INFO if verbose else logging.CRITICAL
    for name in ("ray", "ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(level)
    if not verbose:
        warnings.filterwarnings("ignore", module=r"ray\.")
        silence_errors()
        _drop_native_stderr()
    return {"log_to_driver": verbose, "logging_level": level}


def _drop_native_stderr() -> None:
    """Send file descriptor 2 of this process to nowhere, and keep `sys.stderr` where it is.

    All that Python writes still arrives: errors, warnings, tracebacks, and the stack of a crash. A program that has
    its own `sys.stderr` is left as it is.
    """
    try:
        if sys.stderr.fileno() != 2:
            return
    except (AttributeError, OSError, ValueError):  # no stderr at all, or one in memory
        return
    sys.stderr.flush()
    encoding, errors = sys.stderr.encoding, sys.stderr.errors
    sys.stderr = open(os.dup(2), "w", buffering=1, encoding=encoding, errors=errors)  # noqa: SIM115
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
