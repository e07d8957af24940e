"""How many train workers are started, and how often, by Ray Train's own policies with our changes."""

from types import SimpleNamespace
from typing import Any

import pytest
from ray.train import FailureConfig, ScalingConfig, WorkerGroupError

from dinoray.pipeline.data.partition import dividing_workers
from dinoray.pipeline.ray_private import train_policies

GPU_NODE = {"GPU": 1.0, "CPU": 8.0}


class Cluster:
    """Nodes by id as Ray Train has reserved them, those that stay, and a clock; `policy` of 1 to 4 workers, not 3."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reserved: Any = {}
        self.gone: set[str] = set()
        self.seconds, self.grown = 1000.0, []  # type: float, list[tuple[int, int]]
        monkeypatch.setattr(
            train_policies,
            "staying_nodes",
            lambda: [{"NodeID": node} for node in self.reserved if node not in self.gone],
        )
        monkeypatch.setattr(train_policies, "time", SimpleNamespace(monotonic=lambda: self.seconds))
        config = ScalingConfig(
            num_workers=(1, 4),
            use_gpu=True,
            resources_per_worker={"CPU": 1, "GPU": 1},
            elastic_resize_monitor_interval_s=0,
        )
        sizes = dividing_workers(64, 1, 1, 4)
        self.policy = train_policies._scaling_policy(config, sizes, lambda *sizes: self.grown.append(sizes))
        monkeypatch.setattr(self.policy, "_get_reserved_resources", lambda: self.reserved)
        monkeypatch.setattr(self.policy, "_maybe_send_resource_request", lambda: None)

    def has(self, nodes: int) -> None:
        self.reserved = {f"n{number}": GPU_NODE for number in range(nodes)}

    def start(self) -> int | None:
        """The number of workers that are to start; None: they wait."""
        return getattr(self.policy.make_decision_for_non_running_worker_group(), "num_workers", None)

    def train(self, workers: int) -> None:
        state = SimpleNamespace(num_workers=workers, start_time=0.0)
        decision = self.policy.make_decision_for_running_worker_group(
            worker_group_state=state, worker_group_status=None
        )
        assert not hasattr(decision, "num_workers"), "workers that train are not ended from outside"


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


@pytest.mark.parametrize(("nodes", "workers"), [(0, None), (1, 1), (2, 2), (3, 2), (4, 4), (9, 4)])
def test_as_many_workers_start_as_there_is_room_for_and_the_batch_divides_among(
    cluster: Cluster, nodes: int, workers: int | None
) -> None:
    cluster.has(nodes)
    assert cluster.start() == workers


def test_a_lost_node_does_not_count_although_it_is_still_reserved(cluster: Cluster) -> None:
    cluster.has(4)
    cluster.gone = {"n0"}
    assert cluster.start() == 2
    cluster.gone = set(cluster.reserved)
    assert cluster.start() is None


def test_room_for_more_is_told_and_nothing_ends_from_outside(cluster: Cluster) -> None:
    cluster.has(1)
    assert cluster.start() == 1
    cluster.train(1)
    cluster.has(3)
    cluster.train(1)
    assert cluster.grown == [(1, 2)]
    cluster.has(1)
    cluster.train(2)
    assert cluster.grown == [(1, 2)]


def test_a_number_that_does_not_start_is_left_for_a_while_and_a_smaller_one_trains(cluster: Cluster) -> None:
    cluster.has(4)
    assert [cluster.start() for _ in range(4)] == [4, 2, 1, 1]
    cluster.train(1)
    assert cluster.grown == []
    cluster.seconds += train_policies._AGAIN_SECONDS
    cluster.train(1)
    assert cluster.grown == [(1, 4)]


def test_a_number_that_did_not_start_is_tried_again_once_another_node_has_joined(cluster: Cluster) -> None:
    """Right after a loss Ray may still count the lost node, whose workers then do not start."""
    cluster.has(2)
    assert cluster.start() == 2
    cluster.gone = {"n1"}
    assert cluster.start() == 1
    cluster.train(1)
    assert cluster.grown == []
    cluster.has(3)
    cluster.train(1)
    assert cluster.grown == [(1, 2)]


def test_workers_that_trained_and_are_lost_start_again_in_the_same_number(cluster: Cluster) -> None:
    cluster.has(2)
    for _ in range(3):
        assert cluster.start() == 2
        cluster.train(2)


def test_failures_add_up_only_until_there_is_a_new_checkpoint() -> None:
    newest = [None, None, None, 8, 8, 8, 16, 16]
    policy = train_policies._failure_policy(FailureConfig(max_failures=2), iter(newest).__next__)
    lost = WorkerGroupError("gone", {0: RuntimeError()})
    decisions = [policy.make_decision(lost).name for _ in newest]
    assert decisions == ["RETRY", "RETRY", "RAISE", "RETRY", "RETRY", "RAISE", "RETRY", "RETRY"]
