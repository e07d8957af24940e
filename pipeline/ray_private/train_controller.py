"""The actor that controls a run of Ray Train: its driver can end the run, and knows which nodes are taken back and why
workers start again.

Train has no public way to end a run from outside. Its callbacks are called in the controller, so one of them can send
the handle of that actor. The public callback for errors of workers has no part in errors of whole nodes that Train
meets while it starts workers again; and workers learn of nodes that are taken back only by a call that all of them make
together. Where that class is missing, a run whose driver raises an error goes on until Ray is shut down, a run that
resumes does not say why, and one whose node is taken back resumes from the last regular checkpoint.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import ray

try:
    from ray.train.v2._internal.execution.callback import ControllerCallback
except ImportError:
    ControllerCallback = None


os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
"""Seconds between two looks of Ray Train for nodes that are taken back: of 30 s, its own 5 would be too many."""


def controller_callbacks(
    started: Callable[[Any], None],
    lost: Callable[[Exception], None],
    taken_back: Callable[[Sequence[str], int | None], None],
) -> list[Any]:
    """Return callbacks for RunConfig, which are called in the controller's process: `started` with its handle, `lost`
    with the error for which all workers are started again, and `taken_back` with the ids of nodes of train workers that
    are taken back and the earliest time for which that is announced, in ms of UNIX time."""
    if ControllerCallback is None:
        return []

    class Started(ControllerCallback):
        def after_controller_start(self, train_run_context: Any) -> None:
            started(ray.get_runtime_context().current_actor)

        def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
            # Not while workers wait for room to start: then nothing was lost.
            if type(current_state).__name__ == "RestartingState":
                lost(current_state.training_failed_error)
            before, now = (
                getattr(state, "preemption_info", None) for state in (previous_state, current_state)
            )
            if now is None:
                return
            more = set(now.preempted_node_ids) - set(before.preempted_node_ids if before else ())
            if more:
                taken_back(sorted(more), now.deadline_ms)

    return [Started()]
