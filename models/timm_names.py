"""Rename the tensors of a ViT from the names of the transformers library to timm's."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_RENAMED = (
    (r"embeddings\.(cls_token|mask_token|register_tokens)", r"\1"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"encoder\.layer\.(\d+)\.(?:layernorm_before|norm1)\.", r"blocks.\1.norm1."),
    (r"encoder\.layer\.(\d+)\.(?:layernorm_after|norm2)\.", r"blocks.\1.norm2."),
    (r"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.", r"blocks.\1.attn.\2."),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"blocks.\1.attn.proj."),
    (r"encoder\.layer\.(\d+)\.(?:intermediate\.dense|mlp\.fc1)\.", r"blocks.\1.mlp.fc1."),
    (r"encoder\.layer\.(\d+)\.(?:output\.dense|mlp\.fc2)\.", r"blocks.\1.mlp.fc2."),
    (r"encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"layernorm\.", "norm."),
)


def in_timms_names(network: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a network's tensors under timm's names; as they are unless transformers has named them.

    The three projections of each attention become one, `attn.qkv`, as timm has it.
    """
    if "backbone.embeddings.patch_embeddings.projection.weight" not in network:
        return network
    named = {_renamed(name): tensor for name, tensor in network.items()}
    joined: dict[str, Tensor] = {}
    for name, tensor in named.items():
        match = re.fullmatch(r"(backbone\.blocks\.\d+\.attn\.)(query|key|value)(\.\w+)", name)
        if match is None:
            joined[name] = tensor
            continue
        parts = _parts(named, match[1], match[3])
        if parts is None:
            return network
        joined[f"{match[1]}qkv{match[3]}"] = torch.cat(parts)
    return joined


def _parts(named: Mapping[str, Tensor], before: str, after: str) -> list[Tensor] | None:
    """Query, key and value of one attention; None unless all are there in the same shape."""
    parts = [named.get(f"{before}{which}{after}") for which in ("query", "key", "value")]
    found = [part for part in parts if part is not None]
    return found if len(found) == 3 and len({part.shape for part in found}) == 1 else None


def _renamed(name: str) -> str:
    """The name of one tensor, with `backbone.` before it."""
    inside = name.removeprefix("backbone.")
    for pattern, replacement in _RENAMED:
        inside, times = re.subn(f"^{pattern}", replacement, inside)
        if times:
            return f"backbone.{inside}"
    return name
