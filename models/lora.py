"""Low-rank adapters (LoRA, arXiv 2106.09685): a frozen linear layer W x + b, plus (alpha / r) B A x, which trains.

A [r, in] begins as in the authors' code (Kaiming), B [out, r] at zero: a new adapter changes nothing. Adapted are the
linear layers of attention and MLP in every block (qkv, proj, fc1, fc2). The paper adapts attention alone; adapters on
all linear layers are what it takes to match the training of all weights (QLoRA, arXiv 2305.14314, section 4).

Where no gradient is needed, the merged weight W + (alpha / r) B A computes. Teacher and evaluations therefore have the
numbers of an exported network, bit for bit. This is not the library peft: that renames the layers it wraps, while these
keep timm's names, so that layer decay and initial weights work as without adapters.
"""

import math
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoray.models.errors import ConfigError
from dinoray.models.recompute import blocks

ALPHA = 8
"""The scale of an adapter is ALPHA / r, so that another rank needs no other learning rate (section 4.1)."""
_A, _B = ".lora_a", ".lora_b"
_IN_ATTENTION, _IN_MLP = re.compile(r"\.attn\."), re.compile(r"\.mlp\.")


class _AdaptedLinear(nn.Linear):
    """A linear layer with an adapter; made of a layer of a timm model by `add_adapters`."""

    lora_a: nn.Parameter
    lora_b: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return F.linear(x, _merged(self.weight, self.lora_a, self.lora_b), self.bias)
        change = F.linear(F.linear(x, self.lora_a), self.lora_b)
        return F.linear(x, self.weight, self.bias) + _scale(self.lora_a) * change


def add_adapters(backbone: nn.Module, rank: int, *, name: str, crop_size: int) -> None:
    """Add an adapter of `rank` to each linear layer of attention and MLP, drawn from torch's generator.

    Names of other parameters stay the same. One crop of `crop_size` px passes through the backbone, to see that every
    adapter takes part. `name` is the backbone's, for errors. Raises ConfigError for a backbone without attention, for
    one whose attention passes by its layers, and for a rank above the width of a layer.
    """
    inside = {module for block in blocks(backbone) for module in block.modules()}
    layers = {
        key: layer
        for key, layer in backbone.named_modules()
        if type(layer) is nn.Linear and layer in inside and (_IN_ATTENTION.search(key) or _IN_MLP.search(key))
    }
    if not any(map(_IN_ATTENTION.search, layers)):
        raise ConfigError(
            f"backbone.train=lora({rank}) is for vision transformers, {name} has no attention in its blocks; "
            "set backbone.train=last_n(1) or backbone.train=all"
        )
    narrowest = min(min(layer.weight.shape) for layer in layers.values())
    if rank > narrowest:
        raise ConfigError(
            f"backbone.train=lora({rank}): the rank must be at most {narrowest}, the width of the narrowest layer of "
            f"{name}; set backbone.train=lora({min(ALPHA, narrowest)})"
        )
    for layer in layers.values():
        layer.__class__ = _AdaptedLinear
        down = layer.weight.new_empty(rank, layer.in_features)
        layer.lora_a = nn.Parameter(nn.init.kaiming_uniform_(down, a=math.sqrt(5)))
        layer.lora_b = nn.Parameter(layer.weight.new_zeros(layer.out_features, rank))
    if unused := _not_called(backbone, layers, crop_size):
        raise ConfigError(
            f"backbone.train=lora({rank}): {name} reads the weights of {unused[0]} itself, past an adapter; "
            "set backbone.train=last_n(1) or backbone.train=all"
        )


def merged(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with its adapters merged into the weights: that of a network which has none.

    Without adapters the tensors are those of `state`.
    """
    result = without_adapters(state)
    for layer in (key.removesuffix(_A) for key in state if key.endswith(_A)):
        weight = f"{layer}.weight"
        result[weight] = _merged(state[weight], state[layer + _A], state[layer + _B])
    return result


def without_adapters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict without the tensors of adapters."""
    return {key: value for key, value in state.items() if not is_adapter(key)}


def is_adapter(key: str) -> bool:
    """Return True for the name of a tensor of an adapter."""
    return key.endswith((_A, _B))


def _scale(a: Tensor) -> float:
    return ALPHA / len(a)


@torch.no_grad()
def _merged(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    # Autocast would round the sum to bfloat16, and a merged checkpoint is of float32.
    with torch.autocast(weight.device.type, enabled=False):
        return torch.addmm(weight, b, a, alpha=_scale(a))


def _not_called(backbone: nn.Module, layers: Mapping[str, nn.Module], crop_size: int) -> list[str]:
    """Return the names of the layers that a forward of the backbone does not call."""
    called: set[nn.Module] = set()
    hooks = [
        layer.register_forward_pre_hook(lambda module, _: called.add(module)) for layer in layers.values()
    ]
    was_training, device = backbone.training, next(backbone.parameters()).device
    backbone.eval()
    with torch.enable_grad():  # the meta device, on which FLOPs are counted, has no autocast
        backbone(torch.zeros(1, 3, crop_size, crop_size, device=device))
    backbone.train(was_training)
    for hook in hooks:
        hook.remove()
    return [key for key, layer in layers.items() if layer not in called]
