"""What is measured of samples of more than 8 bits: once, on a few images, and kept with the run."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
from run_configs import config_of

from dinoray.pipeline.augment.config import IMAGENET_MEAN
from dinoray.pipeline.data.config import DataConfig
from dinoray.pipeline.data.decoding.decode import decode
from dinoray.pipeline.data.manifests.manifest import build_manifest
from dinoray.pipeline.data.measured import NOTHING, Measured
from dinoray.pipeline.data.reading import measuring
from dinoray.pipeline.data.reading.loader import load_batches
from dinoray.pipeline.data.reading.measuring import kept_measurement, load_or_measure, measure
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.training.auto import resolve
from dinoray.pipeline.worker.inputs import Inputs

RAMP = np.linspace(200, 3800, 64 * 48).astype(np.uint16).reshape(48, 64)


def write(folder: Path, name: str, values: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(cv2.imencode(Path(name).suffix, values)[1].tobytes())


@pytest.fixture
def twelve(tmp_path: Path) -> Path:
    """A folder of 20 pictures of 12 bits, each of which lacks part of the range."""
    folder = tmp_path / "twelve"
    for i in range(20):
        write(folder, f"{i:02}.png", np.clip(RAMP, 200 + 20 * i, 3800))
    return folder


def source(folder: Path, **settings: object) -> Source:
    config = DataConfig.model_validate({"path": str(folder), **settings})
    return Source(config, build_manifest(config))


def test_the_range_is_that_of_the_samples(twelve: Path) -> None:
    found = measure(source(twelve))
    assert found.value_range is not None
    low, high = found.value_range
    assert (low, high) == pytest.approx((200, 3800), abs=80)
    assert low == int(low)
    assert found.line.startswith(f"pixels: data.value_range=[{low:g}, {high:g}], mean 0.4")
    assert found.line.endswith("measured on 20 images of uint16")


def test_mean_and_spread_are_those_of_the_pixels(twelve: Path) -> None:
    images = source(twelve, value_range=[0, 4095])
    found = measure(images)
    assert found.value_range == (0, 4095)
    pixels = [
        decode(f.data, max_pixels=10**6, config=images.config) for f in images.fetch(range(20)) if f.data
    ]
    shares = np.stack(pixels) / 255
    np.testing.assert_allclose(found.mean or (), shares.mean((0, 1, 2)), atol=1e-4)
    np.testing.assert_allclose(found.std or (), shares.std((0, 1, 2)), atol=1e-4)


def test_a_hot_pixel_does_not_decide(twelve: Path) -> None:
    hot = RAMP.copy()
    hot[0, 0] = 65535
    write(twelve, "hot.png", hot)
    assert (measure(source(twelve)).value_range or (0, 0))[1] < 4000


def test_floats_are_read_once_their_range_is_known(tmp_path: Path) -> None:
    for i in range(3):
        write(tmp_path, f"{i}.tiff", (RAMP - 2000).astype(np.float32) / 7)
    images = source(tmp_path)
    found = measure(images)
    images = source(tmp_path, value_range=found.value_range)
    (batch,) = load_batches(images, range(3), lambda image, _: image, batch_size=3)
    assert [(one.reason, int(np.ptp(one.pixels))) for one in batch if one.pixels is not None] == 3 * [
        ("", 255)
    ]


def test_images_of_8_bits_are_neither_measured_nor_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.png", "b.jpg"):
        write(tmp_path, name, (RAMP >> 4).astype(np.uint8))
    monkeypatch.setattr(measuring, "read_samples", lambda *_, **__: pytest.fail("decoded"))
    assert measure(source(tmp_path)) == NOTHING


def test_images_whose_names_tell_8_bits_are_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "a.jpg", (RAMP >> 4).astype(np.uint8))
    monkeypatch.setattr(Source, "fetch", lambda *_: pytest.fail("fetched"))
    assert measure(source(tmp_path)) == NOTHING


def test_a_run_measures_once(twelve: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, images = Directory(str(tmp_path / "run")), source(twelve)
    first = load_or_measure(images, run, normalises=False)
    assert first.value_range == kept_measurement(run).value_range
    run.write(run_dir.CONFIG, b"")
    monkeypatch.setattr(measuring, "measure", lambda *_, **__: pytest.fail("measured again"))
    assert load_or_measure(images, run, normalises=False) == first


def test_a_run_that_began_before_anything_was_measured_goes_on_as_it_was(
    twelve: Path, tmp_path: Path
) -> None:
    run = Directory(str(tmp_path / "run"))
    run.write(run_dir.CONFIG, b"")
    assert load_or_measure(source(twelve), run, normalises=False) == NOTHING


def test_an_attempt_with_another_range_fixes_nothing(twelve: Path, tmp_path: Path) -> None:
    run = Directory(str(tmp_path / "run"))
    load_or_measure(source(twelve, value_range=[0, 100]), run, normalises=False)
    assert (load_or_measure(source(twelve), run, normalises=False).value_range or (0, 0))[1] > 3000


def test_all_images_of_a_run_are_read_in_the_measured_range(twelve: Path, tmp_path: Path) -> None:
    config = config_of(f"data.path={twelve}")
    inputs = Inputs.open(config, Directory(str(tmp_path / "run")))
    assert inputs.images.config.value_range == inputs.measured.value_range
    assert np.ptp(inputs.pictures()[0][1]) == 255
    learnt = resolve(config.algorithm(), num_images=20, measured=inputs.measured)
    assert learnt.config.data.value_range == inputs.measured.value_range
    assert learnt.config.crops.pixel_mean == inputs.measured.mean
    assert inputs.measured.line in learnt.reasons
    # Evaluations and embeddings begin from the checkpoint's config.
    assert config.with_pixels_of(learnt.config).data.value_range == inputs.measured.value_range


MEASURED = Measured((0, 4095), (0.1, 0.1, 0.1), (0.2, 0.2, 0.2))


@pytest.mark.parametrize(
    ("overrides", "measured", "mean"),
    [
        ((), NOTHING, IMAGENET_MEAN),
        ((), MEASURED, MEASURED.mean),
        (["crops.pixel_mean=[0.3, 0.3, 0.3]"], MEASURED, (0.3, 0.3, 0.3)),
        (["crops.pixel_mean=auto"], MEASURED, MEASURED.mean),
        (["crops.pixel_mean=auto"], NOTHING, IMAGENET_MEAN),
    ],
)
def test_a_mean_that_is_set_goes_before_the_measured_one(
    overrides: Sequence[str], measured: Measured, mean: tuple[float, ...]
) -> None:
    config = config_of(*overrides).algorithm()
    assert resolve(config, num_images=9, measured=measured).config.crops.pixel_mean == mean
