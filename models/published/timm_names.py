"""Rename a ViT's tensors from the transformers library's names to timm's; recognise other libraries'
names."""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

_BLOCK = r"(?:encoder\.layer|layers?)\.(\d+)\."
_RENAMED = (
    (r"embeddings\.(cls_token|mask_token|register_tokens)", r"\1"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (rf"{_BLOCK}(?:layernorm_before|norm1)\.", r"blocks.\1.norm1."),
    (rf"{_BLOCK}(?:layernorm_after|norm2)\.", r"blocks.\1.norm2."),
    (rf"{_BLOCK}attention\.(?:attention\.)?(?:query|q_proj)\.", r"blocks.\1.attn.q."),
    (rf"{_BLOCK}attention\.(?:attention\.)?(?:key|k_proj)\.", r"blocks.\1.attn.k."),
    (rf"{_BLOCK}attention\.(?:attention\.)?(?:value|v_proj)\.", r"blocks.\1.attn.v."),
    (rf"{_BLOCK}attention\.(?:output\.dense|o_proj)\.", r"blocks.\1.attn.proj."),
    (rf"{_BLOCK}(?:intermediate\.dense|mlp\.fc1)\.", r"blocks.\1.mlp.fc1."),
    (rf"{_BLOCK}(?:output\.dense|mlp\.fc2)\.", r"blocks.\1.mlp.fc2."),
    (rf"{_BLOCK}layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"layernorm\.", "norm."),
)


_LIBRARIES = {
    "transformers": r"embeddings\.|encoder\.(?:layer|layers|stages)\.\d+\.|embedder\.",
    "torchvision": r"conv_proj\.|encoder\.layers\.encoder_layer_|features\.\d+\.\d+\.",
    "MMPretrain": r"patch_embed\.projection\.|layers\.\d+\.(?:ln1|ffn)\.",
    "open_clip": r"(?:visual\.)?(?:class_embedding$|transformer\.resblocks\.)",
}
"""Name of a library -> pattern of names that only its networks have."""


def in_timms_names(network: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a network's tensors in timm's names; unchanged unless the names are from transformers.

    The three projections of each attention become one, `attn.qkv`, as in timm.
    """
    if "backbone.embeddings.patch_embeddings.projection.weight" not in network:
        return network
    named = {_renamed(name): tensor for name, tensor in network.items()}
    joined: dict[str, Tensor] = {}
    for name, tensor in named.items():
        match = re.fullmatch(r"(backbone\.blocks\.\d+\.attn\.)[qkv](\.\w+)", name)
        if match is None:
            joined[name] = tensor
        else:
            joined[f"{match[1]}qkv{match[2]}"] = _joined(named, match[1], match[2])
    return joined


def publisher(names: Iterable[str]) -> str | None:
    """Return the library that uses these names, None for timm's names and for unknown names."""
    found = set(names)
    for library, pattern in _LIBRARIES.items():
        if any(re.match(pattern, name) for name in found):
            return library
    return None


def _joined(named: Mapping[str, Tensor], before: str, after: str) -> Tensor:
    """Return query, key and value of one attention as one tensor; a missing bias becomes zeros."""
    parts = [named.get(f"{before}{which}{after}") for which in "qkv"]
    some = next(part for part in parts if part is not None)
    return torch.cat([torch.zeros_like(some) if part is None else part for part in parts])


def _renamed(name: str) -> str:
    """Return timm's name of one tensor, prefixed with `backbone.`."""
    inside = name.removeprefix("backbone.")
    for pattern, replacement in _RENAMED:
        inside, times = re.subn(f"^{pattern}", replacement, inside)
        if times:
            return f"backbone.{inside}"
    return name
