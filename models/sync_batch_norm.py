"""Batch norm over the batches of all processes, on CPUs as well as on GPUs.

On GPUs, timm's conversion replaces the modules. torch's synchronised modules refuse CPU tensors, so on CPUs
each module keeps its parameters, buffers and names, and only the `F.batch_norm` inside its forward is
replaced. Uses torch.distributed; no heads, losses or data here. Axes: N rows, C channels, W processes.
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
    """Make a network's layers use batch statistics over all processes; state-dict names stay the same.

    Each process must then run the same forwards and backwards in training mode. Eval mode needs no other
    process.
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
    """Mixin before a batch-norm class that runs its forward with `F.batch_norm` over all processes."""

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
    """Replaces `F.batch_norm` inside the block; all other functions stay unchanged."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return (_batch_norm if func is F.batch_norm else func)(*args, **(kwargs or {}))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Compute `F.batch_norm` in training mode, with the mean and variance of all processes' rows."""
    mean, var, count = _global_statistics(input.detach())
    if count < 2:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {input.size()}"
        )
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
    y: Tensor = _Normalise.apply(input, weight, bias, mean, var, count, eps)
    return y


def _global_statistics(x: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return mean [C] and biased variance [C] of [N, C, ...] in float64, and the values per channel.

    One collective. All processes add the same numbers in the same order, so their results are bit-identical.
    """
    x, num_channels = _precise(x), x.shape[1]
    num_values = x.numel() // num_channels
    mine = torch.zeros(2 * num_channels + 1, dtype=torch.float64)
    if num_values:
        local_mean, local_var = torch.batch_norm_update_stats(x, None, None, 0.0)
        mine = torch.cat(
            [local_mean.double(), local_var.double() * num_values, mine.new_tensor([num_values])]
        )
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
        ctx.save_for_backward(x, weight, mean, var)
        ctx.count, ctx.eps = count, eps
        dtype = _precise(x).dtype
        return F.batch_norm(x, mean.to(dtype), var.to(dtype), weight, bias, eps=eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight, mean, var = ctx.saved_tensors
        grad, x_dtype = _precise(gradients[0]), x.dtype
        x, inverse_std = _precise(x), (var + ctx.eps).rsqrt()
        grad_weight = grad_bias = inverse_std.new_zeros(len(mean))
        if x.numel():  # torch's kernel divides by the number of values
            # sum(grad * (x - mean) / std) and sum(grad) of this process, in one pass
            statistics = mean.to(x.dtype), var.to(x.dtype), None, None, False, ctx.eps
            _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
                grad, x, weight, *statistics, [False, True, True]
            )
        grad_x = None
        if ctx.needs_input_grad[0]:
            sums = torch.stack([grad_bias.double(), grad_weight.double()])
            dist.all_reduce(sums)
            through_mean, through_std = sums / ctx.count
            # (grad - through_mean - (x - mean) / std * through_std) * weight / std
            scale = inverse_std if weight is None else inverse_std * weight
            grad_x = x - _per_channel(mean, x)
            grad_x.mul_(_per_channel(-scale * inverse_std * through_std, x))
            grad_x.addcmul_(grad, _per_channel(scale, x)).sub_(_per_channel(scale * through_mean, x))
            grad_x = grad_x.to(x_dtype)
        # Only from this process's rows, because DDP sums the gradients of parameters.
        own = [
            total.to(weight.dtype) if needed and weight is not None else None
            for total, needed in zip((grad_weight, grad_bias), ctx.needs_input_grad[1:3], strict=True)
        ]
        return grad_x, *own, None, None, None, None


def _precise(x: Tensor) -> Tensor:
    """Return `x` in float32, or unchanged if it is float64."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """Return `values` [C] in the dtype of `x` and in a shape that broadcasts over `x`."""
    return values.to(x.dtype).view(-1, *[1] * (x.dim() - 2))
