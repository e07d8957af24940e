"""The class token's self-attention over the patches, in the last block of a ViT.

Does not change the backbone. Supports timm's two families of ViT (VisionTransformer, and Eva, which includes
DINOv3). No files and no pictures here. Axes: B images, h w patches, N = prefix + h*w tokens.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoray.models.errors import ConfigError

_SUPPORTED = "attention maps need a ViT with a class token, e.g. vit_small_patch16_224"


def patch_size(backbone: nn.Module) -> int:
    """Return the side of a patch in pixels.

    Raises ConfigError without square patches or class-token attention.
    """
    _last_attention(backbone)
    sides = getattr(getattr(backbone, "patch_embed", None), "patch_size", None)
    if not isinstance(sides, tuple) or len(set(sides)) != 1:
        raise ConfigError(f"{_name(backbone)} has no plain square patches; {_SUPPORTED}")
    return int(sides[0])


@torch.no_grad()
def cls_attention(backbone: nn.Module, images: Tensor) -> Tensor:
    """Return the class token's softmax row over the patches in the last block, per head.

    [B,3,H,W] -> float32 [B,heads,H/p,W/p]. The attention to the class token itself and to registers is left
    out without rescaling, so a map sums to less than one. Runs in eval mode without gradients, then restores
    the backbone's modes, hooks and kernels. H and W must be multiples of the patch (see `pad_to_patch`).
    Raises ConfigError if the backbone has no such attention, or takes only images of another size.
    """
    attention, patch = _last_attention(backbone), patch_size(backbone)
    height, width = images.shape[-2:]
    if height % patch or width % patch:
        raise ValueError(f"images of {width}x{height} px: sides must be multiples of the patch, {patch} px")
    seen: list[Tensor] = []
    # The fused kernel never forms the probabilities; the plain kernel passes them through its dropout.
    with _eval_mode(backbone), _unfused(attention):
        hook = attention.get_submodule("attn_drop").register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0])
        )
        try:
            backbone(images)
        except AssertionError as error:  # timm's way to refuse a size
            raise ConfigError(
                f"{_name(backbone)} cannot take images of {width}x{height} px: {error}; "
                "take a backbone with dynamic_img_size, which takes any size"
            ) from error
        finally:
            hook.remove()
    grid = height // patch, width // patch
    prefix = int(backbone.num_prefix_tokens)  # type: ignore[arg-type]
    if len(seen) != 1 or seen[0].shape[-2:] != (prefix + grid[0] * grid[1],) * 2:
        raise ConfigError(
            f"{_name(backbone)}: its last block does not attend from all tokens to all; {_SUPPORTED}"
        )
    row = seen[0][:, :, 0, prefix:]
    return row.float().reshape(*row.shape[:2], *grid)


def pad_to_patch(images: Tensor, patch: int) -> tuple[Tensor, tuple[int, int]]:
    """Pad [B,3,H,W] at the right and bottom to multiples of `patch`; return it and (H, W).

    Less than one patch is added, so every patch contains a part of the image. Maps scaled up by `patch` are
    then cropped to [:H, :W]. The border pixels are repeated: a reflection would show content twice and
    attract attention, and zeros would make an edge.
    """
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % patch, 0, -height % patch), mode="replicate"), (height, width)


def _last_attention(backbone: nn.Module) -> nn.Module:
    """Return the last block's attention layer.

    Raises ConfigError if it cannot run without the fused kernel.
    """
    blocks = getattr(backbone, "blocks", None)
    layer = getattr(blocks[-1], "attn", None) if isinstance(blocks, nn.Sequential | nn.ModuleList) else None
    if (
        getattr(backbone, "cls_token", None) is None
        or not getattr(backbone, "num_prefix_tokens", 0)
        or not isinstance(getattr(layer, "fused_attn", None), bool)
        or not isinstance(getattr(layer, "attn_drop", None), nn.Module)
    ):
        raise ConfigError(f"{_name(backbone)} has no class token that attends to patches; {_SUPPORTED}")
    assert layer is not None
    return layer


@contextlib.contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    """Set eval mode inside the block, then restore each part's own mode: parts may have different modes."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextlib.contextmanager
def _unfused(attention: nn.Module) -> Iterator[None]:
    was_fused = attention.fused_attn
    attention.fused_attn = False  # type: ignore[assignment]
    try:
        yield
    finally:
        attention.fused_attn = was_fused


def _name(backbone: nn.Module) -> str:
    return f"a backbone of type {type(backbone).__name__}"
