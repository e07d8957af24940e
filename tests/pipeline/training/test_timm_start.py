"""`init.from=timm:NAME`: the weights that timm publishes, from a local cache of the hub, for any crops."""

from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny import NUM_IMAGES, tiny_config

from dinoray.models import backbone
from dinoray.models.backbone import build_backbone
from dinoray.models.config import BackboneConfig
from dinoray.models.errors import ConfigError, DataError
from dinoray.pipeline.training.config import InitConfig
from dinoray.pipeline.training.init_weights import load_initial_weights, read_weights
from dinoray.pipeline.training.published_weights import check_start
from dinoray.pipeline.training.state import build_state


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, which cannot be reached."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def publish(hub: Path, name: str) -> None:
    """Random weights of a model with its classifier, as the hub keeps them."""
    torch.manual_seed(5)
    folder = hub / f"models--timm--{name}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    weights = timm.create_model(name.partition(".")[0]).state_dict()
    save_file(weights, folder / "snapshots" / ("0" * 40) / "model.safetensors")


@pytest.mark.parametrize("name", ["test_vit.r160_in1k", "test_convnext.r160_in1k"])
def test_weights_of_timm_are_those_that_timm_loads_for_these_crops(hub: Path, name: str) -> None:
    publish(hub, name)
    crops = {"global_crop_size": 64, "local_crop_size": 32}
    state = build_state(
        tiny_config(backbone={"name": name, "kwargs": {}}, crops=crops), num_images=NUM_IMAGES
    )
    lines = load_initial_weights(state, read_weights(f"timm:{name}"), "backbone")
    size = {"img_size": 64, "dynamic_img_size": True} if "vit" in name else {}
    theirs = timm.create_model(name, pretrained=True, num_classes=0, **size).state_dict()
    for network in (state.dino.student, state.dino.teacher):
        ours = network.backbone.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert lines[0] == f"student and teacher from timm:{name}: backbone ({len(theirs)} tensors)"
    resized = [line for line in lines if line.startswith("position embeddings resized from 101 to 17 tokens")]
    assert len(resized) == ("vit" in name)


@pytest.mark.parametrize("name", ["test_vit.r160_in1k", "test_convnext.r160_in1k"])
def test_pretrained_weights_get_other_channels_as_those_of_a_start_do(hub: Path, name: str) -> None:
    publish(hub, name)
    crops = {
        "global_crop_size": 64,
        "local_crop_size": 32,
        "channels": 5,
        "saturation": 0,
        "hue": 0,
        "gray_prob": 0,
    }
    pretrained, started = (
        build_state(
            tiny_config(backbone={"name": name, "kwargs": {}, "pretrained": is_pretrained}, crops=crops),
            num_images=NUM_IMAGES,
        )
        for is_pretrained in (True, False)
    )
    load_initial_weights(started, read_weights(f"timm:{name}"), "backbone")
    for ours, theirs in zip(
        *((s.dino.student.backbone, s.dino.teacher.backbone) for s in (pretrained, started)), strict=True
    ):
        theirs_by_name = theirs.state_dict()
        assert all(torch.equal(value, theirs_by_name[key]) for key, value in ours.state_dict().items())


def test_pretrained_weights_that_cannot_get_other_channels_are_refused(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "test_vit.r160_in1k"
    publish(hub, name)
    monkeypatch.setattr(backbone, "image_layers", lambda _: [])  # a network for which timm names none
    config = BackboneConfig(name=name, drop_path_rate=0, pretrained=True)
    build = partial(build_backbone, config, crop_sizes=(64,), drop_path_rate=0.0, in_chans=5)
    with pytest.raises(
        ConfigError, match=r"do not fit data\.channels=5: .*; set backbone\.pretrained=false, or"
    ):
        build(pretrained=True)
    build(pretrained=False)


def test_weights_that_are_not_in_the_cache_are_named_with_a_remedy(hub: Path) -> None:
    with pytest.raises(
        DataError, match=r"^init.from=timm:test_vit: .* init.from=FILE backbone.name=test_vit$"
    ):
        read_weights("timm:test_vit")


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ("timm:test_vitt", r"timm has no such model; did you mean test_vit"),
        ("timm:dinov2_vits14", r"; timm has it .*: set init.from=timm:vit_small_patch14_dinov2.lvd142m$"),
        ("timm:test_vit.zzz", r"no such weights, but test_vit.*; set init.from=timm:test_vit\.r160_in1k"),
        ("timm:convnext_atto_rms", r"publishes no weights of this model; set init.from=FILE "),
    ],
)
def test_names_that_timm_does_not_publish_are_refused(start: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^init.from={start}: .*{message}"):
        check_start(InitConfig.model_validate({"from": start}), BackboneConfig())


def test_random_weights_are_not_frozen() -> None:
    with pytest.raises(ConfigError, match=r"^init.freeze_steps=auto .*; set init.from=timm:NAME"):
        check_start(InitConfig(freeze_steps="auto"), BackboneConfig())
    check_start(InitConfig(freeze_steps="auto"), BackboneConfig(pretrained=True))
    check_start(InitConfig(freeze_steps="auto", path="/x.pth"), BackboneConfig())


def test_heads_of_a_run_are_not_fresh() -> None:
    with pytest.raises(ValueError, match=r"init.freeze_steps=5 .*; set init.freeze_steps=0"):
        InitConfig(freeze_steps=5, load="run", path="/run")
