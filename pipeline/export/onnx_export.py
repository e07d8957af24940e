"""Export of a frozen backbone to ONNX, checked against PyTorch before the file is returned. No Ray, no files.

The batch size stays variable. Height and width stay variable for ViTs, networks with rotary embeddings and
convolutional networks. A ViT's resized position embeddings would put a Resize operator with a fixed size into
the graph. Here they are products with two small matrices that are computed from the image's size
(`resize_matrix`).
"""

import contextlib
import copy
import io
import logging
import math
import types
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dinoray.models.errors import ConfigError, DinorayError, one_line
from dinoray.models.input_channels import in_chans
from dinoray.pipeline.training.checkpoint import FrozenBackbone

TOLERANCE = 1e-4
"""Largest accepted deviation from PyTorch, as a share of the largest feature."""
_BATCH_SIZES = (1, 2, 5)


class Onnx(NamedTuple):
    """ONNX: input `images` float [batch, 3, height, width], normalised; output `features` [batch, D]."""

    data: bytes
    deviation: float
    """Largest difference from PyTorch over all tested sizes, as a share of the largest feature."""
    sizes: list[tuple[int, int]]
    """Tested heights and widths, each at batch sizes of 1, 2 and 5; one entry if the size is fixed."""
    multiple_of: int | None
    """Height and width must be multiples of this; the graph rejects other sizes. None if they are fixed."""


def export_onnx(frozen: FrozenBackbone) -> Onnx:
    """Export a backbone, run it with onnxruntime and compare with PyTorch.

    Raises ConfigError without the packages, DinorayError if the export or the comparison fails.
    """
    require("onnx", "onnxscript", "onnxruntime", form="onnx")
    backbone = frozen.backbone()
    crops = frozen.config.crops
    patch = patch_size(backbone)
    sizes = _sizes(backbone, crops.crop_sizes, patch)
    graph = None
    if len(sizes) > 1:
        try:
            graph = _graph(backbone, sizes[-1], patch=patch, fixed=False)
        except DinorayError:
            # Some networks take other sizes in PyTorch only. ViTs are known to export with variable sizes.
            if isinstance(backbone, VisionTransformer):
                raise
            sizes = sizes[:1]
    if graph is None:
        graph = _graph(backbone, sizes[0], patch=patch, fixed=True)
    elif patch > 1:
        graph = _refusing_other_sizes(graph, patch)
    deviation = _deviation(graph, backbone, sizes)
    if not deviation <= TOLERANCE:
        raise DinorayError(
            f"the ONNX file of {frozen.config.backbone.name} deviates from PyTorch by {deviation:.1e} of the largest "
            f"feature, more than {TOLERANCE:g}; nothing is written, export it with --format timm"
        )
    return Onnx(graph, deviation, sizes, patch if len(sizes) > 1 else None)


def resize_matrix(length: int, grid: int, *, pos_embed: str) -> Tensor:
    """Return the matrix [length, grid] that resizes `grid` values to `length` like bicubic F.interpolate.

    The matrix is float32. `timm` is antialiased, by size. `official` is plain, by the scale factor (length +
    0.1) / grid, and resizes nothing if `length` is `grid`. `length` may be symbolic: everything is computed
    by operators.
    """
    ends = torch.ones(length).sum()  # `length` as a tensor
    rows = torch.arange(length, dtype=torch.float32)[:, None]
    if pos_embed == "timm":
        centers = (rows + 0.5) * (grid / ends)
        widening = (grid / ends).clamp(min=1.0)  # of the kernel, if there are fewer rows than values
        weights = cubic((torch.arange(grid) + 0.5 - centers) / widening, -0.5)
        return weights / weights.sum(1, keepdim=True)
    centers = (rows + 0.5) * (grid / (ends + 0.1)) - 0.5
    beyond = torch.arange(-2, grid + 2)  # reached by four taps; beyond the edge, the edge counts
    edge = (beyond.clamp(0, grid - 1)[:, None] == torch.arange(grid)).float()
    return cubic(beyond - centers, -0.75) @ edge


def cubic(distance: Tensor, a: float) -> Tensor:
    """Return the cubic convolution kernel (Keys 1981)."""
    x = distance.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def resizing_by_products(vit: VisionTransformer, pos_embed: str) -> VisionTransformer:
    """Return a copy that resizes its position embeddings by `resize_matrix`; otherwise the same function."""

    def with_pos_embed(self: Any, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        rows, columns = self.patch_embed.grid_size
        num_prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        prefix, grid = self.pos_embed[:, :num_prefix], self.pos_embed[0, num_prefix:]
        grid = grid.reshape(rows, columns, dim)
        down = resize_matrix(height, rows, pos_embed=pos_embed)
        across = resize_matrix(width, columns, pos_embed=pos_embed)
        resized = torch.einsum("wj,hjd->hwd", across, torch.einsum("hi,ijd->hjd", down, grid))
        if pos_embed == "official":
            resized = _unless_native(resized, grid)
        grid = resized.reshape(1, height * width, dim)
        tokens = [t.expand(batch, -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        x = x.reshape(batch, height * width, dim)
        if self.no_embed_class:
            return torch.cat([*tokens, x + grid], dim=1)
        return torch.cat([*tokens, x], dim=1) + torch.cat([prefix, grid], dim=1)

    vit = copy.deepcopy(vit)
    vit._pos_embed = types.MethodType(with_pos_embed, vit)
    return vit


def _unless_native(resized: Tensor, grid: Tensor) -> Tensor:
    """Return `grid` if `resized` has its height and width: the published code leaves it unchanged then."""
    height, width = (torch.ones(n).sum() for n in resized.shape[:2])
    is_native = (height == grid.shape[0]) & (width == grid.shape[1])
    unit_rows = (torch.arange(resized.shape[0])[:, None] == torch.arange(grid.shape[0])).float()
    unit_columns = (torch.arange(resized.shape[1])[:, None] == torch.arange(grid.shape[1])).float()
    same = torch.einsum("wj,hjd->hwd", unit_columns, torch.einsum("hi,ijd->hjd", unit_rows, grid))
    return torch.where(is_native, same, resized)


def patch_size(backbone: nn.Module) -> int:
    """Return the number that height and width must be multiples of; 1 for networks without patches."""
    patch = getattr(getattr(backbone, "patch_embed", None), "patch_size", 1)
    return math.lcm(*patch) if isinstance(patch, (tuple, list)) else int(patch)


def _sizes(backbone: nn.Module, crop_sizes: tuple[int, ...], patch: int) -> list[tuple[int, int]]:
    """Return the sizes to test: the global crop size if it is fixed, else several, the last not square."""
    native = crop_sizes[0]
    is_convolutional = not hasattr(backbone, "patch_embed")
    # Windows and similar structures are padded by rules that an export may freeze to constants.
    is_open = isinstance(backbone, VisionTransformer) or getattr(backbone, "rope", None) or is_convolutional
    others = [(size, size) for size in crop_sizes[1:]]
    if is_convolutional:
        others += [(native + 32, native), (native + 9, native + 21)]
    else:
        others += [(native + patch, native), (native + 2 * patch, native + 3 * patch)]
    try:
        with torch.no_grad():
            for height, width in others if is_open else []:
                backbone(torch.zeros(1, in_chans(backbone), height, width))
    except Exception:  # a fixed size; each model raises its own error for other sizes
        is_open = False
    return list(dict.fromkeys([(native, native), *others])) if is_open else [(native, native)]


def _graph(backbone: nn.Module, size: tuple[int, int], *, patch: int, fixed: bool) -> bytes:
    dims: dict[int, Any] = {0: torch.export.Dim("batch")}
    model = backbone
    if not fixed and isinstance(backbone, VisionTransformer) and backbone.pos_embed is not None:
        pos_embed = "timm" if type(backbone) is VisionTransformer else "official"
        model = resizing_by_products(backbone, pos_embed)
        dims |= {2: patch * torch.export.Dim("rows"), 3: patch * torch.export.Dim("columns")}
    elif not fixed:
        dims |= {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    names = ["batch"] if fixed else ["batch", None, "height", "width"]
    return converted(
        model, torch.zeros(3, in_chans(backbone), *size), dims, names, of=type(backbone).__name__
    )


def converted(
    model: nn.Module, example: Tensor, dims: dict[int, Any], names: Sequence[str | None], *, of: str
) -> bytes:
    """Return the graph `images` -> `features` of a model.

    `dims`: which dimensions of the input vary, for torch.export; `names`: what they are called in the file.
    Raises DinorayError, which names the network `of`.
    """
    try:
        with quiet():
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                dynamic_shapes=(dims,),
                input_names=["images"],
                output_names=["features"],
                verbose=False,
            )
        proto = program.model_proto  # type: ignore[union-attr]
        del proto.graph.value_info[:]  # holds sizes under the exporter's names
        for dim, name in zip(proto.graph.input[0].type.tensor_type.shape.dim, names, strict=False):
            if name:
                dim.dim_param = name
        return proto.SerializeToString()
    except Exception as error:  # the exporter raises many types
        reason = one_line(error.__cause__ or error)
        raise DinorayError(
            f"{of} cannot be exported to ONNX: {reason}; export it with --format timm"
        ) from error


def _refusing_other_sizes(graph: bytes, patch: int) -> bytes:
    """Make the graph fail for heights and widths that are no multiples of `patch`, as PyTorch does.

    A strided convolution drops the pixels beyond the last whole patch without an error. Here the remainders
    of height and width index a list whose only element is 0, so any other remainder is out of bounds. The
    names of the nodes appear in the runtime's error.
    """
    import onnx
    from onnx import helper, numpy_helper

    rule = f"image_height_and_width_must_be_multiples_of_{patch}"
    proto = onnx.load_from_string(graph)
    for node in proto.graph.node:
        for place, name in enumerate(node.input):
            if name == "images":
                node.input[place] = "checked_images"
    values = {"patch": [patch], "zero": [0], "no_change": [0, 0]}
    proto.graph.initializer.extend(
        numpy_helper.from_array(np.array(value, np.int64), f"{rule}/{name}") for name, value in values.items()
    )
    steps = [
        helper.make_node("Shape", ["images"], [f"{rule}/sides"], start=2, end=4),
        helper.make_node("Mod", [f"{rule}/sides", f"{rule}/patch"], [f"{rule}/remainders"]),
        helper.make_node("Gather", [f"{rule}/zero", f"{rule}/remainders"], [f"{rule}/zeros"], name=rule),
        helper.make_node("Concat", [f"{rule}/no_change", f"{rule}/zeros"], [f"{rule}/changes"], axis=0),
        helper.make_node("Shape", ["images"], [f"{rule}/before"]),
        helper.make_node("Add", [f"{rule}/before", f"{rule}/changes"], [f"{rule}/shape"]),
        helper.make_node("Reshape", ["images", f"{rule}/shape"], ["checked_images"]),
    ]
    for step in reversed(steps):
        proto.graph.node.insert(0, step)
    return proto.SerializeToString()


def session_of(graph: bytes) -> Any:
    """Return a session of onnxruntime on the CPU that logs errors alone."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _deviation(graph: bytes, backbone: nn.Module, sizes: list[tuple[int, int]]) -> float:
    try:
        session = session_of(graph)
        generator = torch.Generator().manual_seed(0)
        worst = 0.0
        for height, width in sizes:
            for batch_size in _BATCH_SIZES:
                images = torch.randn(batch_size, in_chans(backbone), height, width, generator=generator)
                with torch.no_grad():
                    ours = backbone(images)
                theirs = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
                scale = float(ours.abs().max()) or 1.0
                worst = max(worst, float((ours - theirs).abs().max()) / scale)
    except Exception as error:  # onnxruntime's own types
        raise does_not_run(type(backbone).__name__, error) from error
    return worst


def does_not_run(of: str, error: Exception) -> DinorayError:
    """Return the error for a graph that onnxruntime refuses."""
    return DinorayError(
        f"the ONNX file of {of} does not run: {one_line(error)}; export it with --format timm"
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter, which logs its progress in pages; an error still names the cause."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def require(*packages: str, form: str) -> None:
    """Raise ConfigError unless the packages that a format needs are installed."""
    for package in packages:
        try:
            __import__(package)
        except ImportError as error:
            raise ConfigError(
                f"--format {form} needs {package}, which is not installed: pip install 'dinoray[export]'"
            ) from error
