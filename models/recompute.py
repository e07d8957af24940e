"""Activation checkpointing: blocks of a backbone whose activations the backward pass computes again (arXiv 1604.06174).

A block keeps its input alone. Its second forward has the draws of stochastic depth and the autocast of the first, and
leaves the running statistics of batch norm as they are, so that gradients and buffers are those without it, bit by bit.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from dinoray.models.backbone import layer_depths
from dinoray.models.config import Checkpointing
from dinoray.models.errors import ConfigError

_recomputed_now = 0


def recompute_blocks(backbone: nn.Module, mode: Checkpointing) -> None:
    """Have every second block (selective) or every block (full) of a timm model recompute its activations.

    Only in training mode and with gradients. State-dict names stay the same. Frozen blocks keep no activations, and are
    passed over. The first block is among the chosen, and of an odd number of blocks the last. Raises ConfigError if
    timm does not tell the blocks of the backbone apart.
    """
    if mode == "none":
        return
    found = blocks(backbone)
    if not found:
        raise ConfigError(
            f"train.activation_checkpointing={mode} needs a backbone whose blocks timm tells apart, "
            f"{type(backbone).__name__} is none; set train.activation_checkpointing=none"
        )
    training = [block for block in found if any(p.requires_grad for p in block.parameters())]
    for block in training[:: 2 if mode == "selective" else 1]:
        kind: Any = type(block)
        block.__class__ = _recomputing(kind)


def replace_class(block: nn.Module, change: Callable[[Any], Any]) -> None:
    """Set the class of a block to what `change` makes of it; a block that recomputes still does, around it."""
    kind: Any = type(block)
    is_recomputing = issubclass(kind, _Recomputing)
    changed = change(kind.__mro__[2] if is_recomputing else kind)
    block.__class__ = _recomputing(changed) if is_recomputing else changed


def blocks(backbone: nn.Module) -> list[nn.Module]:
    """Return the residual blocks by timm's groups of parameters, in the order in which they run; [] if it has none.

    A block is the outermost module of several layers whose parameters are all in one group; the stem is none.
    """
    if not hasattr(backbone, "group_matcher"):
        return []
    depth_of = layer_depths(backbone)
    found: list[nn.Module] = []
    inside: tuple[str, ...] = ()
    for name, module in backbone.named_modules():
        if not name or name.startswith(inside) or isinstance(module, nn.Sequential):
            continue
        owned = [f"{name}.{own}" for own, _ in module.named_parameters()]
        depths = {depth_of[own] for own in owned if own in depth_of}
        is_stem = depths == {0}
        if len(depths) == 1 and not is_stem and len({own.rpartition(".")[0] for own in owned}) > 1:
            found.append(module)
            inside = (*inside, f"{name}.")
    return found


def is_recomputing() -> bool:
    """Return True during a second forward, for hooks that count or look at forwards."""
    return _recomputed_now > 0


class _Recomputing(nn.Module):
    """Mixin before the class of a block."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        forward = super().forward
        if not (self.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        contexts = partial(_contexts, self)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


@cache
def _recomputing(kind: Any) -> Any:
    return type(f"Recomputing{kind.__name__}", (_Recomputing, kind), {})


def _contexts(block: nn.Module) -> tuple[Any, Any]:
    """Return what surrounds the first and the second forward of a block."""
    return contextlib.nullcontext(), _second_forward(block)


@contextlib.contextmanager
def _second_forward(block: nn.Module) -> Iterator[None]:
    """Let batch norm update copies of its running statistics, which are then dropped.

    To give back their values would count as a change of tensors that the backward pass still needs.
    """
    global _recomputed_now
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    kept = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        norm._buffers.update({name: x if x is None else x.clone() for name, x in norm._buffers.items()})
    _recomputed_now += 1
    try:
        yield
    finally:
        _recomputed_now -= 1
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)
