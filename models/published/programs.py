"""Programs that write files of weights: how their files are recognised, and how their names become timm's.

One table. Tensors of the transformers library are renamed here. The names of DINOv2, DINOv3, ConvNeXt and XCiT
are converted by timm itself, for the model that they are loaded into; see fit.py.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

Rules = tuple[tuple[str, str], ...]
"""(pattern at the start of a name inside a backbone, its replacement); the first that matches is applied."""


class Program(NamedTuple):
    """A program, or one kind of its networks. Patterns are searched in names; an empty pattern never matches."""

    name: str
    inside: str = ""
    """Matches the start of names inside a backbone that only this program uses."""
    place: str = ""
    """Matches within the place of a network in the file."""
    rules: Rules = ()
    """From the program's names to timm's; empty if timm converts them, or if they cannot be converted."""
    pickled: bytes = b""
    """Bytes of files that hold objects of the program, which cannot be read without running code."""
    remedy: str = ""
    """How to get a file of weights from a file with such objects; `{file}` is its name."""
    num_heads: Mapping[str, int] = {}
    """Architecture's name in the file -> its number of attention heads, where timm's model has another."""


_LAYER = r"(?:encoder\.|model\.)?layers?\.(\d+)\."
_BLOCKS: Rules = (
    (rf"{_LAYER}(?:layernorm_before|norm1)\.", r"blocks.\1.norm1."),
    (rf"{_LAYER}(?:layernorm_after|norm2)\.", r"blocks.\1.norm2."),
    (rf"{_LAYER}attention\.(?:attention\.)?(?:query|q_proj)\.", r"blocks.\1.attn.q."),
    (rf"{_LAYER}attention\.(?:attention\.)?(?:key|k_proj)\.", r"blocks.\1.attn.k."),
    (rf"{_LAYER}attention\.(?:attention\.)?(?:value|v_proj)\.", r"blocks.\1.attn.v."),
    (rf"{_LAYER}attention\.(?:output\.dense|o_proj)\.", r"blocks.\1.attn.proj."),
    (rf"{_LAYER}layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"embeddings\.(cls_token|mask_token)", r"\1"),
)
_VIT: Rules = (
    *_BLOCKS,
    (rf"{_LAYER}(?:intermediate\.dense|mlp\.fc1|mlp\.weights_in)\.", r"blocks.\1.mlp.fc1."),
    (rf"{_LAYER}(?:output\.dense|mlp\.fc2|mlp\.weights_out|mlp\.down_proj)\.", r"blocks.\1.mlp.fc2."),
    (rf"{_LAYER}mlp\.(gate|up)_proj\.", r"blocks.\1.mlp.\2."),
    (r"embeddings\.register_tokens", "register_tokens"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"layernorm\.", "norm."),
)
_DINOV3: Rules = (
    *_BLOCKS,
    (r"embeddings\.register_tokens", "storage_tokens"),
    (r"embeddings\.patch_embeddings\.", "patch_embed.proj."),
)
_DINOV3_MLP: Rules = (
    (rf"{_LAYER}mlp\.up_proj\.", r"blocks.\1.mlp.fc1."),
    (rf"{_LAYER}mlp\.down_proj\.", r"blocks.\1.mlp.fc2."),
)
_DINOV3_SWIGLU: Rules = (
    (rf"{_LAYER}mlp\.gate_proj\.", r"blocks.\1.mlp.w1."),
    (rf"{_LAYER}mlp\.up_proj\.", r"blocks.\1.mlp.w2."),
    (rf"{_LAYER}mlp\.down_proj\.", r"blocks.\1.mlp.w3."),
)
_STAGE = r"stages\.(\d+)\.layers\.(\d+)\."
_DINOV3_CONVNEXT: Rules = (
    (r"stages\.(\d+)\.downsample_layers\.", r"downsample_layers.\1."),
    (rf"{_STAGE}depthwise_conv\.", r"stages.\1.\2.dwconv."),
    (rf"{_STAGE}layer_norm\.", r"stages.\1.\2.norm."),
    (rf"{_STAGE}pointwise_conv([12])\.", r"stages.\1.\2.pwconv\3."),
    (rf"{_STAGE}gamma", r"stages.\1.\2.gamma"),
    (r"layer_norm\.", "norm."),
)

PROGRAMS = (
    # By names inside a network; the first that matches counts.
    Program(
        "transformers, DINOv3", r"(?:model\.)?layer\.\d+\.mlp\.gate_proj\.", rules=_DINOV3 + _DINOV3_SWIGLU
    ),
    Program("transformers, DINOv3", r"embeddings\.patch_embeddings\.weight$", rules=_DINOV3 + _DINOV3_MLP),
    Program("transformers, DINOv3", r"stages\.\d+\.layers\.\d+\.depthwise_conv\.", rules=_DINOV3_CONVNEXT),
    Program("transformers, DINOv2", rf"{_LAYER}layer_scale1\.", rules=_VIT),
    Program("transformers, ViT", r"embeddings\.patch_embeddings\.projection\.", rules=_VIT),
    Program("transformers", r"embeddings\.|encoder\.(?:layer|layers|stages)\.\d+\.|embedder\."),
    Program("torchvision", r"conv_proj\.|encoder\.layers\.encoder_layer_|features\.\d+\.\d+\."),
    Program("MMPretrain", r"patch_embed\.projection\.|layers\.\d+\.(?:ln1|ffn)\."),
    Program("open_clip", r"(?:visual\.)?(?:class_embedding$|transformer\.resblocks\.)"),
    Program("DINOv3", r"storage_tokens$|rope_embed\.periods$|norms\.3\."),
    Program(
        "DINOv2",
        r"register_tokens$|blocks\.(?:\d+\.)?\d+\.(?:ls1\.gamma$|mlp\.w12\.)",
        pickled=b"torch.distributed._shard",
        remedy="pass the teacher_checkpoint.pth in eval/training_*/ of that training, which holds whole tensors",
    ),
    # By the places of networks in the file.
    Program("solo-learn", place=r"momentum_backbone"),
    Program("lightly", place=r"(?:student|teacher)_backbone"),
    Program(
        "lightly-train",
        place=r"(?:^|\.)_model$",
        pickled=b"lightly_train",
        remedy="export its backbone: lightly-train export checkpoint={file} out=weights.pt part=model "
        "format=torch_state_dict",
    ),
    # There vit_small has 12 heads of 32 channels.
    Program("MoCo v3", place=r"(?:base|momentum)_encoder", num_heads={"vit_small": 12, "vit_base": 12}),
    Program("MoCo", place=r"encoder_[qk]"),
    Program("timm", place=r"^state_dict_ema"),
)


def programs_of(names: Iterable[str], places: Iterable[str]) -> list[Program]:
    """Return the programs that a file seems to come from: by its networks' places, then by the names inside."""
    found, where = set(names), [place for place in places if place]
    by_place = (p for p in PROGRAMS if p.place and any(re.search(p.place, place) for place in where))
    by_name = (p for p in PROGRAMS if p.inside and any(re.match(p.inside, name) for name in found))
    return [p for p in (next(by_place, None), next(by_name, None)) if p is not None]


def seen_in(programs: Iterable[Program], arch: object) -> dict[str, str | int]:
    """Return `program`, the programs' names, and `num_heads` if an architecture of this name has its own number."""
    seen: dict[str, str | int] = {}
    for program in programs:
        seen["program"] = ", ".join([str(seen["program"]), program.name] if seen else [program.name])
        if isinstance(arch, str) and arch in program.num_heads:
            seen["num_heads"] = program.num_heads[arch]
    return seen


def writer_of_objects(data: bytes) -> Program | None:
    """Return the program whose pickled objects a file holds beside its tensors, if it is known."""
    return next((program for program in PROGRAMS if program.pickled and program.pickled in data), None)


def in_timms_names(network: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a network's tensors in the names that timm reads; unchanged unless the table has rules for them.

    `backbone.` stands before the names inside the backbone. Query, key and value of each attention become one
    tensor `attn.qkv`, and the two parts of a gated layer become `mlp.fc1`, as in timm.
    """
    rules = _rules(name.removeprefix("backbone.") for name in network if name.startswith("backbone."))
    if not rules:
        return network
    named = {_renamed(name, rules): tensor for name, tensor in network.items()}
    joined: dict[str, Tensor] = {}
    for name, tensor in named.items():
        match = re.fullmatch(r"(backbone\.blocks\.\d+\.)(?:(attn\.)[qkv]|mlp\.(?:gate|up))\.(\w+)", name)
        if match is None:
            joined[name] = tensor
            continue
        parts, whole = (
            (("attn.q", "attn.k", "attn.v"), "attn.qkv") if match[2] else (("mlp.gate", "mlp.up"), "mlp.fc1")
        )
        if f"{match[1]}{whole}.{match[3]}" not in joined:
            joined |= _joined(
                named, [f"{match[1]}{part}.{match[3]}" for part in parts], f"{match[1]}{whole}.{match[3]}"
            )
    return joined


def timms_names(names: Iterable[str]) -> dict[str, str]:
    """Return the names inside a backbone of a program -> timm's; query, key, value and gates are still apart."""
    listed = list(names)
    rules = _rules(listed)
    return {name: _renamed(name, rules).removeprefix("backbone.") for name in listed}


def _rules(inside: Iterable[str]) -> Rules:
    """Return the rules for a backbone with these names inside; none if the table has none."""
    return next((program.rules for program in programs_of(inside, ())), ())


def _joined(named: Mapping[str, Tensor], parts: list[str], whole: str) -> dict[str, Tensor]:
    """Return the parts as one tensor `whole`; a missing bias becomes zeros, without a weight nothing is joined."""
    there = [named[part] for part in parts if part in named]
    if len(there) < len(parts) and not whole.endswith(".bias"):
        return {part: named[part] for part in parts if part in named}
    return {whole: torch.cat([named.get(part, torch.zeros_like(there[0])) for part in parts])}


def _renamed(name: str, rules: Rules) -> str:
    """Return timm's name of one tensor, prefixed with `backbone.`."""
    inside = name.removeprefix("backbone.")
    for pattern, replacement in rules:
        inside, times = re.subn(f"^{pattern}", replacement, inside)
        if times:
            return f"backbone.{inside}"
    return name
