"""timm alone loads an exported folder, with the run's features and the run's preprocessing."""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from exports import OWN_VIT, TINY_SWIN, TINY_VIT, backbone, frozen_of, run_elsewhere, write_files
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from timm.data import create_transform, resolve_model_data_config
from tiny import TINY_RESNET, tiny_config

from dinoray.models.errors import DinorayError
from dinoray.models.published.checkpoint import POS_EMBED_KEY
from dinoray.pipeline.data.decoding.decode import eval_crop
from dinoray.pipeline.data.demo_images import draw_demo_image
from dinoray.pipeline.evaluation.config import EvalConfig
from dinoray.pipeline.evaluation.features import Features, embed
from dinoray.pipeline.evaluation.knn import knn_accuracy
from dinoray.pipeline.export.onnx_export import export_onnx
from dinoray.pipeline.export.timm_export import TimmExport, crop_share, export_timm, timm_arguments
from dinoray.pipeline.export.weights import export_state_dict
from dinoray.pipeline.training.checkpoint import FrozenBackbone
from dinoray.pipeline.training.config import DINOConfig
from dinoray.pipeline.training.pixels import pixels


def replace_kwargs(config: DINOConfig, **changes: Any) -> DINOConfig:
    tree = config.model_dump()
    tree["backbone"]["kwargs"] |= changes
    return DINOConfig.model_validate(tree)


ALL = [
    tiny_config(),
    backbone("resnet10t", **TINY_RESNET["kwargs"]),
    backbone("vit_small_patch14_dinov2", size=56, local_size=28, **TINY_VIT),
    backbone("vit_small_patch14_reg4_dinov2.lvd142m", size=56, local_size=28, **TINY_VIT),
    backbone("vit_small_patch16_dinov3", size=64, local_size=32, global_pool="token", **TINY_VIT),
    backbone("vit_tiny_patch16_224", size=32, local_size=16, global_pool="avg", **OWN_VIT),
    backbone("deit_tiny_distilled_patch16_224", size=32, local_size=16, **OWN_VIT),
    backbone("convnext_atto", size=64, local_size=32, depths=[1, 1, 1, 1], dims=[8, 8, 8, 8]),
    backbone("swin_tiny_patch4_window7_224", size=64, local_size=64, **TINY_SWIN),
]
NAMES = [f"{config.backbone.name} {number}" for number, config in enumerate(ALL)]


def folder_of(export: TimmExport, folder: Path) -> Path:
    return write_files(folder, {"config.json": export.config, "model.safetensors": export.weights})


def load_folder(folder: Path, **arguments: Any) -> Any:
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **arguments).eval()


@pytest.mark.parametrize("config", ALL, ids=NAMES)
def test_timm_loads_the_folder_with_the_same_features(config: DINOConfig, tmp_path: Path) -> None:
    frozen = frozen_of(config)
    folder = folder_of(export_timm(frozen), tmp_path / "a folder")
    model = load_folder(folder)
    for size in config.crops.crop_sizes:
        x = torch.randn(2, 3, size, size)
        with torch.no_grad():
            assert torch.equal(model(x), frozen.backbone()(x))


@pytest.mark.parametrize("config", ALL, ids=NAMES)
def test_a_new_classifier_sits_on_the_same_backbone(config: DINOConfig, tmp_path: Path) -> None:
    frozen = frozen_of(config)
    model = load_folder(folder_of(export_timm(frozen), tmp_path), num_classes=10)
    x = torch.randn(2, 3, config.crops.global_crop_size, config.crops.global_crop_size)
    with torch.no_grad():
        assert model(x).shape == (2, 10)
        model.reset_classifier(0)
        assert torch.equal(model(x), frozen.backbone()(x))


@pytest.mark.parametrize(
    "config",
    [replace_kwargs(tiny_config(), depth=4), backbone("resnet10t", **TINY_RESNET["kwargs"])],
    ids=["vit", "resnet"],
)
def test_feature_maps_are_available(config: DINOConfig, tmp_path: Path) -> None:
    model = load_folder(folder_of(export_timm(frozen_of(config)), tmp_path), features_only=True)
    size = config.crops.global_crop_size
    with torch.no_grad():
        maps = model(torch.randn(1, 3, size, size))
    assert [m.shape[1] for m in maps] == model.feature_info.channels()


def odd_image(width: int, height: int) -> NDArray[np.uint8]:
    noise = np.random.default_rng(0).integers(0, 256, (height // 7 + 1, width // 7 + 1, 3), np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("size", [16, 32, 96, 224])
@pytest.mark.parametrize(("width", "height"), [(321, 247), (247, 321), (50, 41), (1000, 99)])
def test_timm_s_transform_is_the_run_s_preprocessing(
    size: int, width: int, height: int, tmp_path: Path
) -> None:
    config = tiny_config(
        crops={
            "global_crop_size": size,
            "local_crop_size": 8,
            "pixel_mean": (0.1, 0.2, 0.3),
            "pixel_std": (0.3, 0.2, 0.1),
        }
    )
    model = load_folder(folder_of(export_timm(frozen_of(config)), tmp_path))
    data = resolve_model_data_config(model)
    assert (list(data["input_size"]), data["crop_mode"]) == ([3, size, size], "center")
    assert (list(data["mean"]), list(data["std"])) == ([0.1, 0.2, 0.3], [0.3, 0.2, 0.1])
    image = odd_image(width, height)
    theirs = create_transform(**data, is_training=False)(Image.fromarray(image))
    ours = pixels(eval_crop(image, size=size)[None, None], config.crops, torch.device("cpu"))[0]
    # timm resizes the whole image before it cuts the square, so bytes are rounded at other places.
    levels = (theirs - ours).abs() * 255 * torch.tensor([0.3, 0.2, 0.1])[:, None, None]
    assert levels.max() < 2.01
    assert levels.mean() < 0.2


def test_the_resize_is_dinos_at_every_size() -> None:
    for size in range(8, 2000):
        assert math.floor(size / crop_share(size)) == round(size * 256 / 224)
    assert crop_share(224) == 0.875


def test_knn_agrees_between_timm_and_the_run(tmp_path: Path) -> None:
    config = tiny_config()
    frozen = frozen_of(config)
    model = load_folder(folder_of(export_timm(frozen), tmp_path))
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    labels = ("rings", "stripes")
    sides: dict[str, list[Features]] = {"ours": [], "theirs": []}
    for split, count in (("train", 12), ("val", 12)):
        images = [_drawn(label, split, i) for label in labels for i in range(count)]
        names = [label for label in labels for _ in range(count)]
        crops = np.stack([eval_crop(np.asarray(image), size=16) for image in images])
        ours = embed(frozen.backbone(), crops, config.crops, precision="fp32")
        with torch.no_grad():
            theirs = model(torch.stack([transform(image) for image in images])).numpy()
        np.testing.assert_allclose(theirs, ours, atol=0.02 * np.abs(ours).max())
        sides["ours"].append(Features(ours, names, 0))
        sides["theirs"].append(Features(theirs, names, 0))
    ours_scores, their_scores = (
        knn_accuracy(*sides[who], EvalConfig(k=(3, 5))) for who in ("ours", "theirs")
    )
    assert their_scores == ours_scores
    assert ours_scores["knn_3"] > 0.5


def _drawn(label: str, split: str, number: int) -> Image.Image:
    return Image.open(io.BytesIO(draw_demo_image(label, split, number))).convert("RGB")


def test_the_size_of_evaluations_is_recorded_where_the_backbone_takes_it() -> None:
    vit, swin = frozen_of(tiny_config()), frozen_of(ALL[-1])
    assert export_timm(vit, image_size=24).image_size == 24
    assert json.loads(export_timm(vit, image_size=24).config)["pretrained_cfg"]["input_size"] == [3, 24, 24]
    assert export_timm(vit, image_size=23).image_size == 16
    assert export_timm(swin).image_size == 64


def test_nothing_of_the_weights_that_timm_publishes_is_taken_over() -> None:
    config = backbone("vit_small_patch14_dinov2.lvd142m", size=56, local_size=28, **TINY_VIT)
    published = timm.get_pretrained_cfg("vit_small_patch14_dinov2.lvd142m")
    ours = json.loads(export_timm(frozen_of(config), license_id="mit").config)["pretrained_cfg"]
    assert published.license != "mit"
    assert (ours["license"], ours["tag"], ours["num_classes"]) == ("mit", "dino", 0)
    assert not ours.keys() & {"url", "hf_hub_id", "file", "source", "origin_url", "notes", "test_input_size"}


def test_a_stochastic_depth_of_training_is_not_taken_over() -> None:
    tree = tiny_config().model_dump()
    tree["backbone"]["kwargs"] |= {"proj_drop_rate": 0.5}
    arguments = json.loads(export_timm(frozen_of(DINOConfig.model_validate(tree))).config)["model_args"]
    assert not [name for name in arguments if name.endswith("drop_rate")]
    assert (arguments["patch_size"], arguments["dynamic_img_size"]) == (4, True)


# Position embeddings


def official_at(size: int, native: int) -> FrozenBackbone:
    config = backbone("vit_tiny_patch16_224", size=size, local_size=8, pos_embed="official", **OWN_VIT)
    return frozen_of(replace_kwargs(config, img_size=native))


@pytest.mark.parametrize(("size", "native"), [(16, 32), (32, 16), (32, 32)])
def test_published_position_embeddings_are_exact_at_the_run_s_size(
    size: int, native: int, tmp_path: Path
) -> None:
    frozen = official_at(size, native)
    export = export_timm(frozen)
    model = load_folder(folder_of(export, tmp_path))
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(model(x), frozen.backbone()(x))
    assert list(resolve_model_data_config(model)["input_size"]) == [3, size, size]


def test_the_difference_at_other_sizes_is_measured(tmp_path: Path) -> None:
    frozen = official_at(32, 32)
    export = export_timm(frozen)
    model = load_folder(folder_of(export, tmp_path))
    assert export.deviations.keys() == {8}
    assert 1e-4 < export.deviations[8] < 0.5
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert not torch.equal(model(x), frozen.backbone()(x))
    assert export_timm(frozen_of(tiny_config())).deviations == {}


@pytest.mark.parametrize("pos_embed", ["timm", "official"])
def test_the_weights_carry_the_rule_of_their_position_embeddings(pos_embed: str, tmp_path: Path) -> None:
    frozen = frozen_of(tiny_config(backbone={"pos_embed": pos_embed}))
    folder = folder_of(export_timm(frozen), tmp_path)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", POS_EMBED_KEY: pos_embed}


# Faults


def test_weights_that_timm_would_use_otherwise_are_not_given_out(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = frozen_of(tiny_config())
    other = frozen_of(replace_kwargs(tiny_config(), num_heads=4))
    built = timm.create_model(other.config.backbone.name, num_classes=0, **timm_arguments(other))
    built.load_state_dict(other.weights)
    monkeypatch.setattr(FrozenBackbone, "backbone", lambda self: built.eval())
    with pytest.raises(DinorayError, match=r"computes other features .*; export it with --format onnx$"):
        export_timm(frozen)
    assert export_onnx(frozen).data


def test_weights_that_timm_cannot_load_are_refused_with_a_remedy() -> None:
    frozen = frozen_of(tiny_config())
    broken = frozen._replace(weights={**frozen.weights, "more": torch.zeros(1)})
    with pytest.raises(DinorayError, match=r"cannot load the exported .* export it with --format state_dict"):
        export_timm(broken)
    assert export_state_dict(broken)


def test_a_folder_loads_elsewhere_by_absolute_and_relative_path(tmp_path: Path) -> None:
    frozen = frozen_of(tiny_config())
    folder_of(export_timm(frozen), tmp_path / "with spaces" / "vit")
    x = torch.randn(2, 3, 16, 16)
    torch.save(x, tmp_path / "x.pt")
    paths = ["with spaces/vit", str(tmp_path / "with spaces" / "vit"), "./with spaces/vit"]
    run_elsewhere(
        "import timm, torch\n"
        f"models = [timm.create_model('local-dir:' + path, pretrained=True).eval() for path in {paths}]\n"
        "torch.save([model(torch.load('x.pt')).detach() for model in models], 'features.pt')",
        tmp_path,
    )
    with torch.no_grad():
        expected = frozen.backbone()(x)
    for features in torch.load(tmp_path / "features.pt"):
        assert torch.equal(features, expected)
