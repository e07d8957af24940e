"""Read checkpoints of the published DINO code and of other programs, and write the published form.

`read_weights` and `parse` read a file into `Weights`. `load` and `load_optimizer` load them into networks and
optimizer. `to_official` writes the published form. The modules below: restricted_load.py reads bytes,
networks_in_files.py finds the networks, fit.py and optimizer.py match names and shapes.

A full checkpoint, as the published code saves it:

    student, teacher    state dicts: module.backbone.*, module.head.* (the teacher's without module.)
    optimizer           two groups: decayed parameters, then biases and 1-D parameters
    epoch, args         the next epoch; argparse.Namespace, or a dict
    dino_loss           {"center": [1, K]}
    fp16_scaler         not read
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dinoray.models.backbone import has_batch_norm
from dinoray.models.dino import DINO
from dinoray.models.errors import DataError
from dinoray.models.lora import is_adapter, without_adapters
from dinoray.models.published.fit import fit_backbone, fit_head
from dinoray.models.published.networks_in_files import find_networks
from dinoray.models.published.optimizer import load_optimizer, official_state
from dinoray.models.published.programs import in_timms_names, programs_of, seen_in
from dinoray.models.published.restricted_load import (
    as_tensors,
    holds_arrays,
    restricted_load,
    values_of,
)

__all__ = [
    "Loaded",
    "Weights",
    "fit_backbone",
    "load",
    "load_optimizer",
    "parse",
    "read_weights",
    "to_official",
]

POS_EMBED_KEY = "pos_embed"
"""Key, in the metadata and `args` of dinoray's exports, of the way to resize position embeddings."""

_CLASSIFIERS = ("head.weight", "fc.weight")
_REGISTERS = ("reg_token", "register_tokens", "storage_tokens")


class Weights(NamedTuple):
    """The contents of a file in dinoray's names: `backbone.*`, and `head.*` if there is a head."""

    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    """The same object as `student` if the file has one network."""
    center: Tensor | None
    """[K]"""
    optimizer: dict[str, Any] | None
    epoch: int | float | None
    """The next epoch to run."""
    args: dict[str, Any]
    """The arguments of the training, as far as they are known. Also `program`, the programs that the file seems to
    come from, and `num_heads`, a ViT's number of attention heads, which its tensors do not show."""
    official: bool
    """True if position embeddings must be resized as in the published code."""
    name: str = "the checkpoint"
    places: tuple[str, str, str] = ("", "", "")
    """Places of student, teacher and centre in the file."""
    skipped: tuple[str, ...] = ()
    """Parts of the file that no run can use."""
    notes: tuple[str, ...] = ()
    is_own: bool = False
    """True for a dinoray run, whose optimizer state is in dinoray's own form."""

    @property
    def has_head(self) -> bool:
        """True if both networks have a DINO head."""
        return all("head.last_layer.weight_v" in network for network in (self.student, self.teacher))


class Loaded(NamedTuple):
    """The parts that `load` has loaded besides the backbones, and notes on its changes."""

    head: bool
    center: bool
    notes: list[str]


def read_weights(data: bytes, name: str) -> Weights:
    """Return the weights in the bytes of a `.pth` or `.ckpt` file; `name` is used in errors.

    Raises as `read_state` and `parse` do.
    """
    return parse(read_state(data, name), name)


def read_state(data: bytes, name: str) -> Mapping[str, Any]:
    """Return the contents of a `.pth` or `.ckpt` file, for `parse`; `name` is used in errors.

    No code in the file is run. Raises DataError for a file that requires running code or cannot be read.
    """
    state = restricted_load(data, name)
    if not isinstance(state, Mapping):
        raise DataError(
            f"{name} holds a {type(state).__name__}, not a dict of weights; "
            "save a network's state_dict() with torch.save"
        )
    return state


def parse(state: Mapping[str, Any], name: str = "the checkpoint") -> Weights:
    """Return the contents of a loaded file in dinoray's names; `state` is not changed and shares its tensors.

    A single network becomes both student and teacher. `official` is true for published ViTs, whole
    checkpoints or bare backbones, and false for files of timm, dinoray and others that are marked or
    recognised as such. Raises DataError if there are no weights.
    """
    found = find_networks(state)
    if found is None:
        if holds_arrays(state):
            raise DataError(f"{name} holds numpy arrays, not tensors; {as_tensors(name)}")
        keys = [key[:40] if _is_name(key) else f"a {type(key).__name__}" for key in list(state)[:5]]
        raise DataError(
            f"{name} holds no weights: its keys are {', '.join(keys) or 'none'}; "
            "pass a file that holds a network's state dict"
        )
    student = in_timms_names(found.student)
    teacher = student if found.teacher is found.student else in_timms_names(found.teacher)
    names = (name.removeprefix("backbone.") for name in found.teacher)
    programs = programs_of(names, (found.student_from, found.teacher_from))
    args = _plain({"arch": state.get("arch")} | values_of(state.get("args")))
    args = {k: v for k, v in args.items() if k not in ("program", "num_heads")} | seen_in(
        programs, args.get("arch")
    )
    is_renamed = teacher.keys() != found.teacher.keys()
    renamed = [f"names of {programs[-1].name} are read as timm's"] if is_renamed else []
    optimizer, epoch = _optimizer(state.get("optimizer")), _epoch(state.get("epoch"))
    place = found.teacher_from.partition(".")[0]
    is_part = isinstance(state.get(place), Mapping)
    holder = state[place] if is_part else state
    mark = args.get(POS_EMBED_KEY) or _mark(holder)
    # The published code saves both networks, or only a backbone's state dict. dinoray's state dict has a
    # centre.
    published = place in ("student", "teacher") if is_part else "center" not in state
    read = (
        {"args", "arch"}
        | ({"optimizer"} if optimizer else set())
        | ({"epoch"} if epoch is not None else set())
    )
    read |= {place.partition(".")[0] for place in (found.student_from, found.teacher_from, found.center_from)}
    read |= {place.partition(".")[0] for place in found.skipped}
    others = [k for k, v in state.items() if _is_name(k) and k not in read and not isinstance(v, Tensor)]
    return Weights(
        student=student,
        teacher=teacher,
        center=found.center,
        optimizer=optimizer,
        epoch=epoch,
        args=args,
        official=_is_published_vit(found.teacher) and (mark == "official" if mark else published),
        name=name,
        places=(found.student_from, found.teacher_from, found.center_from),
        skipped=(*found.skipped, *others),
        notes=(*found.notes, *renamed),
    )


def load(
    dino: DINO,
    weights: Weights,
    *,
    backbone_only: bool = False,
    kwargs: Mapping[str, Any] | None = None,
) -> Loaded:
    """Load the weights strictly into student and teacher, and the centre with the head.

    With `backbone_only`, or without a head in the file, heads and centre stay unchanged. `kwargs`: the
    configured `backbone.kwargs`, for errors. Raises ConfigError with one line per setting that does not fit
    and its right value, and DataError for values that are not finite; nothing is loaded then.
    """
    notes: list[str] = []
    loads_head = weights.has_head and not backbone_only
    fitted: list[dict[str, Tensor]] = []
    for network, state in ((dino.student, weights.student), (dino.teacher, weights.teacher)):
        if fitted and weights.student is weights.teacher:
            fitted.append(fitted[0])
            break
        body = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
        adapters = {k: v for k, v in body.items() if is_adapter(k)}
        body = without_adapters(body)
        parts = fit_backbone(body, network.backbone, args=weights.args, kwargs=kwargs, notes=notes) | adapters
        fitted.append({f"backbone.{k}": v for k, v in parts.items()})
        if loads_head:
            head = {k.removeprefix("head."): v for k, v in state.items() if k.startswith("head.")}
            parts = fit_head(head, network.head, notes=notes)
            fitted[-1] |= {f"head.{k}": v for k, v in parts.items()}
    loads_center = loads_head and weights.center is not None
    if loads_center and len(weights.center) != len(dino.center):  # type: ignore[arg-type]
        raise DataError(
            f"the centre in {weights.name} has {len(weights.center)} values for {len(dino.center)} prototypes; "  # type: ignore[arg-type]
            "set init.load=backbone"
        )
    if any(not torch.equal(fitted[0][name], fitted[1][name]) for name in dino.shared & fitted[0].keys()):
        fitted[0] |= {k: v for k, v in fitted[1].items() if k.startswith("backbone.")}
        notes.append("the student's backbone begins as the teacher's, since both share what is frozen")
    for which, state in zip(("student", "teacher"), fitted, strict=True):
        _check_finite(weights.name, which, state)
    if loads_center:
        _check_finite(weights.name, "head", {"head.center": weights.center})  # type: ignore[dict-item]
    for network, state in zip((dino.student, dino.teacher), fitted, strict=True):
        network.load_state_dict({**network.state_dict(), **state})
    if loads_center:
        with torch.no_grad():
            dino.center.copy_(weights.center)  # type: ignore[arg-type]
    return Loaded(loads_head, loads_center, list(dict.fromkeys(notes)))


def to_official(
    dino: DINO, optimizer: torch.optim.Optimizer, *, epoch: int, args: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the full checkpoint of the published code, for `torch.save`. `epoch` is the next epoch to run.

    With batch norm the teacher's names also start with `module.`, because the published code then wraps the
    teacher.
    """

    def names(network: torch.nn.Module, prefix: str) -> dict[str, Tensor]:
        return {prefix + k: v.detach().cpu() for k, v in network.state_dict().items()}

    return {
        "student": names(dino.student, "module."),
        "teacher": names(dino.teacher, "module." if has_batch_norm(dino.teacher) else ""),
        "optimizer": official_state(optimizer, dino.student),
        "epoch": epoch,
        "args": dict(args),  # torch.load refuses a Namespace by default
        "dino_loss": {"center": dino.center.detach().cpu()[None]},
    }


def _check_finite(name: str, which: str, state: Mapping[str, Tensor]) -> None:
    """Raise DataError with the names of the tensors that contain NaN or infinity."""
    wrong = [
        k for k, v in state.items() if v.is_floating_point() and not bool(torch.isfinite(v.float()).all())
    ]
    if not wrong:
        return
    some = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
    remedy = "start from an earlier checkpoint of that training, or without init.from (--init-from)"
    if all(k.startswith("head.") for k in wrong):
        remedy = "set init.load=backbone to leave the head out"
    raise DataError(f"{name} has NaN or infinite values in the {which}'s {some}; {remedy}")


def _optimizer(state: Any) -> dict[str, Any] | None:
    """Return the optimizer's state as plain values: moments by parameter number, and each group's numbers."""
    if not isinstance(state, Mapping):
        return None
    moments, groups = state.get("state"), state.get("param_groups")
    if not isinstance(moments, Mapping) or not isinstance(groups, list):
        return None
    if not all(isinstance(group, Mapping) and isinstance(group.get("params"), list) for group in groups):
        return None
    return {
        "state": {
            number: {k: v for k, v in saved.items() if isinstance(v, (Tensor, int, float))}
            for number, saved in moments.items()
            if isinstance(number, int) and isinstance(saved, Mapping)
        },
        "param_groups": [
            {"params": [number for number in group["params"] if isinstance(number, int)]} for group in groups
        ],
    }


def _epoch(epoch: Any) -> int | None:
    is_whole = isinstance(epoch, (int, float)) and not isinstance(epoch, bool) and epoch == epoch // 1
    return int(epoch) if is_whole and epoch >= 0 else None


def _plain(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that are numbers, texts, or short sequences of numbers and texts."""

    def is_plain(value: Any) -> bool:
        if type(value) in (list, tuple):
            return len(value) <= 16 and all(isinstance(part, (str, int, float, type(None))) for part in value)
        return isinstance(value, (int, float)) or _is_name(value)

    return {k: v for k, v in args.items() if isinstance(k, str) and is_plain(v)}


def _is_name(value: Any) -> bool:
    """Return True for a text that can be printed on a terminal."""
    return isinstance(value, str) and value.isprintable()


def _mark(state: Mapping[str, Any]) -> Any:
    """Return the position embeddings' mark in a state dict that dinoray exported; None for all others."""
    metadata = getattr(state, "_metadata", None)
    own = metadata.get("") if isinstance(metadata, Mapping) else None
    return own.get(POS_EMBED_KEY) if isinstance(own, Mapping) else None


def _is_published_vit(network: dict[str, Tensor]) -> bool:
    """Return True if the published code resizes such position embeddings: no registers, no classifier."""
    names = {name.removeprefix("backbone.") for name in network}
    is_vit = {"cls_token", "pos_embed"} <= names and any(name.startswith("blocks.") for name in names)
    return is_vit and not names & {*_CLASSIFIERS, *_REGISTERS}
