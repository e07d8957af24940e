"""Private names of Ray Data: resizing the pool of a running stream.

Publicly an actor pool has a least and a most size, and Ray Data chooses between them by its own rules, which never
shrink a pool that is given work and never take back a request for nodes. Without these names a stream's pool is left
to Ray Data's own rules: `MISSING` is the reason where that shows at import, and the functions below raise
MissingNameError. Of the names only `REMAINING` differs between Ray 2.58.1, 2.59.0 and 2.60.0.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import ray.data

_P = ParamSpec("_P")
_R = TypeVar("_R")


def lacking(used: Mapping[type, Sequence[str]]) -> str | None:
    """Return which of these names their classes do not have, None where they have all."""
    missing = [
        f"{kind.__name__}.{name}"
        for kind, names in used.items()
        for name in names
        if not hasattr(kind, name) and name not in getattr(kind, "__dataclass_fields__", ())
    ]
    return f"no {', '.join(missing)}" if missing else None


MISSING: str | None
"""Why pools cannot be resized with this Ray; None when they can."""
try:
    from ray.data._internal.actor_autoscaler.autoscaling_actor_pool import AutoscalingActorPool
    from ray.data._internal.cluster_autoscaler.base_cluster_autoscaler import ClusterAutoscaler

    # Backpressure policies: what decides when an operator may start with one more block.
    from ray.data._internal.execution.backpressure_policy import (
        ENABLED_BACKPRESSURE_POLICIES,
        ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
        BackpressurePolicy,  # it and ExecutionCallback have a default for each hook that a later Ray may add
    )
    from ray.data._internal.execution.execution_callback import ExecutionCallback
    from ray.data._internal.execution.interfaces import PhysicalOperator

    # A name that is only set or defined, and not called, would otherwise be missed without an error.
    MISSING = lacking(
        {
            AutoscalingActorPool: (
                *("num_running_actors", "num_pending_actors", "num_restarting_actors", "num_tasks_in_flight"),
                *("max_size", "per_actor_resource_usage"),
            ),
            BackpressurePolicy: ("can_add_input", "max_task_output_bytes_to_read"),
            ClusterAutoscaler: ("try_trigger_scaling",),
            ExecutionCallback: ("before_execution_starts", "on_execution_step"),
            PhysicalOperator: ("get_autoscaling_actor_pools",),
            ray.data.DataContext: ("custom_execution_callback_classes", "set_config"),
        }
    )
except ImportError as error:
    MISSING = str(error)
    BackpressurePolicy = ExecutionCallback = object

REMAINING: list[str] | bool = True
"""Resources of which a stream takes its share of what is left over, as Ray's own requests name them: a list of types
since Ray 2.60, all or none before."""
try:
    from ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator import STANDARD_RESOURCE_TYPES

    REMAINING = STANDARD_RESOURCE_TYPES
except ImportError:
    pass


class MissingNameError(Exception):
    """This version of Ray Data does not have a private name, or has it with another signature."""


def _or_missing(function: Callable[_P, _R]) -> Callable[_P, _R]:
    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return function(*args, **kwargs)
        except (AttributeError, TypeError) as error:
            raise MissingNameError(str(error)) from error

    return call


def add_control(
    context: "ray.data.DataContext", callback: Callable[[], Any], policy: Callable[..., Any]
) -> None:
    """Have executions under `context` call the hooks of `callback()` and obey `policy` beside Ray's own policies."""
    context.custom_execution_callback_classes = [callback]
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*ENABLED_BACKPRESSURE_POLICIES, policy])


@_or_missing
def pools(executor: Any) -> list[Any]:
    """Return the actor pools of a running execution."""
    return [pool for operator in executor._topology for pool in operator.get_autoscaling_actor_pools()]


@_or_missing
def nodes_of_actors(pool: Any) -> list[str]:
    """Return the node id of each actor of `pool` that runs and is not being restarted."""
    return [state.actor_location for state in pool._running_actors.values() if not state.is_restarting]


@_or_missing
def resize(pool: Any, size: int) -> None:
    """Set both the least and the most size of `pool`; Ray Data starts and ends actors accordingly."""
    pool._config = replace(pool._config, min_size=size, initial_size=size, max_size=size)


@_or_missing
def flow(executor: Any) -> tuple[int, int, int, int]:
    """Return the blocks that actors work at, the blocks they have made, and the bytes of the object store that the
    execution uses and may use."""
    makers = [operator for operator in executor._topology if operator.get_autoscaling_actor_pools()]
    in_work = sum(pool.num_tasks_in_flight() for pool in pools(executor))
    made = sum(operator.metrics.num_task_outputs_generated for operator in makers)
    used, limits = (
        executor._resource_manager.get_global_usage(),
        executor._resource_manager.get_global_limits(),
    )
    return in_work, made, int(used.object_store_memory), int(limits.object_store_memory)


@_or_missing
def stop_requests(executor: Any) -> None:
    """Keep the execution from requesting nodes by Ray Data's rules."""
    executor._cluster_autoscaler.try_trigger_scaling = lambda: None


@_or_missing
def request_nodes(
    executor: Any,
    resources: Sequence[dict[str, float]],
    label_selectors: Sequence[dict[str, str]],
    *,
    expire_after_seconds: float,
) -> None:
    """Request room for `resources`, each on a node with its labels, and a share of what is left over."""
    executor._cluster_autoscaler._autoscaling_coordinator.request_resources(
        resources=list(resources),
        label_selectors=list(label_selectors),
        expire_after_s=expire_after_seconds,
        request_remaining=REMAINING,
    )
