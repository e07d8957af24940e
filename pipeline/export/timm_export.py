"""A frozen backbone as a folder that timm loads: config.json and model.safetensors.

No Ray, no writing to a run.

timm writes the folder. `timm.create_model("local-dir:...")` then loads it, and its features are compared with
the backbone's features before the files are returned.
"""

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors.torch import save
from timm.models import PretrainedCfg, save_for_hf
from torch import Tensor, nn

from dinoray.models.backbone import official_pos_embed
from dinoray.models.errors import DinorayError, one_line
from dinoray.models.published.checkpoint import POS_EMBED_KEY
from dinoray.pipeline.training.checkpoint import FrozenBackbone

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
"""File names that timm expects."""


class TimmExport(NamedTuple):
    """A folder for timm: the content of its two files."""

    config: bytes
    weights: bytes
    image_size: int
    """Side in pixels of its preprocessed square images; at this size features are bit-identical."""
    deviations: dict[int, float]
    """Image size -> largest difference from our backbone, as a share of the largest feature."""


def timm_arguments(frozen: FrozenBackbone) -> dict[str, Any]:
    """Return keyword arguments for `timm.create_model(name, num_classes=0, ...)` that build this backbone."""
    config, crops = frozen.config.backbone, frozen.config.crops
    size, channels = crops.global_crop_size, {"in_chans": crops.channels} if crops.channels != 3 else {}
    for extra in ({"img_size": size, "dynamic_img_size": True}, {"img_size": size}, {}):
        arguments = {**extra, **channels, **config.kwargs}
        try:
            timm.create_model(config.name, pretrained=False, num_classes=0, **arguments)
        except TypeError:  # this family lacks the argument
            continue
        return arguments
    raise DinorayError(
        f"{config.name} cannot be built by timm {timm.__version__}; install the version that the run used"
    )


def export_timm(
    frozen: FrozenBackbone, *, image_size: int | None = None, license_id: str = "unknown"
) -> TimmExport:
    """Return a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads strictly.

    `image_size` is the side of the centre crops that the run evaluates on (default: its global crop size).
    timm has no rule like `pos_embed=official`, so position embeddings are stored resized to that size.
    """
    size = evaluation_size(frozen, image_size)
    name, arguments = frozen.config.backbone.name, timm_arguments(frozen)
    weights = {k: v.contiguous() for k, v in frozen.weights.items()}
    if frozen.config.backbone.pos_embed == "official":
        arguments["img_size"] = size
        weights["pos_embed"] = _resized(frozen, size)
    with tempfile.TemporaryDirectory(prefix="dinoray-export-") as scratch:
        folder = Path(scratch)
        try:
            model = timm.create_model(name, num_classes=0, **arguments)
            model.load_state_dict(weights)
            model.pretrained_cfg = _pretrained_cfg(model, frozen, size, arguments, license_id)
            kept = {k: v for k, v in arguments.items() if not k.endswith("drop_rate")}
            save_for_hf(model, str(folder), model_args=kept, safe_serialization=True)
            metadata = {"format": "pt", POS_EMBED_KEY: frozen.config.backbone.pos_embed}
            (folder / WEIGHTS_FILE).write_bytes(save(weights, metadata=metadata))
            loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        except Exception as error:  # timm raises many types
            raise DinorayError(
                f"timm {timm.__version__} cannot load the exported {name}: {one_line(error)}; "
                "export it with --format state_dict"
            ) from error
        config, data = ((folder / file).read_bytes() for file in (CONFIG_FILE, WEIGHTS_FILE))
    if largest_deviation(frozen, loaded, [size]):
        raise DinorayError(
            f"timm's {name} computes other features from these weights, by up to "
            f"{largest_deviation(frozen, loaded, [size])[size]:.1e} of the largest feature; "
            "export it with --format onnx"
        )
    return TimmExport(config, data, size, largest_deviation(frozen, loaded, other_sizes(frozen, size)))


def evaluation_size(frozen: FrozenBackbone, image_size: int | None) -> int:
    """Return `image_size` if the backbone accepts it, else the global crop size, which it always accepts."""
    if image_size is not None:
        try:
            with torch.no_grad():
                frozen.backbone()(torch.zeros(1, frozen.config.crops.channels, image_size, image_size))
            return image_size
        except Exception:  # each family rejects sizes in its own way
            pass
    return frozen.config.crops.global_crop_size


def other_sizes(frozen: FrozenBackbone, size: int) -> list[int]:
    """Return sizes at which timm's position embeddings differ from the training ones; none if they agree."""
    config, crop_sizes = frozen.config.backbone, frozen.config.crops.crop_sizes
    if config.pos_embed == "timm":
        return []
    native = config.kwargs.get("img_size")
    tried = (*crop_sizes, native) if isinstance(native, int) else crop_sizes
    return [s for s in dict.fromkeys(tried) if s != size] or [2 * size]


def largest_deviation(frozen: FrozenBackbone, model: nn.Module, sizes: Sequence[int]) -> dict[int, float]:
    """Return size -> largest difference of `model` from the backbone, as a share of the largest feature; none if 0."""
    backbone, found = frozen.backbone(), {}
    for size in sizes:
        images = torch.randn(
            2, frozen.config.crops.channels, size, size, generator=torch.Generator().manual_seed(0)
        )
        with torch.no_grad():
            ours, theirs = backbone(images), model(images)
        if not torch.equal(ours, theirs):
            found[size] = float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1e-12))
    return found


def crop_share(size: int) -> float:
    """Return timm's `crop_pct` for DINO's resize: floor(size / crop_pct) is round(size * 256 / 224)."""
    short = round(size * 256 / 224)
    candidates = (0.875, *(round(size / (short + 0.5), digits) for digits in range(3, 16)))
    return next(share for share in candidates if math.floor(size / share) == short)


def _resized(frozen: FrozenBackbone, size: int) -> Tensor:
    """Return the backbone's position embeddings [1, prefix + n * n, D] for square images of `size` pixels."""
    backbone: Any = frozen.backbone()
    rows, columns = (size // side for side in backbone.patch_embed.patch_size)
    num_prefix = 0 if backbone.no_embed_class else backbone.num_prefix_tokens
    with torch.no_grad():
        resized = official_pos_embed(backbone.pos_embed, rows, columns, num_prefix=num_prefix)
    return resized.detach().contiguous()


def _pretrained_cfg(
    model: Any, frozen: FrozenBackbone, size: int, arguments: dict[str, Any], license_id: str
) -> dict[str, Any]:
    """Return timm's metadata for these weights, not for timm's published weights of the same name."""
    crops, published = frozen.config.crops, model.pretrained_cfg
    return PretrainedCfg(
        architecture=frozen.config.backbone.name.split(".")[0],
        tag="dino",
        input_size=(crops.channels, size, size),
        fixed_input_size=bool(published.get("fixed_input_size")) and not arguments.get("dynamic_img_size"),
        interpolation="bicubic",
        crop_pct=crop_share(size),
        crop_mode="center",
        mean=tuple(crops.pixel_mean),
        std=tuple(crops.pixel_std),
        num_classes=0,
        first_conv=published.get("first_conv"),
        classifier=published.get("classifier"),
        license=license_id,
        description="Backbone pretrained with DINO, self-distillation with no labels.",
        paper_name="Emerging Properties in Self-Supervised Vision Transformers",
        paper_ids="arXiv:2104.14294",
    ).to_dict(remove_source=True)
