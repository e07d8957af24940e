"""A frozen ViT as a folder that the transformers library loads: config, weights and preprocessing.

No Ray, no writing to a run.

The library writes the folder, and its model's features are compared with the backbone's features before the files
are returned.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from dinoray.models.backbone import embed_dim
from dinoray.models.errors import ConfigError, DinorayError, one_line
from dinoray.models.input_channels import in_chans
from dinoray.models.published.to_transformers import AnotherNetworkError, in_transformers_names
from dinoray.pipeline.export.onnx_export import quiet, require
from dinoray.pipeline.export.timm_export import evaluation_size
from dinoray.pipeline.training.checkpoint import FrozenBackbone

PREPROCESSOR_FILE = "preprocessor_config.json"
TOLERANCE = 1e-4
"""Largest accepted deviation from the backbone, as a share of the largest feature."""
_ROUNDING = 1e-5
_REMEDY = "take --format timm or --format onnx"
_ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh", "SiLU": "silu"}
"""Class of timm's or torch's -> the library's name."""


class TransformersExport(NamedTuple):
    """A folder for transformers: name -> content."""

    files: dict[str, bytes]
    model: str
    """Class of the model."""
    features: str
    """The attribute of the model's output that equals our features, as an expression."""
    deviation: float
    """Largest difference from our backbone at the evaluation size, as a share of the largest feature."""
    deviations: dict[int, float]
    """Other image size -> largest difference, where position embeddings are resized in another way."""


def export_transformers(frozen: FrozenBackbone, *, image_size: int | None = None) -> TransformersExport:
    """Return a folder that `AutoModel.from_pretrained(FOLDER)` loads.

    `image_size` is the side of the centre crops that the run evaluates on (default: its global crop size). Position
    embeddings are stored resized to that size, unless the library resizes them as the run does.

    Raises ConfigError for a network that the library has no model for, and without the package.
    """
    require("transformers", form="transformers")
    import transformers

    backbone: Any = frozen.backbone()
    size = evaluation_size(frozen, image_size)
    kind, config = _model_of(frozen, backbone)
    name = f"{kind}Model"
    features = _features(backbone, name)
    keeps_grid = (
        kind == "Dinov2WithRegisters" and type(backbone) is VisionTransformer and _is_square(backbone)
    )
    side = backbone.patch_embed.img_size[0] if keeps_grid else size
    with quiet(), tempfile.TemporaryDirectory(prefix="dinoray-export-") as scratch:
        try:
            settings = getattr(transformers, f"{kind}Config")(image_size=side, **config)
            with torch.device("meta"):
                model = getattr(transformers, name)(settings)
            wanted = {key: value.shape for key, value in model.state_dict().items()}
            weights = in_transformers_names(_before_blocks(frozen.weights, backbone, side), wanted)
            model.load_state_dict(weights, assign=True)
            model.save_pretrained(scratch, max_shard_size="1TB")
            loaded, report = transformers.AutoModel.from_pretrained(scratch, output_loading_info=True)
        except AnotherNetworkError as error:
            raise _refused(frozen, f"{name} is another network: {error}") from error
        except Exception as error:  # the library raises many types
            raise DinorayError(
                f"transformers {transformers.__version__} cannot hold the exported "
                f"{frozen.config.backbone.name}: {one_line(error)}; {_REMEDY}"
            ) from error
        files = {path.name: path.read_bytes() for path in sorted(Path(scratch).iterdir())}
    if strange := [key for keys in report.values() for key in keys]:
        raise DinorayError(f"{name} does not load {strange[0]} of the exported file; {_REMEDY}")
    differences = _differences(backbone, loaded.eval(), features, [size, *_others(frozen, size)])
    if not differences[size] <= TOLERANCE:
        why = f"{name} computes other features, by up to {differences[size]:.1e} of the largest one"
        raise _refused(frozen, why)
    files[PREPROCESSOR_FILE] = json.dumps(_preprocessing(frozen, size), indent=2).encode()
    others = {at: value for at, value in differences.items() if at != size and not value <= _ROUNDING}
    return TransformersExport(files, name, features, differences[size], others)


def _refused(frozen: FrozenBackbone, why: str) -> ConfigError:
    return ConfigError(
        f"--format transformers: {frozen.config.backbone.name} cannot be a model of transformers: {why}; {_REMEDY}"
    )


def _model_of(frozen: FrozenBackbone, backbone: Any) -> tuple[str, dict[str, Any]]:
    """Return the model's kind, `<kind>Model` and `<kind>Config`, and its config without the image size."""
    is_rotary = type(backbone) is Eva and backbone.rope is not None and backbone.pos_embed is None
    if not is_rotary and not isinstance(backbone, VisionTransformer):
        raise _refused(frozen, f"{type(backbone).__name__} is no plain, DINOv2 or DINOv3 ViT")
    patches, activation = set(backbone.patch_embed.patch_size), type(backbone.blocks[0].mlp.act).__name__
    for is_other, why in (
        (
            in_chans(backbone) != 3,
            f"its images have {in_chans(backbone)} channels, and the library prepares RGB",
        ),
        (backbone.cls_token is None, "it has no class token"),
        (len(patches) > 1, "its patches are not square"),
        (activation not in _ACTIVATIONS, f"its activation {activation} is unknown there"),
    ):
        if is_other:
            raise _refused(frozen, why)
    state, width = frozen.weights, embed_dim(backbone)
    config: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": len(backbone.blocks),
        "num_attention_heads": backbone.blocks[0].attn.num_heads,
        "patch_size": patches.pop(),
        "num_channels": state["patch_embed.proj.weight"].shape[1],
        "layer_norm_eps": getattr(backbone.norm, "eps", 1e-6),
        "hidden_act": _ACTIVATIONS[activation],
    }
    hidden = state["blocks.0.mlp.fc2.weight"].shape[1]
    num_registers = 0 if backbone.reg_token is None else backbone.reg_token.shape[1]
    if is_rotary:
        is_gated = "blocks.0.mlp.fc1_g.weight" in state
        biases = dict.fromkeys(("query_bias", "value_bias"), "blocks.0.attn.q_bias" in state)
        config |= {"intermediate_size": hidden, "num_register_tokens": num_registers, **biases}
        return "DINOv3ViT", config | {"use_gated_mlp": is_gated}
    config["qkv_bias"] = "blocks.0.attn.qkv.bias" in state
    if not num_registers and "blocks.0.ls1.gamma" not in state:
        # The pooling layer of this model alone: it passes on the class token as it is.
        return "ViT", config | {"intermediate_size": hidden, "pooler_act": "linear"}
    is_gated = state["blocks.0.mlp.fc1.weight"].shape[0] == 2 * hidden
    widths = {
        ratio: (width * ratio * 2 // 3 + 7) // 8 * 8 if is_gated else width * ratio for ratio in range(1, 17)
    }
    ratio = next((ratio for ratio, made in widths.items() if made == hidden), None)
    if ratio is None:
        raise _refused(
            frozen, f"its hidden layers have {hidden} channels, which no whole mlp_ratio of Dinov2 gives"
        )
    config |= {"mlp_ratio": ratio, "use_swiglu_ffn": is_gated}
    if num_registers:
        return "Dinov2WithRegisters", config | {"num_register_tokens": num_registers}
    return "Dinov2", config


def _features(backbone: Any, model: str) -> str:
    """Return which part of the model's output is what our backbone returns."""
    if backbone.global_pool == "token":
        return "last_hidden_state[:, 0]"
    if backbone.global_pool == "avg":
        return f"last_hidden_state[:, {backbone.num_prefix_tokens}:].mean(dim=1)"
    raise ConfigError(
        f"--format transformers: backbone.kwargs.global_pool={backbone.global_pool} has no equal in {model}; {_REMEDY}"
    )


def _is_square(backbone: Any) -> bool:
    rows, columns = backbone.patch_embed.grid_size
    return bool(rows == columns)


def _before_blocks(weights: dict[str, Tensor], backbone: Any, size: int) -> dict[str, Tensor]:
    """Return the weights with the position embeddings of square images of `size` pixels, [1, 1 + N, D].

    The class token and the registers include their own position, as the library adds none to registers.
    """
    if backbone.pos_embed is None:
        return weights
    rows, columns = (size // side for side in backbone.patch_embed.patch_size)
    grid = torch.zeros(1, rows, columns, backbone.pos_embed.shape[-1])
    with torch.no_grad():
        tokens = backbone._pos_embed(grid if backbone.dynamic_img_size else grid.flatten(1, 2))
    last = backbone.num_prefix_tokens
    own = {"cls_token": tokens[:, :1]} | ({"reg_token": tokens[:, 1:last]} if last > 1 else {})
    return (
        weights | own | {"pos_embed": torch.cat([torch.zeros_like(tokens[:, :1]), tokens[:, last:]], dim=1)}
    )


def _others(frozen: FrozenBackbone, size: int) -> list[int]:
    """Return the run's other crop sizes, or a larger size if it has none."""
    return [side for side in dict.fromkeys(frozen.config.crops.crop_sizes) if side != size] or [2 * size]


def _differences(backbone: Any, model: Any, features: str, sizes: Sequence[int]) -> dict[int, float]:
    """Return size -> largest difference of the model's features, as a share of the largest feature."""
    resized = {"interpolate_pos_encoding": True} if type(model).__name__ == "ViTModel" else {}
    found = {}
    for size in sizes:
        images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            ours, tokens = backbone(images), model(pixel_values=images, **resized).last_hidden_state
        first = backbone.num_prefix_tokens
        theirs = tokens[:, 0] if features.endswith("0]") else tokens[:, first:].mean(dim=1)
        found[size] = float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1e-12))
    return found


def _preprocessing(frozen: FrozenBackbone, size: int) -> dict[str, Any]:
    """Return the evaluations' preprocessing for `AutoImageProcessor`."""
    crops = frozen.config.crops
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": round(size * 256 / 224)},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(crops.pixel_mean),
        "image_std": list(crops.pixel_std),
    }
