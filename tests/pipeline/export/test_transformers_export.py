"""What is exported for transformers computes what the run's network does, in a process that knows nothing of us."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exports import OWN_VIT, TINY_VIT, backbone, checkpoint, frozen_of, run_elsewhere
from huggingface_hub import ModelCard
from PIL import Image
from tiny import NUM_IMAGES, TINY_RESNET, tiny_config

from dinoray.jobs.export import main
from dinoray.models.errors import ConfigError
from dinoray.models.published.checkpoint import fit_backbone
from dinoray.pipeline.data.decoding.decode import decode, eval_crop
from dinoray.pipeline.export import transformers_export
from dinoray.pipeline.export.transformers_export import export_transformers
from dinoray.pipeline.training.checkpoint import read_frozen
from dinoray.pipeline.training.config import DINOConfig
from dinoray.pipeline.training.init_weights import read_weights
from dinoray.pipeline.training.pixels import pixels
from dinoray.pipeline.training.state import build_state

NAME = "teacher_step_00000000"
CASES: dict[str, DINOConfig] = {
    "ViTModel": tiny_config(backbone={"pos_embed": "official"}),
    "Dinov2Model": backbone("vit_giant_patch14_dinov2", size=56, local_size=28, mlp_ratio=5.5, **TINY_VIT),
    "Dinov2WithRegistersModel": backbone("vit_small_patch14_reg4_dinov2", size=56, local_size=28, **TINY_VIT),
    "DINOv3ViTModel": backbone("vit_small_plus_patch16_dinov3_qkvb", size=32, **TINY_VIT),
}
"""Model -> a network that becomes it: with published position embeddings, gated layers, registers, rotary positions."""


def noisy_checkpoint(config: DINOConfig, folder: Path) -> Path:
    """A checkpoint in which no parameter of the teacher is without effect."""
    torch.manual_seed(0)
    state = build_state(config, num_images=NUM_IMAGES)
    with torch.no_grad():
        for parameter in state.dino.teacher.backbone.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return checkpoint(state, folder)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per model: its checkpoint, its export beside a photo, and what a fresh process computes with it."""
    root = tmp_path_factory.mktemp("transformers")
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    noise = np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8)
    photo = Image.fromarray(noise).resize((131, 97), Image.Resampling.BICUBIC)
    code = ["import os\nimport numpy as np"]
    for model, config in CASES.items():
        lone = noisy_checkpoint(config, root / model / "lone")
        main([str(lone), f"--out={root / model}", "--format=transformers", "--license=apache-2.0"])
        here = root / model / f"{NAME}_transformers"
        photo.save(here / "photo.jpg", exif=exif)
        size = config.crops.global_crop_size
        torch.save(torch.randn(3, 3, size, size), here / "x.pt")
        (block,) = re.findall(r"```python\n(.*?)```", (here / "README.md").read_text(), re.DOTALL)
        (part,) = re.findall(r"features = outputs\.(\S.*?)  #", block)
        code += [
            f"os.chdir({str(here)!r})",
            block,
            f"with torch.no_grad():\n    noise = model(pixel_values=torch.load('x.pt')).{part}",
            "pixels = processor(image, return_tensors='pt')['pixel_values']",
            "np.savez('kept', kind=type(model).__name__, photo=features, noise=noise, pixels=pixels)",
        ]
    run_elsewhere("\n".join(code), root)
    return root


@pytest.mark.parametrize("model", CASES)
def test_a_fresh_process_computes_the_same_features(model: str, exported: Path) -> None:
    here = exported / model / f"{NAME}_transformers"
    frozen, kept = read_frozen(exported / model / "lone"), np.load(here / "kept.npz")
    assert str(kept["kind"]) == model
    with torch.no_grad():
        expected = frozen.backbone()(torch.load(here / "x.pt")).numpy()
    np.testing.assert_allclose(kept["noise"], expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    card = ModelCard.load(here / "README.md").data
    assert (card.library_name, card.license) == ("transformers", "apache-2.0")
    (facts,) = json.loads((exported / model / f"{NAME}.json").read_text())["files"].values()
    assert facts["max_deviation"] < 1e-5
    # Position embeddings are resized by other rules, which is said; the two last models have the rules of timm.
    assert bool(facts["deviations"]) is (model in ("ViTModel", "Dinov2Model"))


@pytest.mark.parametrize("model", CASES)
def test_the_image_processor_is_the_evaluations_preprocessing(model: str, exported: Path) -> None:
    config, here = CASES[model], exported / model / f"{NAME}_transformers"
    crop = eval_crop(
        decode((here / "photo.jpg").read_bytes(), max_pixels=10**6), size=config.crops.global_crop_size
    )
    ours = pixels(crop[None, None], config.crops, torch.device("cpu")).numpy()
    levels = np.abs(np.load(here / "kept.npz")["pixels"] - ours).max() * 255 * max(config.crops.pixel_std)
    # Of 255: one resizes the whole picture, the other the square alone. All margins are even here: of an odd one the
    # library takes half and rounds down, where evaluations round to even.
    assert levels <= 3.5


@pytest.mark.parametrize("model", CASES)
def test_what_is_exported_starts_a_run_of_ours(model: str, exported: Path) -> None:
    frozen = read_frozen(exported / model / "lone")
    weights = read_weights(str(exported / model / f"{NAME}_transformers"))
    own = frozen.backbone()
    x = torch.load(exported / model / f"{NAME}_transformers" / "x.pt")
    with torch.no_grad():
        expected = own(x)
        state = {k.removeprefix("backbone."): v for k, v in weights.teacher.items()}
        own.load_state_dict(fit_backbone(state, own, args=weights.args))
        torch.testing.assert_close(own(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (backbone("resnet10t", **TINY_RESNET["kwargs"]), "ResNet is no plain, DINOv2 or DINOv3 ViT"),
        (
            backbone("vit_tiny_patch16_224", global_pool="avg", **OWN_VIT),
            "ViTModel is another network: the backbone has no norm.weight",
        ),
        (
            backbone("vit_tiny_patch16_224", qk_norm=True, **OWN_VIT),
            "ViTModel is another network: it has no blocks.0.attn.q_norm.weight",
        ),
        (
            backbone("vit_tiny_patch16_224", init_values=1.0, mlp_ratio=2.5, **OWN_VIT),
            "its hidden layers have 80 channels, which no whole mlp_ratio of Dinov2 gives",
        ),
    ],
    ids=["resnet", "averaged tokens", "normalised queries", "broken mlp_ratio"],
)
def test_another_network_is_refused_with_the_reason(config: DINOConfig, why: str) -> None:
    says = f"cannot be a model of transformers: {re.escape(why)}; take --format timm or --format onnx$"
    with pytest.raises(ConfigError, match=says):
        export_transformers(frozen_of(config))


def test_a_model_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other: dict[str, Any] = {"GELU": "relu"}
    monkeypatch.setattr(transformers_export, "_ACTIVATIONS", other)
    with pytest.raises(ConfigError, match=r"ViTModel computes other features, by up to \d\.\de-\d\d of the"):
        export_transformers(frozen_of(tiny_config()))


def test_the_package_is_named_with_the_command_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    says = r"--format transformers needs transformers, .* pip install 'dinoray\[export\]'$"
    with pytest.raises(ConfigError, match=says):
        export_transformers(frozen_of(tiny_config()))
