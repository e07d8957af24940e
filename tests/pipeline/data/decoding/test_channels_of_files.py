"""Pictures of 1 to 16 channels from TIFF, PNG and npy; near-infrared is no alpha, and pages may be channels."""

import io
from pathlib import Path

import numpy as np
import pytest
from image_files import MAX_PIXELS, encode, picture
from PIL import Image
from samples import write_all
from sources import fetch_all, source_of
from tars import tar_of

from dinoray.pipeline.data.config import PixelsConfig
from dinoray.pipeline.data.decoding.bad_image import BadImage
from dinoray.pipeline.data.decoding.decode import decode, eval_crop, read_samples
from dinoray.pipeline.data.decoding.signatures import content_of
from dinoray.pipeline.data.listing.ignored import Ignored, ignored_line
from dinoray.pipeline.data.reading.measuring import measure
from dinoray.pipeline.data.tar.tar_file import HeaderFile, TarFile
from dinoray.pipeline.data.tar.tar_index import TarImages, Wanted, index_tar

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


def test_an_array_in_the_order_of_fortran_is_read_and_a_gray_one_is_rgb() -> None:
    values = bands(3)
    np.testing.assert_array_equal(decode(npy(np.asfortranarray(values)), max_pixels=MAX_PIXELS), values)
    gray = decode(npy(values[..., 0].T), max_pixels=MAX_PIXELS)
    np.testing.assert_array_equal(gray, np.repeat(values[..., :1].swapaxes(0, 1), 3, axis=2))


@pytest.mark.parametrize(
    ("values", "what"),
    [
        (np.zeros((2, 3, 4, 5)), r"float64 \[2, 3, 4, 5\]"),
        (np.zeros((30, 40), complex), r"complex128 \[30, 40\]"),
        (np.zeros(7, "f4"), r"float32 \[7\]"),
        (np.zeros((20, 20, 20)), r"float64 \[20, 20, 20\]"),
    ],
)
def test_an_array_that_is_no_picture_is_refused_by_shape_and_type(values: np.ndarray, what: str) -> None:
    data = npy(values)
    with pytest.raises(BadImage, match=f"an array of {what} is no picture; save uint8, uint16 or float32"):
        read_samples(data, max_pixels=MAX_PIXELS)
    assert content_of(data[:128]) is None


def test_a_pickle_in_an_array_is_not_opened() -> None:
    file = io.BytesIO()
    np.save(file, np.array([None, "a"]), allow_pickle=True)
    with pytest.raises(BadImage, match="array of object"):
        read_samples(file.getvalue(), max_pixels=MAX_PIXELS)


def test_a_folder_of_arrays_is_listed_measured_and_read(tmp_path: Path) -> None:
    write_all(tmp_path, {f"{label}/{n}.npy": npy(bands(5, "u2") + n) for label in "ab" for n in range(6)})
    write_all(tmp_path, {"a/flat.npy": npy(np.zeros(9, "f4"))})
    source = source_of(str(tmp_path), channels=5, label_from_parent=True)
    assert (source.num_images, source.manifest.ignored) == (
        13,
        (),
    )  # the flat one is a bad image, by its name
    measured = measure(source)
    assert measured.mean is not None
    assert len(measured.mean) == 5
    config = source.config.model_copy(update=measured.settle(source.config))
    read = {one.key: one for one in fetch_all(source)}
    pixels = decode(read["b/0.npy"].data or b"", max_pixels=MAX_PIXELS, config=config)
    assert (pixels.shape, read["b/0.npy"].label) == ((37, 53, 5), "b")
    assert np.ptp(pixels) > 240


def test_arrays_beside_images_are_left_out_unless_they_are_asked_for(tmp_path: Path) -> None:
    images = {f"{n}.jpg": encode(Image.fromarray(picture()), "JPEG") for n in range(2)}
    write_all(tmp_path, images | {f"{n}.npy": npy(bands(1)) for n in range(3)} | {"x.npy": npy(np.zeros(2))})
    listed = source_of(str(tmp_path)).manifest
    assert (listed.num_images, listed.ignored) == (2, (Ignored(".npy", 4),))
    line = ignored_line(listed.ignored)
    assert line is not None
    assert line.startswith(
        "ignored: 4 .npy; .npy is read where it holds numbers [H,W] or [H,W,C], C at most 16"
    )
    assert source_of(str(tmp_path), include=("*.npy",)).num_images == 3


@pytest.mark.parametrize(("image", "names"), [("auto", ["a.jpg"]), ("npy", ["a.npy", "b.npy"])])
def test_arrays_in_a_tar_file_are_asked_for(image: str, names: list[str]) -> None:
    members = {"a.jpg": b"x", "a.npy": npy(bands(4)), "b.npy": npy(bands(4))}
    assert indexed_tar(tar_of(members), image).names.to_pylist() == names
    arrays = {name: data for name, data in members.items() if name != "a.jpg"}
    assert indexed_tar(tar_of(arrays), "auto").names.to_pylist() == ["a.npy", "b.npy"]


def indexed_tar(data: bytes, image: str) -> TarImages:
    file = HeaderFile(lambda first, stop: data[first:stop], len(data))
    return index_tar(TarFile(file, len(data), name="x.tar"), Wanted(image, None))


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
