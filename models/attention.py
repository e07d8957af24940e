"""Where the class token looks: its self-attention over the patches in the last block of a ViT.

Reads a backbone and leaves it as it was. Knows timm's two families of ViT (VisionTransformer, and Eva, which
DINOv3 belongs to); nothing of files or pictures. Axes: B images, h w patches, N = prefix + h*w tokens.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import ConfigError

_SUPPORTED = "attention maps need a ViT with a class token, e.g. vit_small_patch16_224"


def patch_size(backbone: nn.Module) -> int:
    """Side of a patch in pixels. ConfigError when there are no square patches or no class token that attends."""
    _last_attention(backbone)
    sides = getattr(getattr(backbone, "patch_embed", None), "patch_size", None)
    if not isinstance(sides, tuple) or len(set(sides)) != 1:
        raise ConfigError(f"{_name(backbone)} has no plain square patches; {_SUPPORTED}")
    return int(sides[0])


@torch.no_grad()
def cls_attention(backbone: nn.Module, images: Tensor) -> Tensor:
    """The last block's softmax row of the class token, per head, over the patches: [B,3,H,W] -> [B,heads,H/p,W/p].

    float32. What the class token gives to itself and to registers is left out and the rest not scaled up, so a
    map sums to less than one. Always in eval mode without gradients; the backbone's own modes, hooks and
    kernels are as before afterwards. H and W must be multiples of the patch (`pad_to_patch`). ConfigError when
    the backbone has no such attention, or takes images of one size alone and this is another.
    """
    attention, patch = _last_attention(backbone), patch_size(backbone)
    height, width = images.shape[-2:]
    if height % patch or width % patch:
        raise ValueError(f"images of {width}x{height} px: sides must be multiples of the patch, {patch} px")
    seen: list[Tensor] = []
    # The fused kernel never forms the probabilities; the plain one passes them through its dropout.
    with _eval_mode(backbone), _unfused(attention):
        hook = attention.get_submodule("attn_drop").register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0])
        )
        try:
            backbone(images)
        except AssertionError as error:  # timm's way to refuse a size
            raise ConfigError(
                f"{_name(backbone)} cannot take images of {width}x{height} px: {error}; "
                "one with dynamic_img_size takes any"
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
    """Continue [B,3,H,W] to the right and below up to multiples of `patch`; return it and (H, W).

    Less than one patch is added, so every patch holds some of the image, and maps scaled up by `patch` are cut
    back to [:H, :W]. The border is repeated: a reflection would show what lies there twice and be looked at,
    zeros would draw an edge.
    """
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % patch, 0, -height % patch), mode="replicate"), (height, width)


def _last_attention(backbone: nn.Module) -> nn.Module:
    """The attention layer of the last block, known to be able to do without the fused kernel."""
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
    """Eval mode throughout, then each part's own mode again: parts of a network may differ in it."""
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
