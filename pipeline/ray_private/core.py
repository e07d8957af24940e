"""Private names of Ray's core: its error messages in the driver.

A thread of the driver prints errors of the cluster, whatever `log_to_driver` is; there is no public switch. Without
this name Ray's lines appear among those of the job.
"""

from typing import Any

import ray._private.worker


def silence_errors() -> None:
    """Drop the lines that Ray's own thread would print in this process."""
    if hasattr(ray._private.worker, "print_to_stdstream"):
        ray._private.worker.print_to_stdstream = _print_nothing


def _print_nothing(*_: Any, **__: Any) -> None:
    pass
