"""Batch norm over the batches of all processes, on CPUs as well as on GPUs.

On GPUs, timm's conversion replaces the modules. torch's synchronised modules refuse CPU tensors, so on CPUs each
module keeps its parameters, buffers and names, and only the `F.batch_norm` inside its forward is replaced. Knows
torch.distributed; nothing of heads, losses or data. Axes: N rows, C channels, W processes.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode


def synchronise_batch_norm(network: nn.Module, device: torch.device) -> None:
    """Make the layers of a network take batch statistics over all processes; state-dict names stay the same.

    Each process must then run the same forwards and backwards in training mode. Eval mode needs no other process.
    """
    if device.type == "cuda":
        # torch's own conversion loses the activation of timm's BatchNormAct2d.
        convert_sync_batchnorm(network)
        return
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            kind: Any = type(module)
            module.__class__ = _synchronised(kind)


class _Synchronised(nn.Module):
    """Mixin before a batch-norm class: its forward, with `F.batch_norm` over all processes."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        with _OverAllProcesses():
            return super().forward(x)


@cache
def _synchronised(kind: Any) -> Any:
    if issubclass(kind, _Synchronised):
        return kind
    return type(f"Synchronised{kind.__name__}", (_Synchronised, kind), {})


class _OverAllProcesses(TorchFunctionMode):
    """Replace `F.batch_norm` inside the block; leave all other functions as they are."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return (_batch_norm if func is F.batch_norm else func)(*args, **(kwargs or {}))


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.batch_norm` in training mode, with the mean and variance of the rows of all processes."""
    mean, var, count = _global_statistics(x.detach())
    if count < 2:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
    y: Tensor = _Normalise.apply(x, weight, bias, mean, var, count, eps)
    return y


def _global_statistics(x: Tensor) -> tuple[Tensor, Tensor, float]:
    """[N, C, ...] -> mean [C] and biased variance [C] in float64, and the number of values per channel.

    One collective. All processes add the same numbers in the same order, so their results are equal bit for bit.
    """
    x, num_channels = _precise(x), x.shape[1]
    num_values = x.numel() // num_channels
    mean = _sum(x) / max(1, num_values)
    centred = x - _per_channel(mean, x)
    squares = _sum(centred * centred) - _sum(centred) ** 2 / max(1, num_values)
    mine = torch.cat([mean, squares, mean.new_tensor([num_values])])
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    means, all_squares, counts = torch.stack(every).split([num_channels, num_channels, 1], dim=1)
    count = float(counts.sum())
    mean = (counts * means).sum(0) / max(1.0, count)
    squares = all_squares.sum(0) + (counts * (means - mean) ** 2).sum(0)
    return mean, squares / max(1.0, count), count


class _Normalise(torch.autograd.Function):
    """(x - mean) / std * weight + bias; the gradient passes through the statistics of all processes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        count: float,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt())
        ctx.count = count
        dtype = _precise(x).dtype
        return F.batch_norm(x, mean.to(dtype), var.to(dtype), weight, bias, eps=eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight, mean, inverse_std = ctx.saved_tensors
        grad, x_dtype = _precise(gradients[0]), x.dtype
        x = _precise(x)
        normalised = (x - _per_channel(mean, x)) * _per_channel(inverse_std, x)
        grad_bias, grad_weight = _sum(grad), _sum(grad * normalised)
        grad_x = None
        if ctx.needs_input_grad[0]:
            sums = torch.stack([grad_bias, grad_weight])
            dist.all_reduce(sums)
            through_mean, through_std = sums / ctx.count
            grad_x = grad - _per_channel(through_mean, x) - normalised * _per_channel(through_std, x)
            scale = inverse_std if weight is None else inverse_std * weight
            grad_x = (grad_x * _per_channel(scale, x)).to(x_dtype)
        # Of this process's rows alone: DDP adds the gradients of parameters.
        own = [
            total.to(weight.dtype) if needed and weight is not None else None
            for total, needed in zip((grad_weight, grad_bias), ctx.needs_input_grad[1:3], strict=True)
        ]
        return grad_x, *own, None, None, None, None


def _precise(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _sum(x: Tensor) -> Tensor:
    """[N, C, ...] -> [C] in float64."""
    return x.sum(dim=[d for d in range(x.dim()) if d != 1], dtype=torch.float64)


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """[C] -> a shape and dtype that broadcast over `x`."""
    return values.to(x.dtype).view(-1, *[1] * (x.dim() - 2))
