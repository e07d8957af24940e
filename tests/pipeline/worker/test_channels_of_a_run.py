"""A run on pictures of four channels and 12 bits, without Ray: from the stream to the export."""

import json
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from jobs_processes import TINY

from dinoray.jobs.cli.config import load_config
from dinoray.models.errors import ConfigError
from dinoray.pipeline.augment.augmenter import Augmenter
from dinoray.pipeline.augment.multicrop import crop_rng, multi_crop
from dinoray.pipeline.data.reading.source import Status
from dinoray.pipeline.evaluation.backbone_outputs import check_size
from dinoray.pipeline.evaluation.features import embed_source
from dinoray.pipeline.export.timm_export import export_timm
from dinoray.pipeline.figures.attention_sheet import attention_figure
from dinoray.pipeline.figures.contact_sheet import contact_sheet
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.training.bad_images import Quarantine
from dinoray.pipeline.training.checkpoint import read_frozen, save_checkpoint
from dinoray.pipeline.training.state import build_state
from dinoray.pipeline.training.step import train_step
from dinoray.pipeline.worker.driver import check_run, what_is_learnt
from dinoray.pipeline.worker.inputs import Inputs

NUM_IMAGES = 12
GRAYS = ["crops.saturation=0", "crops.hue=0", "crops.gray_prob=0"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The config of a run of four channels, its inputs, and its state after a step."""
    folder = tmp_path_factory.mktemp("channels")
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(NUM_IMAGES):
        values = rng.integers(0, 4096, (40, 50, 4)).astype(np.uint16)
        (folder / "images" / f"{i}.tiff").write_bytes(cv2.imencode(".tiff", values)[1].tobytes())
    (folder / "images" / "rgb.png").write_bytes(
        cv2.imencode(".png", np.zeros((40, 50, 3), np.uint8))[1].tobytes()
    )
    settings = [*TINY, f"data.path={folder / 'images'}", f"storage_path={folder}", "data.channels=4", *GRAYS]
    config = load_config("demo", None, settings)
    check_run(config)
    run = Directory(str(folder / "run"))
    inputs = Inputs.open(config, run)
    algorithm, _, _ = what_is_learnt(config, run, num_images=NUM_IMAGES, measured=inputs.measured)
    order = inputs.images.order(0)
    augmenter = Augmenter(inputs.images, order, config.crops, seed=0, num_threads=1)
    batch = augmenter.block(np.arange(NUM_IMAGES + 1))
    state = build_state(algorithm, num_images=NUM_IMAGES)
    metrics = train_step(state, batch)
    save_checkpoint(state, folder, num_images=NUM_IMAGES, quarantine=Quarantine())
    return {
        "config": config,
        "inputs": inputs,
        "batch": batch,
        "metrics": metrics,
        "frozen": read_frozen(folder),
    }


def test_batches_have_all_channels_and_a_picture_of_others_is_bad(parts: dict[str, Any]) -> None:
    batch = parts["batch"]
    assert batch["global_crops"].shape[-1] == batch["local_crops"].shape[-1] == 4
    (bad,) = [json.loads(note) for note in batch["note"] if note]
    assert bad["reason"] == "3 channels, but data.channels=4"
    assert np.count_nonzero(batch["status"] != Status.OK) == 1
    assert torch.isfinite(parts["metrics"]["loss"])


def test_the_checkpoint_knows_channels_range_and_mean(parts: dict[str, Any]) -> None:
    learnt, measured = parts["frozen"].config, parts["inputs"].measured
    assert (learnt.data.channels, learnt.crops.channels) == (4, 4)
    assert learnt.data.value_range == measured.value_range
    assert learnt.crops.pixel_mean == measured.mean
    assert np.allclose(learnt.crops.pixel_mean, 0.5, atol=0.05)
    assert len(learnt.crops.pixel_mean) == 4


def test_a_frozen_network_takes_the_channels(parts: dict[str, Any]) -> None:
    frozen, config, images = parts["frozen"], parts["config"], parts["inputs"].images
    size = frozen.config.crops.global_crop_size
    check_size(frozen, size)
    indices = np.arange(images.num_images)
    found = embed_source(
        frozen.backbone(), images, indices, frozen.config.crops, config.eval, precision="fp32", labelled=False
    )
    assert found.features.shape[0] == NUM_IMAGES
    assert found.num_bad == 1


def test_an_export_has_the_channels_and_their_mean(parts: dict[str, Any]) -> None:
    about = json.loads(export_timm(parts["frozen"]).config)
    assert about["pretrained_cfg"]["input_size"][0] == 4
    assert about["model_args"]["in_chans"] == 4
    assert tuple(about["pretrained_cfg"]["mean"]) == parts["inputs"].measured.mean


def test_pictures_show_three_of_the_channels(parts: dict[str, Any]) -> None:
    (name, image), *_ = parts["inputs"].pictures()
    crops = parts["config"].crops
    sheet = contact_sheet([(name, image, multi_crop(image, crop_rng(0, 0, name), crops))], crops)
    assert sheet.startswith(b"\x89PNG")
    frozen = parts["frozen"]
    figure = attention_figure(frozen.backbone(), [(name, image)], frozen.config.crops, image_size=32)
    assert figure is not None


def test_crops_follow_the_channels_of_the_data_by_themselves() -> None:
    config = load_config("demo", None, ["data.channels=1", *GRAYS])
    assert config.crops.channels == 1
    with pytest.raises(
        ConfigError, match=r"crops\.channels=3 must be data\.channels=1; set crops\.channels=1"
    ):
        load_config("demo", None, ["data.channels=1", "crops.channels=3", *GRAYS])
    with pytest.raises(ConfigError, match=r"set crops\.saturation=0 crops\.hue=0 crops\.gray_prob=0"):
        load_config("demo", None, ["data.channels=4"])
