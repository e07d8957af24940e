"""Collectives over the training processes, and the setup of each process's device.

A process without a process group counts as rank 0 of 1.
"""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Return True if there is a process group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return this process's rank."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if is_distributed() else 1


def gather(mine: Any) -> list[Any]:
    """Return the picklable values of all processes, by rank; the list is the same on all processes."""
    if not is_distributed():
        return [mine]
    held: list[Any] = [None] * world_size()
    dist.all_gather_object(held, mine)
    return held


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum over processes, in place; without a process group, return the input."""
    if is_distributed():
        dist.all_reduce(values)
    return values


def all_reduce_max(values: Tensor) -> Tensor:
    """Take the maximum over processes, in place; without a process group, return the input."""
    if is_distributed():
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def set_up_device(device: torch.device, *, num_processes: int | None = None) -> None:
    """Enable TF32 on a GPU; on a CPU, limit torch's threads to this process's share of the cores.

    `num_processes`: processes that share the cores; None: those of the process group.
    """
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // (num_processes or world_size())))
