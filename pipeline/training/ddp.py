"""Wrap the student for training in several processes."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dinoray.models.backbone import has_batch_norm
from dinoray.models.dino import DINO
from dinoray.models.sync_batch_norm import synchronise_batch_norm
from dinoray.pipeline.training.distributed import world_size


def distribute(dino: DINO, device: torch.device) -> nn.Module:
    """Return the student wrapped in DDP, unless alone; make both networks' batch norm use all processes."""
    if world_size() == 1:
        return dino.student
    if has_batch_norm(dino.student):
        synchronise_batch_norm(dino, device)
    return wrapped(dino.student, device)


def wrapped(student: nn.Module, device: torch.device) -> DistributedDataParallel:
    """Return `student` in DDP, which adds up the gradients of what can learn now."""
    # Not static_graph: it spares the search for unused parameters, which is off anyway, and fails in the first backward
    # under no_sync, that is with several microbatches (torch 2.14: `expect_autograd_hooks_ INTERNAL ASSERT FAILED`).
    distributed = DistributedDataParallel(
        student,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,  # without a copy of all gradients
    )
    # Batch norm takes its statistics over all processes, so its buffers are equal. Set here, as the argument's name
    # depends on torch's version.
    distributed.broadcast_buffers = False
    return distributed
