"""Export of a frozen backbone to ONNX with its preprocessing: decoded images of any size in, features out.

No Ray, no files. The graph resizes and crops as the evaluations do (data/decoding/decode.py: eval_crop): shorter
side, bicubic and antialiased as in Pillow, rounded to 8 bits after each direction, then the central square. Only
the square is computed, by products with two matrices that follow from height and width, so any runtime can do it.
Rows are resized first. Pillow chooses the order, so a pixel of a photo may differ by 1 of 255.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dinoray.models.errors import ConfigError, DinorayError
from dinoray.models.input_channels import in_chans
from dinoray.pipeline.data.decoding.decode import eval_crop
from dinoray.pipeline.evaluation.features import embed
from dinoray.pipeline.export.onnx_export import (
    converted,
    cubic,
    does_not_run,
    require,
    resizing_by_products,
    session_of,
)
from dinoray.pipeline.export.timm_export import evaluation_size
from dinoray.pipeline.training.checkpoint import FrozenBackbone

TOLERANCE = 1e-2
"""Largest accepted deviation, as a share of the largest feature: pixels may be rounded the other way."""
_AXES = ("batch", "height", "width")


class OnnxOfImages(NamedTuple):
    """ONNX: input `images` uint8 [batch, height, width, 3]; output `features` float [batch, D]."""

    data: bytes
    deviation: float
    """Largest difference from an evaluation's features, as a share of the largest feature."""
    sizes: list[tuple[int, int]]
    """Tested heights and widths."""


def export_onnx_preprocessing(frozen: FrozenBackbone, *, image_size: int | None = None) -> OnnxOfImages:
    """Export a backbone behind the evaluations' preprocessing, and compare it with an evaluation in onnxruntime.

    `image_size` is the side of the centre crops that the run evaluates on (default: its global crop size).
    Raises ConfigError without the packages, DinorayError if the export or the comparison fails.
    """
    require("onnx", "onnxscript", "onnxruntime", form="onnx_preprocessing")
    backbone, size = frozen.backbone(), evaluation_size(frozen, image_size)
    of = type(backbone).__name__
    if (channels := in_chans(backbone)) != 3:
        raise ConfigError(
            f"--format onnx_preprocessing takes RGB, but the images of {frozen.config.backbone.name} have {channels} "
            "channels; take --format onnx"
        )
    dims = {axis: torch.export.Dim(name) for axis, name in enumerate(_AXES)}
    example = torch.zeros(3, size + 5, size + 9, 3, dtype=torch.uint8)
    graph = converted(_FromImages(frozen, size), example, dims, _AXES, of=of)
    sizes = [(size, size), (size + 11, 2 * size + 3), (5 * size + 2, size // 2 + 1)]
    try:
        session = session_of(graph)
        deviation = max(_deviation(session, frozen, backbone, shape, size) for shape in sizes)
    except Exception as error:  # onnxruntime's own types
        raise does_not_run(of, error) from error
    if not deviation <= TOLERANCE:
        raise DinorayError(
            f"the ONNX file of {frozen.config.backbone.name} deviates from evaluations by {deviation:.1e} of the "
            f"largest feature, more than {TOLERANCE:g}; nothing is written, export it with --format onnx"
        )
    return OnnxOfImages(graph, deviation, sizes)


def _deviation(
    session: Any, frozen: FrozenBackbone, backbone: nn.Module, shape: tuple[int, int], size: int
) -> float:
    noise = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), np.uint8)
    side = (shape[1], shape[0])  # of noise no order of directions would give the same pixels
    photos = [Image.fromarray(one).resize(side, Image.Resampling.BICUBIC) for one in noise]
    images = np.stack([np.asarray(photo) for photo in photos])
    crops = np.stack([eval_crop(image, size=size) for image in images])
    ours = embed(backbone, crops, frozen.config.crops, precision="fp32")
    (theirs,) = session.run(None, {"images": images})
    return float(np.abs(ours - theirs).max() / max(np.abs(ours).max(), 1e-12))


class _FromImages(nn.Module):
    """uint8 [B, H, W, 3] -> features [B, D]."""

    def __init__(self, frozen: FrozenBackbone, size: int) -> None:
        super().__init__()
        backbone = frozen.backbone()
        if isinstance(backbone, VisionTransformer) and backbone.pos_embed is not None:
            backbone = resizing_by_products(backbone, frozen.config.backbone.pos_embed)
        self.backbone, self._size = backbone, size
        crops = frozen.config.crops
        self._mean, self._std = (
            nn.Buffer(torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1))
            for values in (crops.pixel_mean, crops.pixel_std)
        )

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[1:3]
        x = images.permute(0, 3, 1, 2).float()
        x = _eight_bits(x @ crop_matrix(width, height, self._size).T)
        x = _eight_bits(crop_matrix(height, width, self._size) @ x)
        features: Tensor = self.backbone((x / 255 - self._mean) / self._std)
        return features


def _eight_bits(x: Tensor) -> Tensor:
    """Round to whole values from 0 to 255, halves up, as Pillow does after each direction."""
    return (x + 0.5).floor().clamp(0, 255)


def crop_matrix(length: int, other: int, size: int) -> Tensor:
    """Return the matrix [size, length] from a side of an image to the same side of its central square.

    `other` is the other side. The resized shorter side is round(size * 256 / 224). The weights are computed in
    float64 and returned as float32. Both lengths may be symbolic: everything is computed by operators.
    """
    own, across = (torch.ones(n, dtype=torch.int64).sum() for n in (length, other))
    resized = torch.div(round(size * 256 / 224) * own, torch.minimum(own, across), rounding_mode="floor")
    offset = ((resized - size).double() / 2).round()
    scale = own.double() / resized.double()
    # Pillow keeps the ends of the square in float32.
    start, end = ((offset + at) * scale for at in (0, size))
    start, end = start.float().double(), end.float().double()
    step = (end - start) / size
    centers = start + (torch.arange(size, dtype=torch.float64)[:, None] + 0.5) * step
    distance = torch.arange(length, dtype=torch.float64) + 0.5 - centers
    weights = cubic(distance / step.clamp(min=1.0), -0.5)
    return (weights / weights.sum(1, keepdim=True)).float()
