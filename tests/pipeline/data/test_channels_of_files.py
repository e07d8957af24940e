"""Pictures of 1 to 16 channels from TIFF, PNG and npy; near-infrared is no alpha, and pages may be channels."""

import io

import numpy as np
import pytest
from image_files import MAX_PIXELS, encode, picture
from PIL import Image

from dinoray.pipeline.data.bad_image import BadImage
from dinoray.pipeline.data.config import PixelsConfig
from dinoray.pipeline.data.decode import decode, eval_crop, read_samples

tifffile = pytest.importorskip("tifffile")


def bands(channels: int, dtype: str = "u1") -> np.ndarray:
    return (np.random.default_rng(0).random((37, 53, channels)) * 200).astype(dtype)


def tiff(values: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, **options)
    return file.getvalue()


def npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


LAYOUTS = {
    "strips": {"rowsperstrip": 7},
    "tiles": {"tile": (16, 16)},
    "deflate": {"compression": "zlib", "predictor": True},
    "big": {"bigtiff": True, "byteorder": ">"},
}


@pytest.mark.parametrize("is_planar", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("channels", "dtype"), [(2, "u1"), (4, "u2"), (5, "i2"), (13, "u2"), (16, "f4")])
def test_a_tiff_of_any_layout_is_read(channels: int, dtype: str, layout: str, is_planar: bool) -> None:
    values, options = bands(channels, dtype), dict(LAYOUTS[layout])
    if dtype == "f4":
        options.pop("predictor", None)  # tifffile cannot write it
    stored = np.moveaxis(values, 2, 0) if is_planar else values
    data = tiff(
        stored, photometric="minisblack", planarconfig="separate" if is_planar else "contig", **options
    )
    samples = read_samples(data, max_pixels=MAX_PIXELS, config=PixelsConfig(channels=channels))
    np.testing.assert_array_equal(samples.values, values)


@pytest.mark.parametrize("compression", ["tiff_lzw", "packbits", "tiff_adobe_deflate", "zstd", "lzma"])
def test_the_compressions_of_libtiff_are_read(compression: str) -> None:
    values = bands(1, "u2")[..., 0]
    data = encode(Image.fromarray(values), "TIFF", compression=compression)
    np.testing.assert_array_equal(read_samples(data, max_pixels=MAX_PIXELS).values[..., 0], values)


def test_differences_of_floats_are_read() -> None:
    values = bands(1, "f4")[..., 0] / 7
    data = encode(Image.fromarray(values), "TIFF", compression="tiff_adobe_deflate", tiffinfo={317: 3})
    assert tifffile.TiffFile(io.BytesIO(data)).pages[0].predictor == 3
    np.testing.assert_array_equal(read_samples(data, max_pixels=MAX_PIXELS).values[..., 0], values)


@pytest.mark.parametrize(
    ("extra", "is_alpha"), [("unspecified", False), ("unassalpha", True), ("assocalpha", True)]
)
def test_near_infrared_is_told_from_alpha(extra: str, is_alpha: bool) -> None:
    values = bands(4)
    values[..., 3] = 0
    data = tiff(values, photometric="rgb", extrasamples=(extra,))
    seen = decode(data, max_pixels=MAX_PIXELS)
    if is_alpha:
        assert (
            seen.min() == 255
            if extra == "unassalpha"
            else seen.min() >= 250 or (seen >= values[..., :3]).all()
        )
    else:
        np.testing.assert_array_equal(seen, values[..., :3])
    np.testing.assert_array_equal(
        decode(data, max_pixels=MAX_PIXELS, config=PixelsConfig(channels=4)), values
    )


def test_a_png_has_the_channels_that_it_has() -> None:
    for mode, channels in (("L", 1), ("LA", 2), ("RGB", 3), ("RGBA", 4)):
        data = encode(Image.fromarray(picture()).convert(mode), "PNG")
        for asked in (1, 2, 4):
            config = PixelsConfig(channels=asked)
            if asked == channels:
                assert decode(data, max_pixels=MAX_PIXELS, config=config).shape == (40, 56, asked)
                continue
            found = "1 channel," if channels == 1 else f"{channels} channels,"
            with pytest.raises(BadImage, match=f"^{found} but data.channels={asked}$"):
                decode(data, max_pixels=MAX_PIXELS, config=config)


@pytest.mark.parametrize("dtype", ["u1", "u2", "f4", "f8", "?"])
@pytest.mark.parametrize("is_first", [True, False])
def test_an_array_has_its_channels_first_or_last(dtype: str, is_first: bool) -> None:
    values = bands(5, dtype)
    data = npy(np.moveaxis(values, 2, 0) if is_first else values)
    samples = read_samples(data, max_pixels=MAX_PIXELS)
    np.testing.assert_array_equal(
        samples.values, values * 255 if dtype == "?" else values.astype(samples.values.dtype)
    )
    with pytest.raises(BadImage, match="cut off array"):
        read_samples(data[:-1], max_pixels=MAX_PIXELS)


@pytest.mark.parametrize(
    "values",
    [np.zeros((2, 3, 4, 5)), np.zeros((30, 40), complex), np.array([None, "a"]), np.zeros((20, 20, 20))],
)
def test_an_array_that_is_no_picture_is_refused(values: np.ndarray) -> None:
    file = io.BytesIO()
    np.save(file, values, allow_pickle=True)
    with pytest.raises(BadImage, match="array of"):
        read_samples(file.getvalue(), max_pixels=MAX_PIXELS)


def test_a_page_is_chosen_or_pages_are_channels() -> None:
    values = bands(5, "u2")
    data = tiff(np.moveaxis(values, 2, 0), photometric="minisblack")
    first, third = (read_samples(data, max_pixels=MAX_PIXELS, config=PixelsConfig(page=i)) for i in (0, 2))
    np.testing.assert_array_equal(first.values[..., 0], values[..., 0])
    np.testing.assert_array_equal(third.values[..., 0], values[..., 2])
    config = PixelsConfig(page="channels", channels=5)
    np.testing.assert_array_equal(read_samples(data, max_pixels=MAX_PIXELS, config=config).values, values)
    with pytest.raises(BadImage, match=r"5 pages, but data\.page=5 counts from 0"):
        decode(data, max_pixels=MAX_PIXELS, config=PixelsConfig(page=5))


def test_bands_are_no_rgb() -> None:
    data = tiff(bands(13, "u2"), photometric="minisblack", planarconfig="contig")
    with pytest.raises(BadImage, match="13 channels, which are not red, green and blue"):
        decode(data, max_pixels=MAX_PIXELS)


@pytest.mark.parametrize("channels", [1, 4])
def test_an_evaluation_crop_is_of_each_channel_alone(channels: int) -> None:
    values = bands(channels)
    crop = eval_crop(values, size=32)
    assert crop.shape == (32, 32, channels)
    for i in range(channels):
        gray = eval_crop(np.repeat(values[..., i : i + 1], 3, axis=2), size=32)
        np.testing.assert_array_equal(crop[..., i], gray[..., 0])
