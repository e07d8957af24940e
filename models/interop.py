"""Published DINO checkpoints <-> ours: their files into one form, and our networks into their form.

`read_weights` and `parse` read, `load` and `load_optimizer` put what was read into networks and optimiser (their
parts stand in fitting.py and optimizer_state.py), `to_official` writes. Knows torch; nothing of storage.

A full checkpoint, as the published code saves it:

    student, teacher    state dicts: module.backbone.*, module.head.* (the teacher's without module.)
    optimizer           two groups: decayed parameters, then biases and 1-D parameters
    epoch, args         the next epoch; argparse.Namespace
    dino_loss           {"center": [1, K]}
    fp16_scaler         not read

Other files hold one network's state dict, or a bare backbone's: any mix of the prefixes `module.`, `student.`,
`teacher.`, `backbone.`, `head.`.
"""

import argparse
import io
import pickle
import re
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.backbone import has_batch_norm
from models.dino import DINO
from models.fitting import fit_backbone, fit_head
from models.optimizer_state import load_optimizer, official_state
from models.settings import DataError, one_line

__all__ = ["Weights", "fit_backbone", "load", "load_optimizer", "parse", "read_weights", "to_official"]

MARK = "pos_embed"
"""Key of the metadata, and of `args`, in which our exports say how position embeddings are resized."""

_GLOBAL = re.compile(r"GLOBAL\s+`?([\w.]+)")
_WRAPPERS = ("module.", "_orig_mod.", "student.", "teacher.")
_CENTERS = ("center", "dino_loss.center")
_CLASSIFIERS = ("head.weight", "fc.weight")
_REGISTERS = ("reg_token", "register_tokens", "storage_tokens")


class Weights(NamedTuple):
    """What a file holds, in our names: `backbone.*`, and `head.*` where there is a head."""

    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    center: Tensor | None
    """[K]"""
    optimizer: dict[str, Any] | None
    epoch: int | None
    args: dict[str, Any]
    official: bool
    """Position embeddings are to be resized as the published code does it."""

    @property
    def has_head(self) -> bool:
        """Whether both networks have a DINO head."""
        return all("head.last_layer.weight_v" in network for network in (self.student, self.teacher))


def read_weights(data: bytes, name: str) -> Weights:
    """The weights in the bytes of a `.pth` file; `name` stands in errors.

    Nothing in the file is run: besides tensors and plain values only argparse.Namespace is let in. DataError for
    a file that wants more, or that cannot be read.
    """
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # what is wrong with a file is said below
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = _GLOBAL.search(str(error))
        if found is None:
            raise DataError(
                f"{name} is no file of weights that can be read without running what is in it; save its state dicts "
                "anew with torch.save where you trust it"
            ) from error
        raise DataError(
            f"{name} wants {found[1].rstrip('.')} to be called while it is read, which could run any program; only "
            "tensors, plain values and argparse.Namespace are read: save its state dicts anew where you trust it"
        ) from error
    except Exception as error:  # a damaged file may raise anything
        raise DataError(f"{name} is no file of weights, or damaged: {one_line(error)}") from error
    if not isinstance(state, Mapping):
        raise DataError(f"{name} holds a {type(state).__name__}, not a dict of weights")
    return parse(state, name)


def parse(state: Mapping[str, Any], name: str = "the checkpoint") -> Weights:
    """What a loaded file holds, in our names; tensors are shared with `state`, which stays as it is.

    Of a file with one network, student and teacher both get it. `official` is true for published ViTs, whole
    checkpoints or bare backbones, and false for files of timm and ours that say or show so. DataError when no
    weights are found.
    """
    networks = {which: _tensors(state[which]) for which in ("student", "teacher") if which in state}
    bare = state
    published = any(networks.values())  # how the published code saves, or a state dict alone
    if not published:
        for wrapper in ("state_dict", "model"):
            bare = bare[wrapper] if isinstance(bare.get(wrapper), Mapping) else bare
        tensors = _tensors(bare)
        networks = {
            which: {k: v for k, v in tensors.items() if k.removeprefix("module.").startswith(f"{which}.")}
            for which in ("student", "teacher")
        }
        if not any(networks.values()):
            networks = {"teacher": tensors}
        published = bare is state and "center" not in state  # a state dict of our DINO has one
    student, teacher = (_in_our_names(networks.get(which) or {}) for which in ("student", "teacher"))
    student, teacher = student or teacher, teacher or student
    if not teacher:
        raise DataError(
            f"{name} holds no weights: its keys are {', '.join(map(str, list(state)[:5])) or 'none'}"
        )
    args = _arguments(state.get("args"))
    mark = args.get(MARK) or _mark(bare)
    return Weights(
        student=student,
        teacher=teacher,
        center=_center(state),
        optimizer=_optimizer(state.get("optimizer")),
        epoch=state["epoch"] if isinstance(state.get("epoch"), int) else None,
        args=args,
        official=_is_published_vit(teacher) and (mark == "official" if mark else published),
    )


def load(dino: DINO, weights: Weights, *, backbone_only: bool = False) -> list[str]:
    """Put the weights into student and teacher, strictly, and the centre with the head; return notes in words.

    With `backbone_only`, or without a head in the file, heads and centre stay as they are. ConfigError, one line
    per mistake, names the setting that does not fit and the value that does; nothing is loaded then.
    """
    notes: list[str] = []
    loads_head = weights.has_head and not backbone_only
    fitted: list[dict[str, Tensor]] = []
    for network, state in ((dino.student, weights.student), (dino.teacher, weights.teacher)):
        if fitted and weights.student is weights.teacher:
            fitted.append(fitted[0])
            break
        body = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
        parts = fit_backbone(body, network.backbone, args=weights.args, notes=notes)
        fitted.append({f"backbone.{k}": v for k, v in parts.items()})
        if loads_head:
            head = {k.removeprefix("head."): v for k, v in state.items() if k.startswith("head.")}
            parts = fit_head(head, network.head, notes=notes)
            fitted[-1] |= {f"head.{k}": v for k, v in parts.items()}
    if not loads_head:
        what = "the head in the file is left out" if weights.has_head else "no head in the file"
        notes.append(f"{what}: the head starts fresh (both networks alike)")
    elif weights.center is None:
        notes.append("no centre in the file: it starts from zero")
    elif len(weights.center) != len(dino.center):
        raise DataError(
            f"the checkpoint's centre has {len(weights.center)} values for {len(dino.center)} prototypes"
        )
    for network, state in zip((dino.student, dino.teacher), fitted, strict=True):
        network.load_state_dict({**network.state_dict(), **state})
    if loads_head and weights.center is not None:
        with torch.no_grad():
            dino.center.copy_(weights.center)
    return list(dict.fromkeys(notes))


def to_official(
    dino: DINO, optimizer: torch.optim.Optimizer, *, epoch: int, args: Mapping[str, Any]
) -> dict[str, Any]:
    """The full checkpoint of the published code, to be written by `torch.save`. `epoch` is the next to run.

    The teacher's names get `module.` too when the networks have batch norm: the published code wraps it then.
    """

    def names(network: torch.nn.Module, prefix: str) -> dict[str, Tensor]:
        return {prefix + k: v.detach().cpu() for k, v in network.state_dict().items()}

    return {
        "student": names(dino.student, "module."),
        "teacher": names(dino.teacher, "module." if has_batch_norm(dino.teacher) else ""),
        "optimizer": official_state(optimizer, dino.student),
        "epoch": epoch,
        "args": argparse.Namespace(**args),
        "dino_loss": {"center": dino.center.detach().cpu()[None]},
    }


def _tensors(state: Any) -> dict[str, Tensor]:
    if not isinstance(state, Mapping):
        return {}
    return {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor)}


def _in_our_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """One network's tensors as `backbone.*` and `head.*`."""
    named: dict[str, Tensor] = {}
    for name, tensor in state.items():
        while name.startswith(_WRAPPERS):
            name = name.partition(".")[2]
        if name not in _CENTERS and not name.startswith("ibot_head."):
            named[re.sub(r"^dino_head\.", "head.", name)] = tensor
    # A classifier is called `head` too, but only a DINO head has a `last_layer`.
    has_head = any(name.startswith("head.last_layer.") for name in named)
    network: dict[str, Tensor] = {}
    for name, tensor in named.items():
        if has_head and name.startswith("head.last_layer."):
            network |= _prototypes(name, tensor)
        elif name.startswith("backbone.") or (has_head and name.startswith("head.")):
            network[name] = tensor
        else:
            network[f"backbone.{name}"] = tensor
    return network


def _prototypes(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor of the prototype layer as `weight_g` [K, 1] and `weight_v` [K, bottleneck], however it is stored."""
    layer = "head.last_layer."
    match name.removeprefix(layer):
        case "weight_g" | "parametrizations.weight.original0":
            return {f"{layer}weight_g": tensor}
        case "weight_v" | "parametrizations.weight.original1":
            return {f"{layer}weight_v": tensor}
        case "weight":
            return {f"{layer}weight_g": tensor.norm(dim=1, keepdim=True), f"{layer}weight_v": tensor}
    return {name: tensor}


def _center(state: Mapping[str, Any]) -> Tensor | None:
    loss = state.get("dino_loss")
    centers = [
        *([loss.get("center")] if isinstance(loss, Mapping) else []),
        *(state.get(k) for k in _CENTERS),
    ]
    return next((center.reshape(-1) for center in centers if isinstance(center, Tensor)), None)


def _optimizer(state: Any) -> dict[str, Any] | None:
    is_one = (
        isinstance(state, Mapping)
        and isinstance(state.get("state"), Mapping)
        and isinstance(state.get("param_groups"), list)
    )
    return dict(state) if is_one else None


def _arguments(args: Any) -> dict[str, Any]:
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    return dict(args) if isinstance(args, Mapping) else {}


def _mark(state: Mapping[str, Any]) -> Any:
    """What a state dict that we exported says of its position embeddings; nothing in all others."""
    metadata = getattr(state, "_metadata", None)
    own = metadata.get("") if isinstance(metadata, Mapping) else None
    return own.get(MARK) if isinstance(own, Mapping) else None


def _is_published_vit(network: dict[str, Tensor]) -> bool:
    """Whether the position embeddings are of a kind that the published code resizes: no registers, no classifier."""
    names = {name.removeprefix("backbone.") for name in network}
    is_vit = {"cls_token", "pos_embed"} <= names and any(name.startswith("blocks.") for name in names)
    return is_vit and not names & {*_CLASSIFIERS, *_REGISTERS}
