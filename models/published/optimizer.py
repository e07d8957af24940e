"""Convert the optimiser's state from and to the published checkpoints' numbering.

Published checkpoints number the parameters: first the decayed parameters, then biases and 1-D parameters,
each in the order of `named_parameters()`. This is the order of the file's own network, which may differ from
that of dinoray's. dinoray's optimiser may have more groups (optim.layer_decay) and another type.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dinoray.models.lars import LARS

_MAGNITUDE = "head.last_layer.weight_g"
_MOMENTS: dict[type, tuple[str, ...]] = {
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq"),
    torch.optim.SGD: ("momentum_buffer",),
    LARS: ("mu",),
}

_NAMES = {"exp_avg": "adamw", "momentum_buffer": "sgd", "mu": "lars"}
"""An optimiser's first moment -> its `optim.name`."""
_BUFFERS = (".running_mean", ".running_var", ".num_batches_tracked")

Named = list[tuple[str, nn.Parameter]]
Pairs = list[tuple[nn.Parameter, Mapping[str, Any]]]


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    student: nn.Module,
    state: Mapping[str, Any],
    saved_student: Mapping[str, Tensor] | None = None,
) -> tuple[int, int]:
    """Restore moments from a published optimiser's state; return the numbers of (restored, fresh) parameters.

    `student` has `backbone` and `head`. `saved_student`: the file's student in the file's order, which the
    numbers follow. If the file's head is different, only the backbone's moments are restored. A parameter
    starts fresh if its moments are missing or of another shape or optimiser. Hyper-parameters stay unchanged.
    """
    moments = _MOMENTS[type(optimizer)]
    restored = 0
    for parameter, saved in _pairs_by_name(student, state, saved_student or {}) or _pairs(student, state):
        values = [v for v in map(saved.get, moments) if isinstance(v, Tensor) and v.shape == parameter.shape]
        if len(values) != len(moments):
            continue
        own: dict[str, Any] = {}
        if isinstance(optimizer, torch.optim.AdamW):
            if "step" not in saved:
                continue
            # A plain number in old files. The fused optimiser needs it on the parameter's device.
            own["step"] = torch.tensor(float(saved["step"]), dtype=torch.float32, device=parameter.device)
        for name, value in zip(moments, values, strict=True):
            own[name] = torch.empty_like(parameter, requires_grad=False).copy_(value)
        optimizer.state[parameter] = own
        restored += 1
    return restored, sum(len(group["params"]) for group in optimizer.param_groups) - restored


def why_fresh(
    optimizer: torch.optim.Optimizer, student: nn.Module, state: Mapping[str, Any], name: str
) -> str:
    """Return why `load_optimizer` leaves parameters without moments. `name`: the file's, for the text."""
    if not state["state"]:
        return f"{name} holds no states of its optimizer"
    kinds = {_NAMES[key] for saved in state["state"].values() for key in saved if key in _NAMES}
    own = _NAMES[_MOMENTS[type(optimizer)][0]]
    if own not in kinds:
        theirs = " and ".join(sorted(kinds))
        remedy = f"; set optim.name={theirs} to restore it" if len(kinds) == 1 else ""
        return f"optim.name={own} is {theirs or 'another optimizer'} there{remedy}"
    fresh = [k for k, p in student.named_parameters() if p.requires_grad and not optimizer.state.get(p)]
    if optimizer.state:
        some = ", ".join(fresh[:3]) + (f" and {len(fresh) - 3} more" if len(fresh) > 3 else "")
        return f"{name} has no fitting states for {some}"
    groups = [len(group["params"]) for group in state["param_groups"]]
    ours = [len(group) for group in _groups(student)]
    return (
        f"the optimizer of {name} has groups of {_listed(groups)} parameters whose shapes or numbers are not "
        f"those of this run's network, {_listed(ours)}"
    )


def official_state(optimizer: torch.optim.Optimizer, student: nn.Module) -> dict[str, Any]:
    """Return `optimizer`'s state dict in the published groups and numbering, on the CPU."""
    groups = [[p for _, p in group] for group in _groups(student)]
    numbers = {p: i for i, p in enumerate(p for group in groups for p in group)}
    settings = {
        k: v for k, v in optimizer.param_groups[0].items() if k not in ("params", "decays", "lr_scale")
    }
    # The published code has one learning rate for all parameters; here the head's.
    whole = max(optimizer.param_groups, key=lambda group: group.get("lr_scale", 1.0))
    decay = max(group["weight_decay"] for group in optimizer.param_groups)
    settings |= {"lr": whole["lr"], "weight_decay": decay}
    if isinstance(optimizer, LARS):  # the published LARS reads these from its groups
        settings |= {"eta": 0.001, "weight_decay_filter": None, "lars_adaptation_filter": None}
    return {
        "state": {
            i: {k: v.detach().cpu() if isinstance(v, Tensor) else v for k, v in optimizer.state[p].items()}
            for p, i in numbers.items()
            if p in optimizer.state
        },
        "param_groups": [
            settings | {"params": [numbers[p] for p in groups[0]]},
            settings | {"weight_decay": 0.0, "params": [numbers[p] for p in groups[1]]},
        ],
    }


def _groups(
    student: nn.Module, *, without: Iterable[str] = (), also: Iterable[str] = ()
) -> tuple[Named, Named]:
    """Return the parameters that train in the published code's groups: decayed, and not decayed."""
    decayed: Named = []
    plain: Named = []
    for name, p in student.named_parameters():
        if name in also or (p.requires_grad and name not in without):
            (plain if name.endswith(".bias") or p.ndim == 1 else decayed).append((name, p))
    return decayed, plain


def _pairs_by_name(student: nn.Module, state: Mapping[str, Any], network: Mapping[str, Tensor]) -> Pairs:
    """Return the parameters that train, each with its state in the file, found by the file's own names.

    Returns nothing if the optimiser's groups or shapes are not those of the file's own network.
    """
    numbers = [list(group["params"]) for group in state["param_groups"]]
    for without in ((), (_MAGNITUDE,)):
        groups: tuple[list[str], list[str]] = [], []
        for name, tensor in network.items():
            if name not in without and not name.endswith(_BUFFERS):
                groups[name.endswith(".bias") or tensor.ndim == 1].append(name)
        if [len(group) for group in groups] == [len(group) for group in numbers]:
            break
    else:
        return []
    own = dict(student.named_parameters())
    pairs = []
    for names, theirs in zip(groups, numbers, strict=True):
        for name, number in zip(names, theirs, strict=True):
            saved = state["state"].get(number, {})
            if any(
                v.shape != network[name].shape for v in saved.values() if isinstance(v, Tensor) and v.ndim
            ):
                return []
            if name in own and own[name].requires_grad:
                pairs.append((own[name], saved))
    return pairs


def _pairs(student: nn.Module, state: Mapping[str, Any]) -> Pairs:
    """Return the parameters that train, each with its state in the file, found by this network's order."""
    numbers = [list(group["params"]) for group in state["param_groups"]]
    if len(numbers) != 2:
        return []
    # The prototypes' magnitude may have been trained or not, independent of this run's setting.
    for groups in (_groups(student, also=[_MAGNITUDE]), _groups(student, without=[_MAGNITUDE])):
        if [len(group) for group in groups] == [len(group) for group in numbers]:
            break
    else:
        # A different head: if the backbone is the same, its parameters come first in both groups.
        decayed, plain = _groups(student)
        groups = _of_backbone(decayed), _of_backbone(plain)
        extra = [len(theirs) - len(ours) for ours, theirs in zip(groups, numbers, strict=True)]
        if not _is_of_a_head(*extra):
            return []
    pairs = []
    for ours, theirs in zip(groups, numbers, strict=True):
        for (name, p), number in zip(ours, theirs, strict=False):
            saved = state["state"].get(number, {})
            shapes = {v.shape for v in saved.values() if isinstance(v, Tensor) and v.ndim}
            if name.startswith("backbone.") and shapes - {p.shape}:
                return []  # a different backbone with another numbering
            if p.requires_grad:
                pairs.append((p, saved))
    return pairs


def _is_of_a_head(decayed: int, plain: int) -> bool:
    """Return True if a DINO head may have so many parameters.

    They are weights and biases, batch norm's parameters, and one or two of the prototypes.
    """
    return any(layers > 0 and plain in (layers, 3 * layers - 2) for layers in (decayed - 1, decayed - 2))


def _listed(numbers: list[int]) -> str:
    return " and ".join(map(str, numbers))


def _of_backbone(group: Named) -> Named:
    return [(name, p) for name, p in group if name.startswith("backbone.")]
