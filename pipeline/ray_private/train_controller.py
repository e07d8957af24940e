"""The actor that controls a run of Ray Train, so that its driver can end the run, and knows why workers start again.

Train has no public way to end a run from outside. Its callbacks are called in the controller, so one of them can send
the handle of that actor. The public callback for errors of workers has no part in errors of whole nodes that Train
meets while it starts workers again. Where that class is missing, a run whose driver raises an error goes on until Ray
is shut down, and a run that resumes does not say why.
"""

from collections.abc import Callable
from typing import Any

import ray

try:
    from ray.train.v2._internal.execution.callback import ControllerCallback
except ImportError:
    ControllerCallback = None


def controller_callbacks(started: Callable[[Any], None], lost: Callable[[Exception], None]) -> list[Any]:
    """Return callbacks for RunConfig, which are called in the controller's process: `started` with its handle, and
    `lost` with the error for which all workers are started again."""
    if ControllerCallback is None:
        return []

    class Started(ControllerCallback):
        def after_controller_start(self, train_run_context: Any) -> None:
            started(ray.get_runtime_context().current_actor)

        def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
            # Not while workers wait for room to start: then nothing was lost.
            if type(current_state).__name__ == "RestartingState":
                lost(current_state.training_failed_error)

    return [Started()]
