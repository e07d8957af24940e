"""What Ray tells of a cluster, and what tasks on its nodes find there.

Each check takes what it judges and returns findings; `look_at_nodes` is the one that starts tasks. Ray must
have been started or joined.
"""

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from platform import python_version
from typing import Any

import ray
from ray.exceptions import RayError

from dinoray.jobs.cluster.machine_checks import (
    Finding,
    check_data,
    check_disk,
    check_open_files,
    judge_clock,
    machine_facts,
)
from dinoray.models.errors import ResourceError, one_line
from dinoray.pipeline.augment.config import crop_bytes
from dinoray.pipeline.data.manifests.manifest import DataConfig
from dinoray.pipeline.storage.config import Access
from dinoray.pipeline.worker.config import Config

_HEAD = "node:__internal_head__"
_TASK_SECONDS, _GPU_SECONDS = 60.0, 120.0
_RESOURCES = ResourceError.exit_code
LATE = "no answer"
"""Stands for what a task found that was not run in time."""

Node = Mapping[str, Any]


def living_nodes() -> list[Node]:
    """The nodes that are up, the head first."""
    return sorted((n for n in ray.nodes() if n["Alive"]), key=lambda n: _HEAD not in n["Resources"])


def check_nodes(nodes: Sequence[Node]) -> Finding:
    """How many of which kind."""
    kinds = Counter(_kind(node) for node in nodes)
    total = {name: sum(node["Resources"].get(name, 0) for node in nodes) for name in ("CPU", "GPU")}
    text = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    return Finding("ok", "nodes", f"{text}: {total['CPU']:.0f} CPUs, {total['GPU']:.0f} GPUs in total")


def check_labels(nodes: Sequence[Node]) -> list[Finding]:
    """The labels of each node, but for its id."""
    found = []
    for node in nodes:
        labels = {k: v for k, v in node.get("Labels", {}).items() if k != "ray.io/node-id"}
        text = ", ".join(f"{k}={v}" for k, v in sorted(labels.items())) or "no labels"
        found.append(Finding("ok", "labels", f"{name_of(node)}: {text}"))
    return found


def check_fit(nodes: Sequence[Node], config: Config, *, is_local: bool) -> list[Finding]:
    """CPUs and GPUs for the train workers, and CPUs for the data beside them.

    A local Ray is given as many CPUs as the run asks for. A head without CPUs is a cluster that grows: there
    the run waits for what is not up yet.
    """
    have = {name: sum(node["Resources"].get(name, 0) for node in nodes) for name in ("CPU", "GPU")}
    free = ray.available_resources()
    asked = config.resources
    grows = any(_HEAD in node["Resources"] and not node["Resources"].get("CPU") for node in nodes)
    streams = config.data.streams
    train, needed = asked.train_cpus, asked.least_cpus(streams)
    text = (
        f"{have['CPU']:.0f} CPUs, the run needs {needed}: {train:g} for resources.train_workers="
        f"{asked.least_workers}, {asked.least_actors(streams) * asked.cpus_per_augment_actor:g} for data, "
        f"{f'{asked.evaluator_cpus:g} for the evaluator, ' if asked.evaluator_cpus else ''}1 for Ray"
    )
    found = []
    if is_local and have["CPU"] < needed:
        found.append(Finding("warn", "CPUs", f"{text}; processes will share CPUs"))
    elif have["CPU"] < needed:
        found.append(_lacks("CPUs", text, grows, "lower resources.train_workers or add nodes"))
    elif free.get("CPU", 0) < needed:
        text += f"; other jobs use {have['CPU'] - free.get('CPU', 0):.0f} CPUs: the run waits until they end"
        found.append(Finding("warn", "CPUs", text))
    else:
        text += f"; {have['CPU'] - train - 1:.0f} CPUs are left to fetch and crop"
        found.append(Finding("ok", "CPUs", text))
    if asked.use_gpu is True and have["GPU"] < asked.least_workers:
        text = f"{have['GPU']:.0f} GPUs, resources.train_workers={asked.least_workers} need one each"
        found.append(
            _lacks("GPUs", text, grows, "lower resources.train_workers or set resources.use_gpu=false")
        )
    elif asked.use_gpu == "auto" and not have["GPU"]:
        text = "no GPU is up: the run trains on CPUs; set resources.use_gpu=true to wait for GPU nodes"
        found.append(Finding("ok" if is_local else "warn", "GPUs", text))
    return found


def check_object_store(nodes: Sequence[Node], config: Config) -> Finding:
    """Room for the batches under way: those that train workers hold ready, and one more being made of each."""
    store = sum(node["Resources"].get("object_store_memory", 0) for node in nodes)
    batch = config.train.global_batch_size * crop_bytes(config.crops)
    needed = (config.resources.prefetch_batches + 2) * batch
    text = f"{store / 1e9:.1f} GB, a batch takes {batch / 1e9:.2f} GB"
    if store < needed:
        remedy = "start Ray with more --object-store-memory, or lower train.global_batch_size"
        return Finding("warn", "object store", f"{text}: batches will be spilled to disk; {remedy}")
    return Finding("ok", "object store", text)


def check_dashboard(url: str, *, is_open: bool | None) -> Finding:
    """The dashboard runs any code that it is sent: only the machine itself, or who has a token, may reach it.

    `is_open`: whether it answers who has none; None where it is not reached.
    """
    host = url.rpartition(":")[0]
    if is_open is None:
        return Finding(
            "ok",
            "dashboard",
            f"{url} is not reachable from this machine; access from elsewhere was not checked",
        )
    if not is_open:
        return Finding("ok", "dashboard", f"{url} requires a token")
    if host in ("127.0.0.1", "localhost", "[::1]"):
        return Finding("ok", "dashboard", f"{url} is reachable from the head only")
    remedy = "start the head with --dashboard-host=127.0.0.1, or with RAY_AUTH_MODE=token"
    return Finding("warn", "dashboard", f"anyone who can reach {url} can run code there; {remedy}")


def look_at_nodes(nodes: Sequence[Node], config: Config, *, is_local: bool) -> list[Finding]:
    """Run a task on each node, and one on a GPU of each that has any; a cluster's nodes read the data as well."""
    data = None if is_local else (config.data, config.storage.access)
    asked = {
        name_of(node): ray.remote(num_cpus=0, label_selector=_here(node))(_look).remote(data, name_of(node))
        for node in nodes
    }
    began = time.time()
    found: list[Finding] = []
    answers = _answers(asked, _TASK_SECONDS)
    for name, answer in answers.items():
        if not isinstance(answer, dict):
            found.append(Finding("FAIL", "node", f"{name}: {answer}", _RESOURCES))
            continue
        ours = (ray.__version__, python_version())
        if answer["versions"] != ours:
            text = "{}: Ray {}, Python {}; here Ray {}, Python {}: use one image for all nodes".format(
                name, *answer["versions"], *ours
            )
            found.append(Finding("FAIL", "node", text, _RESOURCES))
        found.append(check_open_files(answer["open_files"], name))
        found += [check_disk(disk, room, name) for disk, room in answer["disks"].items()]
        found += [Finding(*of_source) for of_source in answer["data"]]
        if not is_local:
            late = max(0.0, began - answer["time"]) or min(0.0, time.time() - answer["time"])
            found.append(judge_clock(late, f"{name}, against here"))
    gpu_nodes = [node for node in nodes if node["Resources"].get("GPU", 0)]
    if not gpu_nodes:
        return [*found, Finding("ok", "CUDA", "no GPU node is up: not checked")]
    asked = {
        name_of(node): ray.remote(num_cpus=0, num_gpus=1, label_selector=_here(node))(_try_gpu).remote()
        for node in gpu_nodes
    }
    for name, answer in _answers(asked, _GPU_SECONDS).items():
        found.append(judge_gpu(name, answer))
    return found


def judge_gpu(name: str, answer: Any) -> Finding:
    """What a task found on a GPU of the node `name`: its facts, LATE, or the error in words."""
    if isinstance(answer, dict):
        return Finding(
            "ok", "CUDA", f"{name}: {answer['device']}, torch {answer['torch']}, NCCL {answer['nccl']}"
        )
    if answer == LATE:
        return Finding("warn", "CUDA", f"{name}: its GPUs are in use by other jobs: not checked")
    remedy = "install a torch build for the driver's CUDA, and check nvidia-smi on the node"
    return Finding("FAIL", "CUDA", f"{name}: {answer}; {remedy}", _RESOURCES)


def _answers(asked: Mapping[str, Any], timeout_seconds: float) -> dict[str, Any]:
    """What each task returned, or in words why it did not."""
    refs = list(asked.values())
    done, _ = ray.wait(refs, num_returns=len(refs), timeout=timeout_seconds)
    answers: dict[str, Any] = {}
    for name, ref in asked.items():
        if ref not in done:
            ray.cancel(ref)
            answers[name] = LATE
            continue
        try:
            answers[name] = ray.get(ref)
        except RayError as error:
            answers[name] = one_line(getattr(error, "cause", None) or error)
    return answers


def _look(data: tuple[DataConfig, Access] | None, where: str) -> dict[str, Any]:
    """In a task: the node's limits, disks, versions and clock, and whether it can read the data."""
    return {
        **machine_facts(_spill_folders()),
        "versions": (ray.__version__, python_version()),
        "time": time.time(),
        "data": [tuple(check_data(one, where, data[1])) for one in data[0].each_source] if data else [],
    }


def _spill_folders() -> list[str]:
    """Where this node's raylet, the parent of each worker, puts what its object store cannot hold."""
    with open(f"/proc/{os.getppid()}/cmdline") as file:
        words = file.read().split("\0")
    folders = [word.partition("=")[2] for word in words if word.startswith("--fallback_directory=")]
    return [folder for folder in folders if os.path.isdir(folder)]


def _try_gpu() -> dict[str, str]:
    """In a task with a GPU: multiply there, and reduce with NCCL over a group of one."""
    import torch
    from torch import distributed

    device = torch.device("cuda", 0)
    ones = torch.ones(64, 64, device=device) @ torch.ones(64, 64, device=device)
    distributed.init_process_group("nccl", store=distributed.HashStore(), rank=0, world_size=1)
    distributed.all_reduce(ones)
    torch.cuda.synchronize()
    distributed.destroy_process_group()
    version = ".".join(map(str, torch.cuda.nccl.version()))
    return {"device": torch.cuda.get_device_name(0), "torch": torch.__version__, "nccl": version}


def name_of(node: Node) -> str:
    """A node in words: its kind and address."""
    return f"{_kind(node)} {node['NodeManagerAddress']}"


def _kind(node: Node) -> str:
    if _HEAD in node["Resources"]:
        return "head"
    group = node.get("Labels", {}).get("ray.io/node-group")
    return str(group or ("GPU node" if node["Resources"].get("GPU") else "CPU node"))


def _here(node: Node) -> dict[str, str]:
    return {"ray.io/node-id": node["NodeID"]}


def _lacks(name: str, text: str, grows: bool, remedy: str) -> Finding:
    if grows:
        return Finding("warn", name, f"{text}; the run waits for nodes to join")
    return Finding("FAIL", name, f"{text}; {remedy}", _RESOURCES)
