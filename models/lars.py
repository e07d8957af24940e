"""LARS, as in DINO's published training of ResNets.

Large-batch SGD with a learning rate per layer (arXiv 1708.03888). timm's LARS divides by |g| + wd * |p|, the
published LARS by |g + wd * p|. Their results differ from the first step on.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_TRUST = 0.001


class LARS(torch.optim.Optimizer):
    """SGD with momentum; a parameter p of two or more axes has the rate lr * 0.001 * |p| / |update|.

    Parameters of one axis use plain momentum without decay. State: `mu`, the momentum of each parameter.
    """

    def __init__(self, params: Iterable[Any], *, lr: float, momentum: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            updates = [p.grad for p in params]
            layers = [i for i, p in enumerate(params) if p.ndim != 1]
            if layers:
                adapted = _adapted(
                    [params[i] for i in layers], [updates[i] for i in layers], group["weight_decay"]
                )
                for i, update in zip(layers, adapted, strict=True):
                    updates[i] = update
            for p in params:
                if "mu" not in self.state[p]:
                    self.state[p]["mu"] = torch.zeros_like(p)
            momenta = [self.state[p]["mu"] for p in params]
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, updates)
            torch._foreach_add_(params, momenta, alpha=-group["lr"])


def _adapted(params: list[Tensor], grads: list[Tensor], weight_decay: float) -> list[Tensor]:
    """Return gradients with decay, each scaled by its parameter's norm; not scaled if either norm is 0."""
    updates = list(torch._foreach_add(grads, params, alpha=weight_decay))
    ours = torch.stack(torch._foreach_norm(params))
    theirs = torch.stack(torch._foreach_norm(updates))
    scale = torch.where((ours > 0) & (theirs > 0), _TRUST * ours / theirs, torch.ones_like(ours))
    torch._foreach_mul_(updates, list(scale.unbind()))
    return updates
