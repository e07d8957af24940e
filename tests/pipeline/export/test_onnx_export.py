"""What is exported for onnxruntime computes what torch does, at every size that torch takes."""

import sys
from functools import cache
from typing import Any

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from exports import OWN_VIT, TINY_SWIN, TINY_VIT, backbone, frozen_of
from tiny import TINY_RESNET, tiny_config
from torch import Tensor

from dinoray.models.errors import ConfigError, DinorayError
from dinoray.pipeline.export import onnx_export
from dinoray.pipeline.export.onnx_export import Onnx, export_onnx, resize_matrix
from dinoray.pipeline.export.timm_export import export_timm
from dinoray.pipeline.training.checkpoint import FrozenBackbone

CONFIGS = {
    "vit": backbone("vit_tiny_patch16_224", size=96, local_size=48, **TINY_VIT),
    "resnet": backbone("resnet10t", **TINY_RESNET["kwargs"]),
    "dinov2 with registers": backbone("vit_small_patch14_reg4_dinov2", size=56, local_size=28, **TINY_VIT),
    "dinov3": backbone("vit_small_patch16_dinov3", size=64, **TINY_VIT),
    "swin": backbone("swin_tiny_patch4_window7_224", size=64, local_size=64, **TINY_SWIN),
}


@pytest.mark.parametrize("grid", [4, 7, 14])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 6, 7, 9, 14, 16, 30])
def test_resizing_by_a_matrix_is_torch_s_interpolation(grid: int, length: int) -> None:
    x = torch.randn(1, 5, grid, grid)
    for pos_embed, expected in (
        ("timm", F.interpolate(x, size=(length, length + 1), mode="bicubic", antialias=True)),
        (
            "official",
            F.interpolate(x, scale_factor=((length + 0.1) / grid, (length + 1.1) / grid), mode="bicubic"),
        ),
    ):
        rows, columns = (resize_matrix(n, grid, pos_embed=pos_embed) for n in (length, length + 1))
        torch.testing.assert_close(rows @ x @ columns.T, expected, rtol=0, atol=2e-5)


def onnx_features(data: bytes, images: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])


@cache
def exported(kind: str) -> tuple[FrozenBackbone, Onnx]:
    """A network of CONFIGS and its graph, which takes seconds to make."""
    frozen = frozen_of(CONFIGS[kind])
    return frozen, export_onnx(frozen)


def onnx_shape(data: bytes) -> list[Any]:
    return onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).get_inputs()[0].shape


@pytest.mark.parametrize("pos_embed", ["timm", "official"])
def test_a_vit_s_onnx_file_takes_any_batch_and_any_size(
    pos_embed: str, capfd: pytest.CaptureFixture[str]
) -> None:
    frozen = frozen_of(backbone("vit_tiny_patch16_224", pos_embed=pos_embed, **OWN_VIT))
    onnx = export_onnx(frozen)
    assert capfd.readouterr() == ("", "")
    assert onnx_shape(onnx.data) == ["batch", 3, "height", "width"]
    assert (onnx.multiple_of, onnx.deviation < 1e-5) == (4, True)
    for batch, height, width in (
        (1, 32, 32),
        (4, 32, 32),
        (2, 16, 16),
        (3, 12, 40),
        (1, 4, 4),
        (1, 64, 32),
        (1, 32, 8),
    ):
        x = torch.randn(batch, 3, height, width)
        with torch.no_grad():
            expected = frozen.backbone()(x)
        torch.testing.assert_close(onnx_features(onnx.data, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "shape", "multiple_of"),
    [
        ("resnet", ["batch", 3, "height", "width"], 1),
        ("dinov2 with registers", ["batch", 3, "height", "width"], 14),
        ("dinov3", ["batch", 3, "height", "width"], 16),
        ("swin", ["batch", 3, 64, 64], None),
    ],
)
def test_other_backbones_onnx_files_take_at_least_any_batch(
    kind: str, shape: list[Any], multiple_of: int | None
) -> None:
    frozen, onnx = exported(kind)
    assert (onnx_shape(onnx.data), onnx.multiple_of) == (shape, multiple_of)
    size = frozen.config.crops.global_crop_size
    sizes = [(size, size)] if multiple_of is None else [(size, size), (2 * size, size), (3 * size, size)]
    for height, width in sizes:
        x = torch.randn(3, 3, height, width)
        with torch.no_grad():
            expected = frozen.backbone()(x)
        assert float((onnx_features(onnx.data, x) - expected).abs().max() / expected.abs().max()) < 1e-4


@pytest.mark.parametrize("kind", ["vit", "dinov3"])
def test_an_onnx_file_refuses_sizes_that_torch_refuses(kind: str) -> None:
    frozen, onnx = exported(kind)
    data = onnx.data
    for height, width in ((97, 97), (97, 96), (96, 111), (15, 96)):
        x = torch.randn(2, 3, height, width)
        with pytest.raises(AssertionError), torch.no_grad():
            frozen.backbone()(x)
        with pytest.raises(Exception, match="image_height_and_width_must_be_multiples_of_16"):
            onnx_features(data, x)
    for height, width in ((96, 96), (112, 96), (16, 112)):
        x = torch.randn(2, 3, height, width)
        with torch.no_grad():
            torch.testing.assert_close(onnx_features(data, x), frozen.backbone()(x), rtol=1e-4, atol=1e-4)


def test_a_convolutional_onnx_file_takes_odd_sizes_as_torch_does() -> None:
    frozen, onnx = exported("resnet")
    data = onnx.data
    for height, width in ((97, 97), (33, 64)):
        x = torch.randn(2, 3, height, width)
        with torch.no_grad():
            torch.testing.assert_close(onnx_features(data, x), frozen.backbone()(x), rtol=1e-4, atol=1e-4)


def test_an_onnx_file_that_computes_something_else_is_not_given_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any, **kwargs: Any) -> Tensor:
        return resize_matrix(*args, **kwargs) * 1.01

    monkeypatch.setattr(onnx_export, "resize_matrix", wrong)
    says = r"deviates from PyTorch by \d\.\de-\d\d of the largest feature, .* export it with --format timm$"
    with pytest.raises(DinorayError, match=says):
        export_onnx(frozen_of(tiny_config()))
    assert export_timm(frozen_of(tiny_config())).weights


@pytest.mark.parametrize(
    ("part", "says"),
    [("torch.onnx.export", "cannot be exported to ONNX"), ("onnxruntime.InferenceSession", "does not run")],
)
def test_what_onnx_cannot_hold_is_exported_for_timm(
    part: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such operator")

    frozen, onnx = exported("vit")
    if part == "onnxruntime.InferenceSession":
        monkeypatch.setattr(onnx_export, "converted", lambda *_, **__: onnx.data)
    monkeypatch.setattr(part, refuse)
    with pytest.raises(DinorayError, match=f"{says}: no such operator; export it with --format timm$"):
        export_onnx(frozen)
    assert export_timm(frozen).weights


def test_packages_that_onnx_needs_are_named_with_the_command_that_brings_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"needs onnxscript, .* pip install 'dinoray\[export\]'"):
        export_onnx(frozen_of(tiny_config()))
