"""Images come in their order whatever is wrong with some, and the next batch is made while one is used."""

import threading
from pathlib import Path

import numpy as np
from ranks import labelled_source

from dinoray.pipeline.data.decoding.decode import decode
from dinoray.pipeline.data.reading.loader import load_batches
from dinoray.pipeline.data.reading.source import Status


def test_batches_hold_every_image_once_in_order(tmp_path: Path) -> None:
    source = labelled_source(tmp_path / "images")
    (tmp_path / "images" / "dots" / "1.jpg").write_bytes(b"no picture")
    (tmp_path / "images" / "rings" / "0.jpg").unlink()
    wanted = [8, 0, 1, 3, 4]
    batches = list(load_batches(source, wanted, lambda image, _: image[:2, :2], batch_size=2))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    rows = [image for batch in batches for image in batch]
    assert [image.key for image in rows] == [source.key(i) for i in wanted]
    assert [image.status for image in rows] == [0, 0, Status.CORRUPT, Status.MISSING, 0]
    assert [image.label for image in rows] == ["stripes", "dots", "dots", "rings", "rings"]
    for image, fetched in zip(rows, source.fetch(wanted), strict=True):
        if image.status == Status.OK:
            assert fetched.data is not None
            expected = decode(fetched.data, max_pixels=10**6)[:2, :2]
            np.testing.assert_array_equal(image.pixels, expected)
            assert image.reason == ""
        else:
            assert image.pixels is None
            assert image.reason


def test_no_images_make_no_batches(tmp_path: Path) -> None:
    assert not list(load_batches(labelled_source(tmp_path / "images"), [], lambda i, _: i, batch_size=2))


def test_the_next_batch_is_made_while_one_is_used_and_not_a_third(tmp_path: Path) -> None:
    source = labelled_source(tmp_path / "images")
    seen: list[str] = []
    second = threading.Event()

    def prepare(image: np.ndarray, key: str) -> np.ndarray:
        seen.append(key)
        if len(seen) == 4:
            second.set()
        return image

    batches = load_batches(source, range(9), prepare, batch_size=2)
    next(batches)
    assert second.wait(120)
    assert sorted(seen) == [source.key(i) for i in range(4)]
    batches.close()
