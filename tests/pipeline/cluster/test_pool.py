"""What Ray Data is told about the pool of augment actors. The whole of it, on a cluster: test_autoscaling.py."""

from types import SimpleNamespace
from typing import Any

import pytest
import ray

from dinoray.pipeline.cluster.pool_control import DrainPolicy, PoolControl, reservation
from dinoray.pipeline.cluster.pool_mailbox import PoolMailbox, PoolPlan
from dinoray.pipeline.cluster.pool_size import Actors, PoolSize
from dinoray.pipeline.cluster.stalls import Flow


def operator(*, running: int, most: int, in_flight: int) -> SimpleNamespace:
    """As much of Ray's operator as is asked."""
    pool = SimpleNamespace(
        num_running_actors=lambda: running, max_size=lambda: most, num_tasks_in_flight=lambda: in_flight
    )
    return SimpleNamespace(get_autoscaling_actor_pools=lambda: [pool])


def test_a_pool_of_the_right_size_takes_what_ray_gives_it() -> None:
    assert DrainPolicy().can_add_input(operator(running=3, most=3, in_flight=12))


def test_a_pool_that_is_too_large_takes_less_than_would_keep_all_its_actors_at_work() -> None:
    assert not DrainPolicy().can_add_input(operator(running=3, most=2, in_flight=2))
    assert DrainPolicy().can_add_input(operator(running=3, most=2, in_flight=1))


def test_what_is_no_pool_is_not_held_back() -> None:
    assert DrainPolicy().can_add_input(SimpleNamespace(get_autoscaling_actor_pools=list))


def test_actors_that_run_are_reserved_where_they_are_and_those_to_come_anywhere() -> None:
    actors = [
        SimpleNamespace(actor_location=node, is_restarting=lost)
        for node, lost in (("a", False), ("b", True), ("c", False))
    ]
    pool = SimpleNamespace(
        _running_actors=dict(enumerate(actors)), per_actor_resource_usage=lambda: SimpleNamespace(cpu=2)
    )
    there = [{"ray.io/node-id": "a"}, {"ray.io/node-id": "c"}]
    assert reservation(pool, 3) == ([{"CPU": 2}] * 3, [*there, {}])
    assert reservation(pool, 1) == ([{"CPU": 2}] * 2, there)  # until the other one has gone


class Values:
    """A channel's values, without an actor."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}
        self.put, self.get = self._values.__setitem__, self._values.get

    def merge(self, name: str, values: dict[Any, Any]) -> None:
        self._values[name] = self._values.get(name, {}) | values


def test_nothing_is_logged_of_pools_before_their_first_state_and_then_their_sum() -> None:
    mailbox = PoolMailbox(Values())  # type: ignore[arg-type]
    assert mailbox.begin() is None
    assert mailbox.metrics() == {}
    size = PoolSize(1, 8, target=5, cool_down_seconds=60)
    mailbox.send_actors(0, Actors(2, 1))
    mailbox.send_plan(PoolPlan(size, (1.0, 1.0)))
    assert mailbox.metrics() == {"augment_actors": 2, "augment_target": 5}
    mailbox.send_actors(1, Actors(1, 1))
    mailbox.send_actors(0, Actors(3, 0))
    assert mailbox.metrics() == {"augment_actors": 4, "augment_target": 5}
    kept = mailbox.begin()
    assert kept is not None
    assert kept.size is size
    assert mailbox.metrics() == {}


def test_the_flow_of_a_run_is_the_sum_over_its_streams_since_they_began() -> None:
    mailbox = PoolMailbox(Values())  # type: ignore[arg-type]
    assert mailbox.flow() is None
    mailbox.send_flow(0, Flow(2, 1, 4, 10, 100, 1000))
    mailbox.send_flow(1, Flow(1, 0, 2, 5, 50, 1000))
    mailbox.send_flow(0, Flow(3, 0, 4, 12, 100, 1000))
    assert mailbox.flow() == (4, 0, 6, 17, 150, 2000)
    mailbox.begin()
    assert mailbox.flow() is None


class Notes:
    """A channel that keeps what is posted."""

    def __init__(self) -> None:
        self.posted: list[str] = []

    def post(self, kind: str, *, text: str) -> None:
        assert kind == "note"
        self.posted.append(text)


@pytest.mark.parametrize(
    ("executor", "missing"),
    [
        (SimpleNamespace(), "_cluster_autoscaler"),
        (SimpleNamespace(_cluster_autoscaler=SimpleNamespace()), "_topology"),
    ],
)
def test_a_ray_without_the_private_names_leaves_the_pool_as_it_is_and_warns_once(
    executor: Any, missing: str
) -> None:
    notes = Notes()
    size = PoolSize(1, 4, target=1, cool_down_seconds=60)
    control = PoolControl(notes, PoolPlan(size, (1.0,)))  # type: ignore[arg-type]
    control.before_execution_starts(executor)
    for _ in range(3):
        control._next = 0.0
        control.on_execution_step(executor)
    (text,) = notes.posted
    assert text.startswith(
        f"warning: the pool of augment actors cannot be resized with Ray {ray.__version__}"
    )
    assert missing in text
    assert text.endswith("set resources.augment_actors to one number")
