"""Tensors of a checkpoint -> exactly those that one of our networks has, or an error that says which setting to change.

Stands below interop.py, which knows the files. Names are those inside a backbone or a head, without a prefix.
"""

import contextlib
import io
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from models.settings import ConfigError

_CLASSIFIER = re.compile(r"(fc|head|head_dist|classifier|last_linear)\.|mask_token$")
_PUBLISHED = {
    (192, 12, 16): "vit_tiny_patch16_224",
    (384, 12, 8): "vit_small_patch8_224",
    (384, 12, 14): "vit_small_patch14_dinov2",
    (384, 12, 16): "vit_small_patch16_224",
    (768, 12, 8): "vit_base_patch8_224",
    (768, 12, 14): "vit_base_patch14_dinov2",
    (768, 12, 16): "vit_base_patch16_224",
    (1024, 24, 14): "vit_large_patch14_dinov2",
    (1536, 40, 14): "vit_giant_patch14_dinov2",
}
"""(width, blocks, patch) of ViTs with published weights -> timm's name."""
_NUM_HEADS = {"vit_tiny": 3, "vit_small": 6, "vit_base": 12}
"""What no tensor's shape tells: attention heads of the published code's ViTs."""

State = Mapping[str, Tensor]


def fit_backbone(
    state: State,
    backbone: nn.Module,
    *,
    args: Mapping[str, Any] | None = None,
    notes: list[str] | None = None,
) -> dict[str, Tensor]:
    """The backbone's state dict made of `state`: names become timm's, a classifier is dropped, the grid is fitted.

    `args` are those that the checkpoint was trained with, where known. What was changed is told in `notes`.
    ConfigError when the two are different networks.
    """
    notes = [] if notes is None else notes
    own = backbone.state_dict()
    # DINOv2 saves its blocks in chunks, each block under its own number.
    named = {re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", k): v for k, v in state.items()}
    _check_vit(named, backbone, args or {})
    dropped = [k for k in named if k not in own and _CLASSIFIER.match(k)]
    if dropped:
        notes.append(f"left out, not part of the backbone: {_some(dropped)}")
    bare = {k: v for k, v in named.items() if k not in dropped}
    if any(_differences(bare, own)):
        named = _in_timms_names(named, backbone)  # with what is left out: timm knows files by it
        bare = {k: v for k, v in named.items() if k in own or not _CLASSIFIER.match(k)}
    before, after = state.get("pos_embed"), bare.get("pos_embed")
    if before is not None and after is not None and abs(before.shape[1] - after.shape[1]) > 1:
        notes.append(
            f"position embeddings resized from {before.shape[1]} to {after.shape[1]} tokens, timm's way: the "
            "backbone's own grid is another"
        )
    _check_names(bare, own, "backbone", (args or {}).get("arch"))
    return _in_order(bare, own)


def fit_head(state: State, head: nn.Module, *, notes: list[str] | None = None) -> dict[str, Tensor]:
    """The head's state dict made of `state`. ConfigError names each `head.*` setting that differs, and its value."""
    own = head.state_dict()
    theirs, ours = _head_settings(state), _head_settings(own)
    what = {"out_dim": "prototypes", "bottleneck_dim": "channels in the bottleneck", "num_layers": "layers"}
    what |= {"hidden_dim": "channels in hidden layers"}
    mistakes = []
    for key, value in theirs.items():
        if None in (value, ours[key]) or value == ours[key]:
            continue
        if key == "use_bn":
            has = "batch norm" if value else "no batch norm"
        else:
            has = f"{value} {what[key]}"
        mistakes.append(
            f"head.{key}={_yaml(ours[key])} but the checkpoint has {has}; set head.{key}={_yaml(value)}"
        )
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    _check_names(state, own, "head", None)
    magnitude = state["last_layer.weight_g"]
    is_frozen = not head.get_parameter("last_layer.weight_g").requires_grad
    trains = any(p.requires_grad for p in head.parameters())
    if notes is not None and trains and is_frozen and bool((magnitude != 1).any()):
        notes.append(
            "the prototypes' magnitudes in the file were learnt; head.norm_last_layer=true keeps them as they are"
        )
    return _in_order(state, own)


def _in_timms_names(state: State, backbone: nn.Module) -> dict[str, Tensor]:
    """What timm itself makes of other publishers' files of this model."""
    modules = (sys.modules[cls.__module__] for cls in type(backbone).__mro__)
    rename = next((m.checkpoint_filter_fn for m in modules if hasattr(m, "checkpoint_filter_fn")), None)
    if rename is None:
        return dict(state)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # timm's filters print
            return dict(rename(dict(state), backbone))
    except Exception:  # not made for this file: what does not fit is named below
        return dict(state)


def _check_vit(state: State, backbone: nn.Module, args: Mapping[str, Any]) -> None:
    """ConfigError when `state` is that of a ViT of another width, depth or patch size, before timm resizes patches."""
    theirs, ours = _vit_shape(state), _vit_shape(backbone.state_dict())
    name = _name(backbone)
    if theirs and ours and theirs != ours:
        both = [f"width {width}, {depth} blocks, patch {patch}" for width, depth, patch in (ours, theirs)]
        width, depth, patch = theirs
        known = _PUBLISHED.get(theirs)
        if ours[:2] == theirs[:2]:
            remedy = f"backbone.kwargs.patch_size={patch}"
        elif known not in (None, name):
            remedy = f"backbone.name={known}"
        else:
            remedy = (
                f"backbone.kwargs={{embed_dim: {width}, depth: {depth}, patch_size: {patch}, num_heads: ...}}, "
                "with as many heads as it was trained with"
            )
        raise ConfigError(
            f"backbone.name={name} has {both[0]}, but the checkpoint has {both[1]}; set {remedy}"
        )
    num_heads = _NUM_HEADS.get(str(args.get("arch")))
    attention = next((m for m in backbone.modules() if hasattr(m, "num_heads") and hasattr(m, "qkv")), None)
    if theirs and num_heads and attention is not None and attention.num_heads != num_heads:
        raise ConfigError(
            f"backbone.name={name} has {attention.num_heads} attention heads, but the checkpoint's "
            f"arch={args['arch']} has {num_heads}; set backbone.kwargs.num_heads={num_heads}"
        )


def _vit_shape(state: State) -> tuple[int, int, int] | None:
    """(width, number of blocks, patch) of a ViT's state dict; None of any other."""
    patches = state.get("patch_embed.proj.weight")
    blocks = [int(k.split(".")[1]) for k in state if re.match(r"blocks\.\d+\.norm1\.", k)]
    if patches is None or patches.ndim != 4 or not blocks:
        return None
    return patches.shape[0], max(blocks) + 1, patches.shape[-1]


def _head_settings(state: State) -> dict[str, int | bool | None]:
    """The `head.*` settings that a head's tensors tell, None where they do not."""
    prototypes = state.get("last_layer.weight_v")
    linear = [v for k, v in state.items() if k.startswith("mlp.") and k.endswith("weight") and v.ndim == 2]
    return {
        "out_dim": None if prototypes is None else prototypes.shape[0],
        "bottleneck_dim": None if prototypes is None else prototypes.shape[1],
        "num_layers": len(linear) or None,
        "hidden_dim": linear[0].shape[0] if len(linear) > 1 else None,
        # Between layers only: with a single one there is nowhere to have it.
        "use_bn": any(k.endswith("running_mean") for k in state) if len(linear) > 1 else None,
    }


def _differences(state: State, own: State) -> tuple[list[str], list[str], list[str]]:
    """Names that are missing, that are too many, and whose shapes differ."""
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    return (
        missing,
        [k for k in state if k not in own],
        [k for k in own if k in state and state[k].shape != own[k].shape],
    )


def _check_names(state: State, own: State, what: str, arch: Any) -> None:
    missing, unexpected, reshaped = _differences(state, own)
    problems = [
        *_told("lacks", missing),
        *_told("has beside it", unexpected),
        *_told("differs in", [f"{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}" for k in reshaped]),
    ]
    if problems:
        trained = f" (it was trained as arch={arch})" if arch else ""
        raise ConfigError(
            f"the checkpoint is not of this {what}{trained}: it {'; it '.join(problems)}; "
            f"set {what}.* to what it was trained with"
        )


def _in_order(state: State, own: State) -> dict[str, Tensor]:
    """The tensors of `own`'s names; counters of batches that old files lack stay."""
    return {k: state.get(k, own[k]) for k in own}


def _told(what: str, names: list[str]) -> Iterator[str]:
    if names:
        yield f"{what} {_some(names)}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _name(backbone: nn.Module) -> str:
    config = getattr(backbone, "pretrained_cfg", None) or {}
    return str(config.get("architecture") or type(backbone).__name__)


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
