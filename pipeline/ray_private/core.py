"""Private names of Ray's core: its error messages in the driver.

A thread of the driver prints errors of the cluster, whatever `log_to_driver` is; there is no public switch. Without
this name Ray's lines appear among those of the job. The same in Ray 2.58.1, 2.59.0 and 2.60.0.
"""

from typing import Any

try:
    import ray._private.worker as worker
except ImportError:
    worker = None


def silence_errors() -> None:
    """Drop the lines that Ray's own thread would print in this process."""
    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = _print_nothing


def _print_nothing(*_: Any, **__: Any) -> None:
    pass
