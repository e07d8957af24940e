"""The drawn image set: the same on every machine, told apart by shape and not by colour, never half written."""

import multiprocessing
import os
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from oracles import image_features, leave_one_out_accuracy

from dinoray.pipeline.data import demo_images
from dinoray.pipeline.data.demo_images import (
    NUM_TRAIN_PER_CLASS,
    NUM_VAL_PER_CLASS,
    PATTERNS,
    demo_folder,
    draw_demo_image,
    write_demo_images,
)

PER_CLASS = 20
CHANCE = 1 / len(PATTERNS)


def pixels(data: bytes) -> NDArray[np.uint8]:
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert image is not None
    return image.astype(np.uint8)


@lru_cache(maxsize=1)
def some_images() -> tuple[list[NDArray[np.uint8]], list[str]]:
    """Twenty images of each class, and their classes."""
    labels = [label for label in PATTERNS for _ in range(PER_CLASS)]
    return [pixels(draw_demo_image(label, "train", i % PER_CLASS)) for i, label in enumerate(labels)], labels


def colours(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Histograms of hue, saturation and value: all that colour says."""
    hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
    return np.concatenate(
        [np.histogram(hsv[..., c], bins=16, range=(0, 256), density=True)[0] for c in range(3)]
    )


def gradients(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Histogram of the directions of edges: something of the shape, and nothing of the colour."""
    gray = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY).astype(np.float32)
    dx, dy = cv2.Sobel(gray, cv2.CV_32F, 1, 0), cv2.Sobel(gray, cv2.CV_32F, 0, 1)
    strength = np.hypot(dx, dy)
    directions = np.histogram(np.arctan2(dy, dx) % np.pi, bins=18, range=(0, np.pi), weights=strength)[0]
    return directions / strength.sum()


def test_an_image_is_a_function_of_its_name() -> None:
    assert draw_demo_image("stars", "val", 3) == draw_demo_image("stars", "val", 3)
    names = [(label, split, i) for label in PATTERNS for split in ("train", "val") for i in range(3)]
    assert len({draw_demo_image(*name) for name in names}) == len(names)


@pytest.mark.parametrize("label", PATTERNS)
def test_every_image_shows_something(label: str) -> None:
    for i in range(5):
        image = pixels(draw_demo_image(label, "val", i))
        assert image.shape == (96, 96, 3)
        assert 15 < image.std() < 90


def test_there_are_enough_images_of_enough_classes() -> None:
    assert len(PATTERNS) >= 10
    assert len(PATTERNS) * (NUM_TRAIN_PER_CLASS + NUM_VAL_PER_CLASS) >= 2000
    assert list(PATTERNS) == sorted(PATTERNS)


def test_colour_does_not_tell_the_classes_apart() -> None:
    images, labels = some_images()
    accuracy = leave_one_out_accuracy(image_features(images, colours), labels, k=5)
    assert accuracy < 2.5 * CHANCE


def test_shape_tells_the_classes_apart() -> None:
    images, labels = some_images()
    accuracy = leave_one_out_accuracy(image_features(images, gradients), labels, k=5)
    assert accuracy > 6 * CHANCE


def test_the_pattern_is_light_on_dark_as_often_as_dark_on_light() -> None:
    images, labels = some_images()
    dots = [image.mean(axis=2) for image, label in zip(images, labels, strict=True) if label == "dots"]
    light_ink = sum(np.median(gray) < gray.mean() for gray in dots)  # dots cover less than half
    assert 4 <= light_ink <= PER_CLASS - 4


# Writing them


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> int:
    """Make the set small; returns how many images it then has."""
    monkeypatch.setattr(demo_images, "NUM_TRAIN_PER_CLASS", 2)
    monkeypatch.setattr(demo_images, "NUM_VAL_PER_CLASS", 1)
    return 3 * len(PATTERNS)


def test_the_set_is_one_folder_per_class_in_two_splits(tmp_path: Path, few: int) -> None:
    folder = tmp_path / "cache" / "demo"
    assert write_demo_images(folder) == few
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.jpg"))
    assert len(files) == few
    assert files[0] == "train/blobs/blobs-0000.jpg"
    assert files[-1] == "val/zigzag/zigzag-0000.jpg"
    assert (folder / files[0]).read_bytes() == draw_demo_image("blobs", "train", 0)


def test_a_set_that_is_there_is_not_drawn_again(
    tmp_path: Path, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "demo"
    write_demo_images(folder)
    marked = folder / "train" / "dots" / "dots-0000.jpg"
    marked.write_bytes(b"mine")
    monkeypatch.setattr(demo_images, "draw_demo_image", lambda *name: pytest.fail(f"drew {name}"))
    assert write_demo_images(folder) == few
    assert marked.read_bytes() == b"mine"


def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(PATTERNS, "stars", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_demo_images(tmp_path / "demo")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()


def test_what_a_killed_process_of_the_same_id_left_is_no_hindrance(tmp_path: Path, few: int) -> None:
    # In a container the first process has the same id each time.
    left = tmp_path / f"demo.partial-{os.getpid()}" / "train" / "blobs"
    left.mkdir(parents=True)
    (left / "blobs-0000.jpg").write_bytes(b"half an im")
    assert write_demo_images(tmp_path / "demo") == few
    assert len(list((tmp_path / "demo").rglob("*.jpg"))) == few
    assert (tmp_path / "demo" / "train" / "blobs" / "blobs-0000.jpg").stat().st_size > 100


def test_several_processes_may_write_at_once(tmp_path: Path, few: int) -> None:
    folder = tmp_path / "demo"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_demo_images, args=(folder,)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    assert len(list(folder.rglob("*.jpg"))) == few


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINORAY_CACHE", "/somewhere")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    name = f"demo-v{demo_images.VERSION}"
    assert demo_folder() == Path("/somewhere") / name
    monkeypatch.delenv("DINORAY_CACHE")
    assert demo_folder() == Path("/caches/dinoray") / name
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert demo_folder() == Path.home() / ".cache" / "dinoray" / name
