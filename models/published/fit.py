"""Fit a checkpoint's tensors to a dinoray network, or raise an error with the setting to change.

Stands below checkpoint.py, which handles files. Names are inside a backbone or a head, without a prefix.
Before an error suggests a backbone, that backbone is built without memory and the tensors are tried on it.
"""

import contextlib
import io
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

from dinoray.models.backbone import embed_dim, image_layers
from dinoray.models.errors import ConfigError
from dinoray.models.input_channels import inflate_layers
from dinoray.models.lora import without_adapters
from dinoray.models.published.candidates import candidates, known_heads, vit_shape
from dinoray.models.published.image_shape import check_grid

_NOT_OF_BACKBONE = re.compile(
    r"(fc|head|head_dist|classifier|last_linear|pooler|decoder|predictor|projector|projection_head)\."
    r"|decoder_|(mask_token|masked_embed|position_ids)$"
)
_FIRST = (
    "patch_embed.proj.weight",
    "conv1.weight",
    "conv_stem.weight",
    "stem.0.weight",
    "stem.conv1.conv.weight",
)
"""Layers that take the image."""

State = Mapping[str, Tensor]


def fit_backbone(
    state: State,
    backbone: nn.Module,
    *,
    args: Mapping[str, Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    notes: list[str] | None = None,
) -> dict[str, Tensor]:
    """Return `state` as the backbone's state dict: timm's names, no classifier, a fitted grid.

    `args`: the arguments that the checkpoint was trained with, `program` and `num_heads`, as in `Weights`.
    `kwargs`: the configured `backbone.kwargs`. Each change adds a line to `notes`. Raises ConfigError if the
    networks are different.
    """
    notes = [] if notes is None else notes
    own = without_adapters(backbone.state_dict())
    named = _chunks_joined(state)
    _check_vit(named, backbone, args or {}, kwargs or {})
    dropped = [k for k in named if k not in own and _NOT_OF_BACKBONE.match(k)]
    if dropped:
        notes.append(f"left out, not part of the backbone: {_some(dropped)}")
    bare, inflated = inflate_layers(_matched(named, backbone), own, image_layers(backbone))
    notes.extend(inflated)
    before, after = state.get("pos_embed"), bare.get("pos_embed")
    if before is not None and after is not None and abs(before.shape[1] - after.shape[1]) > 1:
        notes.append(
            f"position embeddings resized from {before.shape[1]} to {after.shape[1]} tokens, timm's way: the "
            "backbone's own grid is another"
        )
    if any(differences := _differences(bare, own)):
        if not differences[0] and not differences[1]:
            check_grid(bare, own, differences[2])
        raise ConfigError(_misfit(named, bare, backbone, args or {}, kwargs or {}))
    if lost := _lost_key_biases(named, own):
        notes.append(
            f"left out: {_some(lost)}, the part for keys, which the backbone does not have: its features differ from "
            "those of the file's network"
        )
    if "storage_tokens" in state and getattr(backbone, "global_pool", None) == "avg":
        notes.append(
            "the backbone averages its patch tokens, but DINOv3 trains the class token, which "
            "backbone.kwargs.global_pool=token takes"
        )
    return _in_order(bare, own)


def fit_head(state: State, head: nn.Module, *, notes: list[str] | None = None) -> dict[str, Tensor]:
    """Return `state` as the head's state dict.

    A ConfigError lists the values of differing `head.*` settings.
    """
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
    if problems := _problems(state, own):
        raise ConfigError(
            f"the checkpoint's head is of another kind: it {problems}; set init.load=backbone to leave the head out"
        )
    magnitude = state["last_layer.weight_g"]
    is_frozen = not head.get_parameter("last_layer.weight_g").requires_grad
    trains = any(p.requires_grad for p in head.parameters())
    if notes is not None and trains and is_frozen and bool((magnitude != 1).any()):
        notes.append(
            "the prototypes' magnitudes in the file were learnt; head.norm_last_layer=true keeps them as they are"
        )
    return _in_order(state, own)


def _in_timms_names(state: State, backbone: nn.Module) -> dict[str, Tensor]:
    """Return the tensors as timm itself converts other publishers' files of this model."""
    modules = (sys.modules[cls.__module__] for cls in type(backbone).__mro__)
    rename = next((m.checkpoint_filter_fn for m in modules if hasattr(m, "checkpoint_filter_fn")), None)
    if rename is None:
        return dict(state)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # timm's filters print
            return dict(rename(dict(state), backbone))
    except Exception:  # the filter is not for this file; the caller reports the misfit
        return dict(state)


def _chunks_joined(state: State) -> dict[str, Tensor]:
    """Remove the chunk numbers from the names of DINOv2's blocks; each block has its own number."""
    return {re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", k): v for k, v in state.items()}


def _matched(named: State, backbone: nn.Module) -> dict[str, Tensor]:
    """Return the tensors in the backbone's names, as far as timm can convert them, without other modules."""
    own = without_adapters(backbone.state_dict())
    bare = {k: v for k, v in named.items() if k in own or not _NOT_OF_BACKBONE.match(k)}
    if any(_differences(bare, own)):
        renamed = _in_timms_names(named, backbone)  # all tensors: timm recognises files by the others
        bare = {k: v for k, v in renamed.items() if k in own or not _NOT_OF_BACKBONE.match(k)}
        # timm drops biases that a DINOv3 without them cannot take; they stay here, so that they do not fit.
        bare |= {k: v for k, v in _biases(named, own) if _query_bias(k) not in own and bool(v.any())}
    return bare


def _biases(named: State, own: State) -> Iterator[tuple[str, Tensor]]:
    """Yield the file's biases of queries, keys and values that are not in the backbone under this name.

    DINOv3 multiplies them by `bias_mask`, which is 0 for keys.
    """
    for k, v in named.items():
        if k.endswith("attn.qkv.bias") and k not in own:
            mask = named.get(f"{k}_mask")
            yield k, v if mask is None else v * mask


def _query_bias(name: str) -> str:
    return name.replace("qkv.bias", "q_bias")


def _lost_key_biases(named: State, own: State) -> list[str]:
    """Return the biases whose part for keys is lost: timm's DINOv3 has biases of queries and values alone."""
    return [k for k, v in _biases(named, own) if _query_bias(k) in own and bool(v.chunk(3)[1].any())]


def _check_vit(state: State, backbone: nn.Module, args: Mapping[str, Any], kwargs: Mapping[str, Any]) -> None:
    """Raise ConfigError for a ViT of other width, depth or patch size, before timm would resize patches."""
    theirs, ours = vit_shape(state), vit_shape(backbone.state_dict())
    name = _name(backbone)
    if theirs and ours and theirs != ours:
        both = [f"width {width}, {depth} blocks, patch {patch}" for width, depth, patch in (ours, theirs)]
        raise ConfigError(
            f"backbone.name={name} has {both[0]}, but the checkpoint{_origin(args)} has {both[1]}; "
            f"{_remedy(state, backbone, args, kwargs)}"
        )
    num_heads, own_heads = known_heads(state, args), _num_heads(backbone)
    if num_heads is not None and own_heads not in (None, num_heads):
        raise ConfigError(
            f"backbone.name={name} has {own_heads} attention heads, but the checkpoint{_origin(args)} has "
            f"{num_heads}; set backbone.kwargs.num_heads={num_heads}"
        )


def _origin(args: Mapping[str, Any]) -> str:
    """Return where the checkpoint comes from, as far as it is known, in brackets."""
    known = [str(args["program"])] if args.get("program") else []
    known += [f"arch={args['arch']}"] if args.get("arch") else []
    return f" ({', '.join(known)})" if known else ""


def _misfit(
    named: State, bare: State, backbone: nn.Module, args: Mapping[str, Any], kwargs: Mapping[str, Any]
) -> str:
    """Return the error message for tensors that do not fit the backbone."""
    return (
        f"the checkpoint{_origin(args)} does not fit backbone.name={_name(backbone)}: it "
        f"{_problems(bare, without_adapters(backbone.state_dict()))}; {_remedy(named, backbone, args, kwargs)}"
    )


def _remedy(named: State, backbone: nn.Module, args: Mapping[str, Any], kwargs: Mapping[str, Any]) -> str:
    """Return settings of a backbone that takes these tensors, tried here; or suggest other weights.

    `kwargs`: the configured `backbone.kwargs`, which stay unless a setting replaces them.
    """
    like, shape = _name(backbone), vit_shape(named)
    heads = known_heads(named, args)
    own_heads = heads or (_num_heads(backbone) if shape and shape[0] == embed_dim(backbone) else None)
    for name, wanted in candidates(named, args=args, like=like, num_heads=own_heads):
        if name == like and kwargs and not wanted:
            continue
        try:
            with torch.device("meta"):
                arguments = {**kwargs, **wanted} if name == like else wanted
                model = timm.create_model(name, pretrained=False, num_classes=0, **arguments)
            own = model.state_dict()
            fits = vit_shape(own) == shape and not any(_differences(_matched(named, model), own))
        except Exception:  # a model's constructor may raise anything for unsuitable arguments
            continue
        if fits:
            if heads is not None and _num_heads(model) != heads:
                wanted = {**wanted, "num_heads": heads}
            changed = {k: v for k, v in wanted.items() if name != like or kwargs.get(k) != v}
            settings = [] if name == like else [f"backbone.name={name}"]
            settings += [f"backbone.kwargs.{k}={_yaml(v)}" for k, v in changed.items()]
            drops = name != like and not wanted and bool(kwargs.keys() - {"img_size"})
            rest = " and no backbone.kwargs" if drops else ""
            guess = (
                ", or as many heads as it was trained with"
                if "num_heads" in changed and "backbone" not in args and heads is None
                else ""
            )
            return f"set {' '.join(settings)}{guess}{rest}"
    channels = next((v.shape[1] for k, v in named.items() if k in _FIRST and v.ndim == 4), 3)
    program = args.get("program")
    if channels != 3:
        why = f"it takes images of {channels} channels, not RGB"
    elif program:
        why = f"its names are those of {program}, and no model of timm's that was tried fits"
    else:
        why = "no model of timm's that was tried fits"
    return f"{why}: start from other weights, or without init.from (--init-from)"


def _num_heads(backbone: nn.Module) -> int | None:
    """Return the number of a ViT's attention heads; None for any other network."""
    attention = next((m for m in backbone.modules() if hasattr(m, "num_heads") and hasattr(m, "qkv")), None)
    return None if attention is None else int(attention.num_heads)  # type: ignore[arg-type]


def _head_settings(state: State) -> dict[str, int | bool | None]:
    """Return the `head.*` settings that follow from a head's tensors, None for settings that do not."""
    prototypes = state.get("last_layer.weight_v")
    linear = [v for k, v in state.items() if k.startswith("mlp.") and k.endswith("weight") and v.ndim == 2]
    return {
        "out_dim": None if prototypes is None else prototypes.shape[0],
        "bottleneck_dim": None if prototypes is None else prototypes.shape[1],
        "num_layers": len(linear) or None,
        # By name, since a file may hold its tensors in any order.
        "hidden_dim": state["mlp.0.weight"].shape[0] if len(linear) > 1 and "mlp.0.weight" in state else None,
        # Batch norm is between layers only, so a single layer never has it.
        "use_bn": any(k.endswith("running_mean") for k in state) if len(linear) > 1 else None,
    }


def _differences(state: State, own: State) -> tuple[list[str], list[str], list[str]]:
    """Return the names that are missing, unexpected, and of different shape."""
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    return (
        missing,
        [k for k in state if k not in own],
        [k for k in own if k in state and state[k].shape != own[k].shape],
    )


def _problems(state: State, own: State) -> str:
    """Describe how names and shapes differ; empty if they do not."""
    missing, unexpected, reshaped = _differences(state, own)
    shapes = [f"{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}" for k in reshaped]
    return "; it ".join(
        [*_told("lacks", missing), *_told("has beside it", unexpected), *_told("differs in", shapes)]
    )


def _in_order(state: State, own: State) -> dict[str, Tensor]:
    """Return the tensors in the order of `own`; batch counters, which old files lack, keep their value."""
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
