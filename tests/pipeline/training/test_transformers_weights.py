"""Models that the transformers library builds and saves: timm's network with their weights computes the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from dinoray.models.errors import ConfigError, DataError
from dinoray.models.published.checkpoint import fit_backbone
from dinoray.pipeline.training.init_weights import read_weights

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 4,
}
VIT = {**SIZES, "layer_norm_eps": 1e-6}  # timm's; the class of ViTs has 1e-12
DINOV3 = {**SIZES, "intermediate_size": 128, "num_register_tokens": 4}
OURS: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4, "img_size": 32}
CLASS_TOKEN = {**OURS, "global_pool": "token"}
STAGES: list[int] = [8, 16, 24, 32]


def _model(kind: str, **config: Any) -> nn.Module:
    """The model `<kind>Model` with random weights that leave no part without effect."""
    settings = getattr(transformers, f"{kind}Config")(**config)
    model = getattr(transformers, f"{kind}Model")(settings)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return model.eval()


CASES: dict[str, tuple[Callable[[], nn.Module], str, dict[str, Any], str]] = {
    "ViT": (lambda: _model("ViT", intermediate_size=128, **VIT), "vit_tiny_patch16_224", OURS, "ViT"),
    "DINOv2": (lambda: _model("Dinov2", **VIT), "vit_small_patch14_dinov2", OURS, "DINOv2"),
    "DINOv2 with SwiGLU": (
        lambda: _model("Dinov2", use_swiglu_ffn=True, **VIT),
        "vit_giant_patch14_dinov2",
        {**OURS, "mlp_ratio": 5.5},
        "DINOv2",
    ),
    "DINOv2 with registers": (
        lambda: _model("Dinov2WithRegisters", num_register_tokens=4, **VIT),
        "vit_small_patch14_reg4_dinov2",
        OURS,
        "DINOv2",
    ),
    "DINOv3": (lambda: _model("DINOv3ViT", **DINOV3), "vit_small_patch16_dinov3_qkvb", CLASS_TOKEN, "DINOv3"),
    "DINOv3 with SwiGLU": (
        lambda: _model("DINOv3ViT", use_gated_mlp=True, hidden_act="silu", **DINOV3),
        "vit_small_plus_patch16_dinov3_qkvb",
        CLASS_TOKEN,
        "DINOv3",
    ),
    "DINOv3 ConvNeXt": (
        lambda: _model("DINOv3ConvNext", hidden_sizes=STAGES, depths=[1, 1, 2, 1]),
        "convnext_tiny",
        {"dims": STAGES, "depths": [1, 1, 2, 1]},
        "DINOv3",
    ),
}


def _features(model: nn.Module, x: Tensor) -> Tensor:
    output = model(pixel_values=x)
    return output.pooler_output if "ConvNext" in type(model).__name__ else output.last_hidden_state[:, 0]


def _fitted(path: Path, name: str, kwargs: dict[str, Any]) -> tuple[nn.Module, list[str]]:
    """timm's model with the weights at the path, and what is printed of them."""
    weights = read_weights(str(path))
    backbone = timm.create_model(name, num_classes=0, **kwargs).eval()
    state = {k.removeprefix("backbone."): v for k, v in weights.teacher.items()}
    notes = list(weights.notes)
    backbone.load_state_dict(fit_backbone(state, backbone, args=weights.args, notes=notes))
    return backbone, notes


@pytest.mark.parametrize("case", CASES)
def test_saved_models_compute_the_same(case: str, tmp_path: Path) -> None:
    make, name, kwargs, program = CASES[case]
    model = make()
    model.save_pretrained(tmp_path)
    backbone, notes = _fitted(tmp_path, name, kwargs)
    assert f"names of transformers, {program} are read as timm's" in notes
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(backbone(x), _features(model, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["ViT", "DINOv2 with SwiGLU", "DINOv3 with SwiGLU"])
def test_state_dicts_saved_by_torch_compute_the_same(case: str, tmp_path: Path) -> None:
    """In memory, newer versions of the library name some layers otherwise than in the files that they save."""
    make, name, kwargs, _ = CASES[case]
    model = make()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    backbone, _ = _fitted(tmp_path / "pytorch_model.bin", name, kwargs)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(backbone(x), _features(model, x), rtol=1e-5, atol=1e-5)


def test_attention_heads_are_those_of_the_config_beside_the_weights(tmp_path: Path) -> None:
    CASES["ViT"][0]().save_pretrained(tmp_path)
    wrong = {**OURS, "num_heads": 4}
    with pytest.raises(
        ConfigError, match=r"has 4 attention heads, .* has 2; set backbone.kwargs.num_heads=2$"
    ):
        _fitted(tmp_path / "model.safetensors", "vit_tiny_patch16_224", wrong)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(
        DataError, match=r"config.json is not the config of a transformers model: .* or remove it"
    ):
        _fitted(tmp_path, "vit_tiny_patch16_224", wrong)
    (tmp_path / "config.json").unlink()
    _fitted(tmp_path, "vit_tiny_patch16_224", wrong)


def test_model_in_several_files_is_read_once_it_is_saved_as_one(tmp_path: Path) -> None:
    model = CASES["ViT"][0]()
    model.save_pretrained(tmp_path / "many", max_shard_size="50KB")
    with pytest.raises(ConfigError, match=r"has its weights in \d+ files; save the model anew as one"):
        read_weights(str(tmp_path / "many"))
    transformers.ViTModel.from_pretrained(tmp_path / "many").save_pretrained(
        tmp_path / "one", max_shard_size="1TB"
    )
    _fitted(tmp_path / "one", "vit_tiny_patch16_224", OURS)
