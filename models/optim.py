"""Parameter groups, optimisers, lr scaling by global batch, per-parameter clip, last-layer freeze."""

import torch
from torch import Tensor, nn

from dinoray.models.backbone import image_layers, layer_depths
from dinoray.models.config import OptimConfig
from dinoray.models.errors import ConfigError
from dinoray.models.lars import LARS


def param_groups(
    student: nn.Module, *, layer_decay: float = 1.0, patch_embed_lr_scale: float = 1.0
) -> list[dict]:
    """Return parameter groups, each with one `lr_scale`; groups with weight decay (`decays`) come first.

    Biases and 1-D parameters are not decayed; frozen parameters are left out. With a `layer_decay` of 1 there
    are the two groups of the published optimiser, in its order. Otherwise block i of the N blocks of
    `student.backbone` has the scale `layer_decay ** (N + 1 - i)`: the stem is block 0, the final norm belongs
    to the last block, and the head has the scale 1. `patch_embed_lr_scale` is a further factor for the layer that
    takes the image.
    """
    scales: dict[str, float] = {}
    if layer_decay != 1:
        depths = layer_depths(student.backbone)  # type: ignore[arg-type]
        scales = {
            f"backbone.{k}": layer_decay ** (max(depths.values()) + 1 - depth) for k, depth in depths.items()
        }
    if patch_embed_lr_scale != 1:
        layers = image_layers(student.backbone)  # type: ignore[arg-type]
        if not layers:
            raise ConfigError(
                f"optim.patch_embed_lr_scale={patch_embed_lr_scale:g} needs a backbone whose first layer timm names, "
                f"{type(student.backbone).__name__} is none; set optim.patch_embed_lr_scale=1"
            )
        for layer in layers:
            scales[f"backbone.{layer}"] = scales.get(f"backbone.{layer}", 1.0) * patch_embed_lr_scale
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {(True, 1.0): [], (False, 1.0): []}
    for name, p in student.named_parameters():
        if p.requires_grad:
            decays = not (name.endswith(".bias") or p.ndim == 1)
            groups.setdefault((decays, scales.get(name, 1.0)), []).append(p)
    return [
        {"params": params, "decays": decays, "lr_scale": scale}
        for (decays, scale), params in sorted(
            groups.items(), key=lambda group: (not group[0][0], group[0][1])
        )
    ]


def build_optimizer(config: OptimConfig, student: nn.Module) -> torch.optim.Optimizer:
    """Build the optimiser over `param_groups(student)`; lr and weight decay are set before each step."""
    groups = param_groups(
        student, layer_decay=config.layer_decay, patch_embed_lr_scale=config.patch_embed_lr_scale
    )
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, fused=True)  # one pass over the parameters instead of ten
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum)
    return LARS(groups, lr=0.0, momentum=config.momentum)


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Load a `state_dict` of the same parameters; `optimizer` keeps its hyper-parameters.

    Raises ValueError if the groups do not match.
    """
    own = optimizer.state_dict()["param_groups"]
    theirs = saved["param_groups"]
    if [len(g["params"]) for g in own] != [len(g["params"]) for g in theirs]:
        raise ValueError(
            "the optimizer's parameter groups differ from those saved; was optim.layer_decay or "
            "optim.patch_embed_lr_scale changed?"
        )
    optimizer.load_state_dict({"state": saved["state"], "param_groups": own})


def set_hyperparameters(optimizer: torch.optim.Optimizer, *, lr: float, weight_decay: float) -> None:
    """Set this step's values: lr times each group's scale, and weight decay in the groups that decay."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        group["weight_decay"] = weight_decay if group["decays"] else 0.0


@torch.no_grad()
def step_if(optimizer: torch.optim.Optimizer, is_finite: Tensor) -> None:
    """Step if `is_finite`, a 0-d bool on the device which the host does not read; otherwise change nothing.

    A first step that is not taken leaves moments of 0, as if there were none yet.
    """
    if all(group.get("fused") for group in optimizer.param_groups):  # as for torch.amp.GradScaler
        optimizer.found_inf = (~is_finite).to(torch.float32)  # type: ignore[attr-defined]
        optimizer.step()
        return
    stepped = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    before = {p: (p.clone(), {k: x.clone() for k, x in optimizer.state[p].items()}) for p in stepped}
    optimizer.step()
    for p, (value, moments) in before.items():
        torch.where(is_finite, p, value, out=p)
        for name, x in optimizer.state[p].items():
            torch.where(is_finite, x, moments.get(name, torch.zeros_like(x)), out=x)


@torch.no_grad()
def clip_per_parameter(student: nn.Module, max_norm: float) -> Tensor:
    """Clip each gradient tensor to `max_norm` (0: no clipping); return the global norm before clipping.

    Needs no host sync.

    Differs from `torch.nn.utils.clip_grad_norm_`, which scales all gradients by one norm.
    """
    grads = [p.grad for p in student.parameters() if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))
    if max_norm > 0:
        torch._foreach_mul_(grads, list((max_norm / (norms + 1e-6)).clamp(max=1.0).unbind()))
    return norms.norm()


def drop_last_layer_grads(head: nn.Module) -> None:
    """Freeze the prototype layer for this step: without a gradient it has no update, decay or moments."""
    for p in head.last_layer.parameters():  # type: ignore[union-attr]
        p.grad = None
