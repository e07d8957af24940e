"""The actor that controls a run of Ray Train, so that its driver can end the run.

Train has no public way to end a run from outside. Its callbacks are called in the controller, so one of them can send
the handle of that actor. Where that class is missing, a run whose driver raises an error goes on until Ray is shut
down.
"""

from collections.abc import Callable
from typing import Any

import ray

try:
    from ray.train.v2._internal.execution.callback import ControllerCallback
except ImportError:
    ControllerCallback = None


def controller_callbacks(started: Callable[[Any], None]) -> list[Any]:
    """Return callbacks for RunConfig that call `started`, in the controller's process, with the controller's handle."""
    if ControllerCallback is None:
        return []

    class Started(ControllerCallback):
        def after_controller_start(self, train_run_context: Any) -> None:
            started(ray.get_runtime_context().current_actor)

    return [Started()]
