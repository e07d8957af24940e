"""A backbone's tensors under the names of a model of the transformers library: programs.py's table, read backwards.

The names come from that model. The table says which of timm's tensors each of them is, so that both directions
share one table. Axes: D embed, N patches, R registers.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from dinoray.models.published.programs import timms_names


class AnotherNetworkError(ValueError):
    """The tensors are not those of the model; the message says which is the first that differs."""


_PARTS = {"q": 0, "k": 1, "v": 2, "gate": 0, "up": 1}
_IN_TIMM = (
    (r"(register|storage)_tokens$", "reg_token"),
    (r"ls([12])\.gamma$", r"gamma_\1"),
    (r"mlp\.w1\.", "mlp.fc1_g."),
    (r"mlp\.w2\.", "mlp.fc1_x."),
    (r"mlp\.w3\.", "mlp.fc2."),
    (r"attn\.([qv])\.bias$", r"attn.\1_bias"),
)
"""From the names that timm converts while it loads a file to those in its models, where they differ."""


def in_transformers_names(own: Mapping[str, Tensor], wanted: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Return the tensors of a model with the names and shapes in `wanted`, made of the backbone's tensors `own`.

    The file has all that the library expects: mask tokens, which only masked training uses, are 0, layer scales that
    the backbone lacks are 1, and a pooling layer passes on the class token.

    Raises AnotherNetworkError if a tensor is left over, missing, or of another shape.
    """
    used: set[str] = set()
    made: dict[str, Tensor] = {}
    for name, timms in timms_names(wanted).items():
        tensor = _constant(name, wanted[name])
        if tensor is None:
            tensor = _taken(timms, own, used)
        if tensor is None and ".ls" in timms:
            tensor = torch.ones(wanted[name])
        if tensor is None:
            raise AnotherNetworkError(f"the backbone has no {timms}")
        if tensor.numel() != wanted[name].numel():
            raise AnotherNetworkError(
                f"{timms} has the shape {tuple(tensor.shape)}, not {tuple(wanted[name])}"
            )
        made[name] = tensor.reshape(wanted[name]).contiguous()
    if left := [name for name in own if name not in used]:
        raise AnotherNetworkError(f"it has no {left[0]}")
    return made


def _constant(name: str, shape: torch.Size) -> Tensor | None:
    """Return a tensor that does not depend on the backbone's weights."""
    if name == "pooler.dense.weight":
        return torch.eye(shape[0])
    if name == "pooler.dense.bias" or name.endswith("mask_token"):
        return torch.zeros(shape)
    return None


def _taken(name: str, own: Mapping[str, Tensor], used: set[str]) -> Tensor | None:
    """Return the tensor `name`, or the part of a joined one; None if the backbone has none. Notes what is used."""
    names = [name, *(re.sub(pattern, timms, name) for pattern, timms in _IN_TIMM)]
    if whole := next((one for one in names if one in own), None):
        used.add(whole)
        return own[whole]
    part = re.fullmatch(r"(.*)(attn\.|mlp\.)(q|k|v|gate|up)\.(\w+)", name)
    if part is None:
        return None
    whole = f"{part[1]}{part[2]}{'qkv' if part[2] == 'attn.' else 'fc1'}.{part[4]}"
    if whole not in own:
        return None
    used.add(whole)
    return own[whole].chunk(3 if part[2] == "attn." else 2)[_PARTS[part[3]]]
