"""Nodes by kind, and dollars."""

from pathlib import Path
from typing import Any

from dinoray.pipeline.cluster.cost import CostConfig
from dinoray.pipeline.cluster.nodes import count_nodes, dollars_per_hour, least_store_bytes
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.tracking.records import read_records, spent

PRICES = CostConfig(head_hourly=0.5, cpu_hourly=2, gpu_hourly=10)


def node(*, alive: bool = True, **resources: float) -> dict[str, Any]:
    return {"Alive": alive, "Resources": resources}


HEAD = node(**{"node:__internal_head__": 1.0})


def test_nodes_are_counted_by_what_they_have() -> None:
    nodes = [HEAD, node(CPU=8), node(CPU=8), node(CPU=8, alive=False), node(CPU=8, GPU=4)]
    assert count_nodes(nodes) == {"head": 1, "cpu": 2, "gpu": 1}


def test_a_head_is_one_whatever_it_has() -> None:
    machine = node(**{"node:__internal_head__": 1.0, "CPU": 8.0, "GPU": 1.0})
    assert count_nodes([machine]) == {"head": 1, "cpu": 0, "gpu": 0}


def test_the_smallest_object_store_is_that_of_a_living_node_with_cpus() -> None:
    def with_store(cpus: int, store_bytes: int, *, alive: bool = True) -> dict[str, Any]:
        return node(alive=alive, CPU=cpus, object_store_memory=float(store_bytes))

    nodes = [
        HEAD,
        with_store(0, 1),
        with_store(8, 2, alive=False),
        with_store(8, 5),
        with_store(4, 4),
        node(CPU=8),
    ]
    assert least_store_bytes(nodes) == 4
    assert least_store_bytes([HEAD]) is None


def test_an_hour_costs_what_its_nodes_cost() -> None:
    assert dollars_per_hour(PRICES, {"head": 1, "cpu": 3, "gpu": 2}) == 0.5 + 6 + 20


def test_a_resumed_run_goes_on_from_what_it_had_cost_repeated_steps_included(tmp_path: Path) -> None:
    assert spent(read_records(Directory(str(tmp_path)))) == 0
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "dollars": 0.25}\n{"step": 9, "dollars": 1.5}\n{"step": 9, "knn_10": 0.5}\n'
    )
    assert spent(read_records(Directory(str(tmp_path)))) == 1.5
