"""What a run says while nodes are missing, how long it waits, and what it says when it goes on."""

import re
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, NodeDiedError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from dinoray.models.errors import ResourceError
from dinoray.pipeline.cluster.capacity import BROKEN, CapacityWatch, Demand, NodeType
from dinoray.pipeline.cluster.lost_ray import describe_loss
from dinoray.pipeline.cluster.resources import ResourcesConfig

MINUTES = 10


def node(*, alive: bool = True, **resources: float) -> dict[str, Any]:
    """As one of `ray.nodes()`."""
    return {"Alive": alive, "Resources": resources, "NodeID": "a", "NodeManagerAddress": "10.0.0.1"}


def demand(*, use_gpu: bool = True, **resources: Any) -> Demand:
    """Of 2 train workers, an augment actor and a CPU for Ray."""
    settings = {"train_workers": 2, "augment_actors": 1, "wait_for_nodes_minutes": MINUTES, **resources}
    return Demand(ResourcesConfig(**settings), use_gpu)


class Cluster:
    """Nodes that a test changes, with a clock of its own."""

    def __init__(self, *nodes: dict[str, Any], resources: Demand | None = None) -> None:
        self.nodes, self.free, self.seconds = list(nodes), {"CPU": 100.0, "GPU": 100.0}, 0.0
        self.types: list[NodeType] = []
        self.watch = CapacityWatch(
            resources or demand(),
            lambda: self.nodes,
            lambda: self.free,
            node_types=lambda: self.types,
            now=lambda: self.seconds,
        )

    def told_in(self, seconds: float) -> list[tuple[float, str]]:
        """(time, line) of what is said while so many seconds pass, with a look twice a second."""
        lines, end = [], self.seconds + seconds
        while self.seconds < end:
            self.seconds += 0.5
            line = self.watch.look()
            if line is not None:
                lines.append((self.seconds, line))
        return lines


BOTH = (node(CPU=8, GPU=1), node(CPU=8, GPU=1))


@pytest.mark.parametrize(
    ("nodes", "more", "missing"),
    [
        (BOTH, {}, ""),
        ([node(CPU=8, GPU=1)], {}, "have 1 of 2 GPUs"),
        ([BOTH[0], node(CPU=8, GPU=1, alive=False)], {}, "have 1 of 2 GPUs"),
        ([], {}, "have 0 of 2 GPUs and 0 of 4 CPUs"),
        ([node(CPU=1, GPU=2)], {}, "have 1 of 4 CPUs"),
        ([node(CPU=3)], {"use_gpu": False}, "have 3 of 4 CPUs"),
        # All there, but no node has room for one.
        (
            [node(CPU=3, GPU=1), node(CPU=5, GPU=1)],
            {"cpus_per_train_worker": 3},
            "",
        ),
        (
            [node(CPU=2, GPU=2), node(CPU=8)],
            {"cpus_per_train_worker": 3},
            "have nodes for 0 of 2 train workers with 3 CPUs and a GPU each",
        ),
        ([node(CPU=2, GPU=2)], {"cpus_per_train_worker": 0}, ""),
        # The least of a range is enough.
        ([node(CPU=8, GPU=1)], {"train_workers": (1, 4)}, ""),
        ([node(CPU=8)], {"train_workers": (1, 4)}, "have 0 of 1 GPUs"),
    ],
)
def test_what_is_missing_is_counted_by_resource(
    nodes: list[dict[str, Any]], more: dict[str, Any], missing: str
) -> None:
    assert demand(**more).missing(nodes)[0] == missing


def test_a_start_that_lacks_nodes_is_told_every_30_seconds() -> None:
    cluster = Cluster(BOTH[0])
    assert cluster.told_in(95) == [
        (30, "waiting for nodes: have 1 of 2 GPUs, for 29 s of at most 10 min"),
        (60, "waiting for nodes: have 1 of 2 GPUs, for 59 s of at most 10 min"),
        (90, "waiting for nodes: have 1 of 2 GPUs, for 89 s of at most 10 min"),
    ]
    cluster.nodes.append(BOTH[1])
    assert cluster.told_in(100) == []


@pytest.mark.parametrize(
    ("types", "said"),
    [
        ([], ""),
        (
            [NodeType("a100", {"GPU": 8, "CPU": 64}, 2), NodeType("cpu", {"CPU": 16}, -1)],
            "; node type a100 brings 8 GPUs a node, at most 2 nodes",
        ),
        ([NodeType("l4", {"GPU": 1}, -1)], "; node type l4 brings 1 GPUs a node"),
        ([NodeType("cpu", {"CPU": 16}, 4)], "; no node type of this cluster brings GPUs"),
    ],
)
def test_the_line_names_the_node_types_that_could_bring_what_is_missing(
    types: list[NodeType], said: str
) -> None:
    cluster = Cluster(BOTH[0])
    cluster.types = types
    assert cluster.told_in(30) == [
        (30, f"waiting for nodes: have 1 of 2 GPUs, for 29 s of at most 10 min{said}")
    ]


def test_a_lost_node_that_does_not_come_back_is_told_at_once_and_ends_the_run_in_the_end() -> None:
    cluster = Cluster(*BOTH)
    cluster.watch.placed()
    cluster.watch.trains(40)
    cluster.nodes.pop()
    cluster.watch.lost("node 10.0.0.7 lost")
    lines = cluster.told_in(599)
    assert lines[0][0] <= 2
    assert len(lines) == 20
    with pytest.raises(ResourceError, match=r"resources\.wait_for_nodes_minutes=10: .*have 1 of 2 GPUs"):
        cluster.told_in(3)


def test_a_run_without_steps_tells_what_its_augment_actors_lack() -> None:
    cluster = Cluster(node(CPU=3, GPU=2))
    for step in range(100):
        cluster.watch.trains(step)
        assert cluster.told_in(20) == []  # it trains, however slowly
    assert [line for _, line in cluster.told_in(50)] == [
        "waiting for nodes: have 3 of 4 CPUs, for 0 s of at most 10 min",
        "waiting for nodes: have 3 of 4 CPUs, for 30 s of at most 10 min",
    ]


@pytest.mark.parametrize(
    "remedy", ["add nodes", "resources.train_workers", "resources.wait_for_nodes_minutes"]
)
def test_each_remedy_ends_the_error(remedy: str) -> None:
    def ends(nodes: tuple[dict[str, Any], ...], resources: Demand) -> str:
        cluster = Cluster(*nodes, resources=resources)
        with pytest.raises(ResourceError) as ended:
            cluster.told_in(60 * MINUTES + 2)
        return str(ended.value)

    assert remedy in ends(BOTH[:1], demand())
    nodes = BOTH if remedy == "add nodes" else BOTH[:1]
    less = {"resources.train_workers": {"train_workers": 1}}
    higher = {"resources.wait_for_nodes_minutes": {"wait_for_nodes_minutes": 2 * MINUTES}}
    Cluster(*nodes, resources=demand(**(less | higher).get(remedy, {}))).told_in(60 * MINUTES + 2)


def test_time_in_which_nothing_is_missing_ends_the_wait() -> None:
    cluster = Cluster(BOTH[0])
    for _ in range(5):
        cluster.told_in(60 * MINUTES - 5)
        cluster.nodes.append(BOTH[1])
        cluster.told_in(2)
        cluster.nodes.pop()


def test_nodes_that_others_use_are_told_only_while_no_worker_has_started() -> None:
    cluster = Cluster(*BOTH)
    cluster.free = {"CPU": 9, "GPU": 1}
    assert [line for _, line in cluster.told_in(40)] == [
        "waiting for nodes: 1 of 2 GPUs are free, for 0 s of at most 10 min"
    ]
    cluster.watch.placed()
    cluster.free = {}
    assert cluster.told_in(100) == []


def test_workers_that_ended_by_themselves_repeat_nothing() -> None:
    cluster = Cluster(*BOTH)
    cluster.watch.trains(40)
    cluster.watch.lost("from 1 to 2 train workers", 43)
    cluster.seconds += 20
    assert cluster.watch.resumed(43) == (
        "from 1 to 2 train workers after step 43: resuming from step 43 after 20 s, 0 steps repeated"
    )


@pytest.mark.parametrize(
    ("cpus", "range_", "actors"),
    [(4, (1, 1), 2), (4, (1, 2), 1), (3, (1, 2), 1), (9, (1, 4), 4), (9, (4, 4), 4), (2, (2, 4), -1)],
)
def test_cpus_that_are_spare_are_those_beside_the_workers_that_fit(
    cpus: int, range_: tuple[int, int], actors: int
) -> None:
    assert ResourcesConfig(train_workers=range_).spare_actors(cpus) == actors


def test_a_run_that_resumes_says_why_and_what_it_cost() -> None:
    cluster = Cluster(*BOTH)
    assert cluster.watch.resumed(32) == "resuming from step 32"
    cluster.watch.trains(40)
    cluster.watch.lost("node 10.0.0.7 lost")
    cluster.seconds += 31
    cluster.watch.lost("train worker 0 on node 10.0.0.8 died")  # in the wake of the first
    assert cluster.watch.resumed(32) == (
        "node 10.0.0.7 lost after step 40: resuming from step 32 after 31 s, 8 steps repeated"
    )
    assert cluster.watch.resumed(32) == "resuming from step 32"


def test_a_broken_connection_is_named_by_the_node_that_has_gone() -> None:
    other = BOTH[1] | {"NodeID": "b", "NodeManagerAddress": "10.0.0.2"}
    cluster = Cluster(BOTH[0], other)
    cluster.watch.trains(40)
    cluster.told_in(0.5)
    cluster.watch.lost(BROKEN)
    cluster.nodes = [BOTH[0], other | {"Alive": False}, other | {"NodeID": "c"}]
    assert cluster.watch.resumed(40).startswith("node 10.0.0.2 lost after step 40: ")
    cluster.watch.trains(41)
    cluster.told_in(10)
    cluster.watch.lost(BROKEN)  # all nodes are there: a worker was killed
    assert cluster.watch.resumed(41).startswith(f"{BROKEN} after step 41: ")


DIED = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: RayTrainWorker\n\tpid: 12\n"
    "\tnamespace: a\n\tip: 10.0.0.7\nThe actor is dead because its {} has died."
)


def died(what: str) -> ActorDiedError:
    error = ActorDiedError()
    error.error_msg = DIED.format(what)
    return error


def unhealthy(error: Exception) -> WorkerHealthCheckFailedError:
    """As Ray Train words it."""
    return WorkerHealthCheckFailedError("A worker health check failed.\nWorker info: Worker(", failure=error)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (WorkerGroupError("", {0: RuntimeError("reset"), 1: died("node")}), "node 10.0.0.7 lost"),
        (WorkerGroupError("", {1: died("worker process")}), "train worker 1 on node 10.0.0.7 died"),
        (WorkerGroupError("", {1: NodeDiedError("gone")}), "its node lost"),
        (
            WorkerGroupError("", {0: RuntimeError("reset"), 1: unhealthy(died("worker process"))}),
            "train worker 1 on node 10.0.0.7 died",
        ),
        (WorkerGroupError("", {1: unhealthy(died("node"))}), "node 10.0.0.7 lost"),
        (
            WorkerGroupError(
                "", {1: RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [12")}
            ),
            BROKEN,
        ),
        (WorkerGroupError("", {3: KeyError("x")}), "train worker 3 failed ('x')"),
        (ControllerError(RuntimeError("no room")), "train workers lost (no room)"),
    ],
)
def test_a_loss_is_named_by_its_cause(error: Exception, told: str) -> None:
    assert describe_loss(error) == told
    assert re.fullmatch(r"[^\n]+", told)
