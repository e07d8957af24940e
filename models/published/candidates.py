"""List the timm models that a checkpoint's tensors may belong to, by names and shapes alone."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import timm
from torch import Tensor

State = Mapping[str, Tensor]
Candidate = tuple[str, dict[str, Any]]
"""A model's name, and further arguments for it."""


def _dinov3(size: str) -> list[str]:
    """Return the names of timm's DINOv3 ViTs of one size: with and without gated layers and biases."""
    names = [f"vit_{size}{plus}_patch16_dinov3{bias}" for plus in ("", "_plus") for bias in ("", "_qkvb")]
    return [name for name in names if timm.is_model(name)]


_VITS = {
    (192, 12, 16): ["vit_tiny_patch16_224"],
    (384, 12, 8): ["vit_small_patch8_224"],
    (384, 12, 14): ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"],
    (384, 12, 16): ["vit_small_patch16_224", *_dinov3("small"), "deit_small_distilled_patch16_224"],
    (768, 12, 8): ["vit_base_patch8_224"],
    (768, 12, 14): ["vit_base_patch14_dinov2", "vit_base_patch14_reg4_dinov2"],
    (768, 12, 16): ["vit_base_patch16_224", *_dinov3("base"), "beit_base_patch16_224"],
    (768, 12, 32): ["vit_base_patch32_224"],
    (1024, 24, 14): ["vit_large_patch14_dinov2", "vit_large_patch14_reg4_dinov2", "vit_large_patch14_224"],
    (1024, 24, 16): ["vit_large_patch16_224", *_dinov3("large")],
    (1280, 32, 14): ["vit_huge_patch14_224"],
    (1280, 32, 16): _dinov3("huge"),
    (1536, 40, 14): ["vit_giant_patch14_dinov2", "vit_giant_patch14_reg4_dinov2"],
    (4096, 40, 16): ["vit_7b_patch16_dinov3"],
}
"""(width, blocks, patch) of ViTs with published weights."""
_ARCHITECTURES = {"vit_tiny": (192, 3), "vit_small": (384, 6), "vit_base": (768, 12)}
"""The published code's ViTs: width, and number of attention heads, which tensor shapes do not show."""
_FAMILIES = (
    (
        r"layer1\.",
        "resnet18 resnet34 resnet50 resnet101 resnet152 wide_resnet50_2 resnext50_32x4d resnet18d resnet50d",
    ),
    (
        r"(stages\.0|stages_0|downsample_layers)\.",
        "convnext_tiny convnext_small convnext_base convnext_large",
    ),
    (
        r"layers\.0\.blocks\.",
        "swin_tiny_patch4_window7_224 swin_small_patch4_window7_224 swin_base_patch4_window7_224",
    ),
    (r"conv_stem\.", "efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3 mobilenetv3_large_100"),
)
_XCIT = [
    f"xcit_{size}_{patch}_224"
    for size in ("small_12", "medium_24", "nano_12", "tiny_12")
    for patch in ("p16", "p8")
]


def vit_shape(state: State) -> tuple[int, int, int] | None:
    """Return (width, number of blocks, patch) of a ViT's state dict, None for any other state dict."""
    patches = state.get("patch_embed.proj.weight")
    blocks = [int(k.split(".")[1]) for k in state if re.match(r"blocks\.\d+\.norm1\.", k)]
    if patches is None or patches.ndim != 4 or not blocks:
        return None
    return patches.shape[0], max(blocks) + 1, patches.shape[-1]


def known_heads(state: State, args: Mapping[str, Any]) -> int | None:
    """Return a ViT's number of attention heads, if the file's arguments or its architecture's name tell it."""
    shape = vit_shape(state)
    if shape is None:
        return None
    if isinstance(args.get("num_heads"), int):
        return int(args["num_heads"])
    width, num_heads = _ARCHITECTURES.get(str(args.get("arch")), (0, 0))
    return num_heads if shape[0] == width else None


def candidates(
    state: State, *, args: Mapping[str, Any], like: str, num_heads: int | None = None
) -> Iterator[Candidate]:
    """Yield models to try, the likeliest first: named in the file, known by shape, then of one family.

    `args`: the arguments that the checkpoint was trained with; its `backbone` is that section of a dinoray
    config. `like`: the configured model; a ViT without a published shape keeps this name if possible. Shapes
    do not show the number of attention heads; without `num_heads`, each head gets the usual 64 channels.
    """
    if "backbone" in args:
        yield args["backbone"]["name"], args["backbone"]["kwargs"]
    arch = args.get("arch")
    if isinstance(arch, str) and timm.is_model(arch):
        yield arch, {}
    shape = vit_shape(state)
    if shape is not None:
        for name in _VITS.get(shape, []):
            yield name, {}
        yield from _own_vits(state, shape, like, num_heads or _num_heads(shape[0]))
    if any(name.startswith("cls_attn_blocks.") for name in state):
        yield from ((name, {}) for name in _XCIT if timm.is_model(name))
    for pattern, names in _FAMILIES:
        if any(re.match(pattern, name) for name in state):
            yield from ((name, {}) for name in names.split())


def _own_vits(state: State, shape: tuple[int, int, int], like: str, num_heads: int) -> Iterator[Candidate]:
    """Yield ViTs with arguments that give them this shape."""
    width, depth, patch = shape
    kwargs: dict[str, Any] = {"patch_size": patch}
    if re.match(r"vit_\w+$", like) and timm.is_model(like):
        yield like, kwargs
    kwargs = {"embed_dim": width, "depth": depth, "patch_size": patch, "num_heads": num_heads}
    hidden = state.get("blocks.0.mlp.fc1.weight")
    if hidden is not None and hidden.shape[0] != 4 * width:
        kwargs["mlp_ratio"] = hidden.shape[0] / width
    registers = next(
        (state[k] for k in ("reg_token", "register_tokens", "storage_tokens") if k in state), None
    )
    if registers is not None and registers.ndim == 3:
        kwargs["reg_tokens"] = registers.shape[1]
    if "blocks.0.ls1.gamma" in state:
        kwargs["init_values"] = 1e-5
    if "blocks.0.attn.qkv.weight" in state and "blocks.0.attn.qkv.bias" not in state:
        kwargs["qkv_bias"] = False
    yield (like if like.startswith("vit_") else "vit_small_patch16_224"), kwargs
    yield "vit_small_patch16_224", kwargs


def _num_heads(width: int) -> int:
    """Return the number of heads of the usual 64 channels, or the next lower divisor of the width."""
    return next(heads for heads in range(max(1, width // 64), 0, -1) if width % heads == 0)
