"""The processes that train together: what each does with its device, sums and maxima over them.

A process on its own is all of them.
"""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if is_distributed() else 1


def gather(mine: Any) -> list[Any]:
    """What each process holds, picklable, by rank: the same list everywhere."""
    if not is_distributed():
        return [mine]
    held: list[Any] = [None] * world_size()
    dist.all_gather_object(held, mine)
    return held


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum over processes, in place; the input itself when there is no process group."""
    if is_distributed():
        dist.all_reduce(values)
    return values


def all_reduce_max(values: Tensor) -> Tensor:
    """Maximum over processes, likewise."""
    if is_distributed():
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def set_up_device(device: torch.device) -> None:
    """TF32 on a GPU; on a CPU this process's share of the machine's cores."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size()))
