"""Image files opened by their header: the same pictures, and the same refusals, as decoding them whole."""

import numpy as np
import pytest
from crops_oracle import large_picture
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import FILES, MAX_PIXELS, encode, picture
from PIL import Image
from samples import hostile_entries, needs_hostile

from dinoray.pipeline.augment.config import CropsConfig
from dinoray.pipeline.augment.multicrop import apply, crop_rng, decode_for
from dinoray.pipeline.augment.params import sample
from dinoray.pipeline.data.decoding.bad_image import BadImage
from dinoray.pipeline.data.decoding.decode import decode
from dinoray.pipeline.data.decoding.jpeg import open_image

Pixels = np.ndarray
ORIENTATION = 0x0112


def with_exif(
    orientation: int | None, *, image: Pixels | None = None, image_format: str = "JPEG", **options
) -> bytes:
    """A small file whose EXIF block says an orientation, or something else."""
    exif = Image.Exif()
    exif[ORIENTATION if orientation is not None else 0x010F] = (
        "a camera" if orientation is None else orientation
    )
    return encode(picture() if image is None else image, image_format, exif=exif, **options)


def gray_16_bit_png() -> bytes:
    return encode(Image.fromarray((np.arange(40 * 56).reshape(40, 56) * 29).astype(np.uint16)), "PNG")


def palette_png_with_alpha() -> bytes:
    return encode(Image.fromarray(picture()).quantize(20), "PNG", transparency=bytes(range(0, 200, 10)))


JPEGS = {name: data for name, data in FILES.items() if name.endswith("jpeg")} | {
    "rgb jpeg": encode(picture(), "JPEG", keep_rgb=True),
    "4:4:4 jpeg": encode(picture(), "JPEG", subsampling=0),
    "4:2:2 jpeg": encode(picture(), "JPEG", subsampling=1),
    "jpeg with restarts": encode(picture(), "JPEG", restart_marker_blocks=2),
    "jpeg and garbage": FILES["jpeg"] + b"\xa5" * 5000,
    "two jpegs": FILES["jpeg"] + encode(255 - picture(), "JPEG"),
    "cut off jpeg": FILES["jpeg"][:-200],
    "cut off progressive jpeg": FILES["progressive jpeg"][:-200],
    "jpeg without its end": FILES["jpeg"][:-2],
    "jpeg with a comment": encode(picture(), "JPEG", comment=b"a" * 900),
    "mpo": encode(picture(), "MPO", save_all=True, append_images=[Image.fromarray(255 - picture())]),
    "exif without orientation": with_exif(None),
    "exif and xmp that says 6": with_exif(None, xmp=b'<x:xmpmeta tiff:Orientation="6"/>'),
    "xmp that says 6": encode(picture(), "JPEG", xmp=b'<x:xmpmeta tiff:Orientation="6"/>'),
    "nonsense for exif": encode(picture(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f" + b"\x99" * 40),
} | {f"orientation {o}": with_exif(o) for o in range(10)}  # fmt: skip

OTHERS = {name: data for name, data in FILES.items() if name not in JPEGS} | {
    "16-bit png": gray_16_bit_png(),
    "palette png with alpha": palette_png_with_alpha(),
    "cut off png": FILES["png"][:-300],
    "turned png": with_exif(6, image_format="PNG"),
    "turned webp": with_exif(6, image_format="WEBP", lossless=True),
    "nothing": b"",
    "start of a jpeg": b"\xff\xd8\xff",
    "text": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
}


def memory(num_bytes: int) -> Pixels:
    """More than is asked for, as the kernels have it."""
    return np.full(num_bytes + 100, 7, np.uint8)


def whole(data: bytes, **limits) -> Pixels | str:
    """The picture that `decode` gives, or why it gives none."""
    try:
        return decode(data, **{"max_pixels": MAX_PIXELS, **limits})
    except BadImage as error:
        return error.reason


def opened(data: bytes, **limits) -> Pixels | str:
    """The picture of an opened file, of the size that was announced; or why there is none."""
    try:
        image = open_image(data, **{"max_pixels": MAX_PIXELS, **limits})
        pixels, denominator, *shifts = image.decode(1, memory)
    except BadImage as error:
        return error.reason
    assert pixels.shape == (image.height, image.width, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert [denominator, *shifts] == [1, 0, 0]
    return pixels


def assert_same(ours: Pixels | str, theirs: Pixels | str) -> None:
    assert isinstance(ours, str) == isinstance(theirs, str), (ours, theirs)
    if isinstance(ours, str):
        assert "\n" not in ours
    else:
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", [*JPEGS, *OTHERS])
def test_an_opened_file_is_the_picture_that_decoding_gives_or_refused_for_the_same_reason(name: str) -> None:
    data = (JPEGS | OTHERS)[name]
    ours, theirs = opened(data), whole(data)
    assert_same(ours, theirs)
    if isinstance(ours, str):
        assert ours == theirs


def test_jpegs_are_opened_by_their_header_and_all_else_decoded() -> None:
    in_full = {
        name
        for name, data in (JPEGS | FILES).items()
        if open_image(data, max_pixels=MAX_PIXELS).pixels is not None
    }
    assert in_full == {*FILES} - {*JPEGS} | {"cmyk jpeg", "rgb jpeg"}


@needs_hostile
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_hostile_files_are_refused_exactly_when_decoding_refuses_them() -> None:
    refused = 0
    for entry in hostile_entries():
        theirs = whole(entry.data)
        assert_same(opened(entry.data), theirs)
        refused += isinstance(theirs, str)
    assert refused > 10


@pytest.mark.parametrize("limits", [{"max_pixels": 40 * 56 - 1}, {"min_side": 41}])
@pytest.mark.parametrize("name", ["jpeg", "png", "orientation 6"])
def test_pictures_of_too_many_pixels_or_too_few_are_refused_by_their_header(name: str, limits: dict) -> None:
    data = (JPEGS | FILES)[name]
    assert opened(data, **limits).startswith(("too large", "too small"))
    assert opened(data, **limits) == whole(data, **limits)


@settings(max_examples=400)
@given(data=st.data(), name=st.sampled_from([name for name in JPEGS if "two" not in name]))
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_damaged_jpegs_are_refused_or_the_same_picture_and_raise_nothing_else(
    data: st.DataObject, name: str
) -> None:
    damaged = bytearray(JPEGS[name])
    # Half of the damage to the header, EXIF included: most of what follows is entropy-coded, where all is alike.
    reach = data.draw(st.sampled_from([200, 700, len(damaged)]))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(reach, len(damaged)) - 1))
        byte = data.draw(st.sampled_from([0, 1, 6, 8, 0xFF, 0xD8, 0xD9, 0xDA, 0xE1]) | st.integers(0, 255))
        kind = data.draw(st.sampled_from(["change", "change", "insert", "delete"]))
        damaged[at : at + (kind != "insert")] = b"" if kind == "delete" else bytes([byte])
    assert_same(opened(bytes(damaged), max_pixels=1_000_000), whole(bytes(damaged), max_pixels=1_000_000))


@settings(max_examples=100)
@given(name=st.sampled_from([*JPEGS]), share=st.floats(0, 1), tail=st.binary(max_size=30))
def test_jpegs_cut_off_anywhere_are_refused_or_whole(name: str, share: float, tail: bytes) -> None:
    data = JPEGS[name][: int(share * len(JPEGS[name]))] + tail
    assert_same(opened(data, max_pixels=1_000_000), whole(data, max_pixels=1_000_000))


@pytest.mark.parametrize("denominator", [2, 4, 8])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_reduced_picture_says_where_the_whole_ones_pixels_lie(denominator: int, orientation: int) -> None:
    y, x = np.mgrid[:37, :51]
    slopes = np.stack([4 * x, 6 * y, 60 + 2 * x + 2 * y], axis=-1).astype(np.uint8)
    data = with_exif(orientation, image=slopes, quality=97, subsampling=0)
    image = open_image(data, max_pixels=MAX_PIXELS)
    full = image.decode(1, memory).pixels.astype(float)
    pixels, said, left_shift, top_shift = image.decode(denominator, memory)
    height, width = pixels.shape[:2]
    assert said == denominator
    assert (height, width) == (-(-image.height // denominator), -(-image.width // denominator))
    errors = []
    for y in range(1, height - 1):
        for x in range(1, width - 1):
            top, left = (y - top_shift) * denominator, (x - left_shift) * denominator
            assert (top, left) == (int(top), int(left))
            block = full[int(top) : int(top) + denominator, int(left) : int(left) + denominator]
            errors.append(np.abs(block.mean(axis=(0, 1)) - pixels[y, x]).mean())
    assert np.mean(errors) < 0.8  # a pixel further is 2 to 6 levels


def test_what_is_no_jpeg_is_decoded_whole_whatever_is_asked_for() -> None:
    image = open_image(FILES["png"], max_pixels=MAX_PIXELS)
    pixels, denominator, *shifts = image.decode(4, memory)
    assert [denominator, *shifts] == [1, 0, 0]
    np.testing.assert_array_equal(pixels, picture())


def test_a_jpeg_that_only_opencv_takes_is_decoded_whole() -> None:
    # Extra bytes behind the pixels: simplejpeg holds this for damage, the others pass over it.
    odd = JPEGS["jpeg"][:-2] + b"\x11" * 20 + JPEGS["jpeg"][-2:]
    image = open_image(odd, max_pixels=MAX_PIXELS)
    assert image.pixels is None
    pixels, denominator, *_ = image.decode(2, memory)
    assert (pixels.shape, denominator) == ((40, 56, 3), 1)


def test_parameters_of_an_image_of_another_size_are_an_error() -> None:
    params = sample(crop_rng(0, 0, "a"), 40, 56, CropsConfig())
    with pytest.raises(ValueError, match="params are for an image of 40x56 pixels, not 56x40"):
        decode_for(params, open_image(FILES["jpeg"], max_pixels=MAX_PIXELS))


def test_a_file_that_decodes_to_another_size_than_it_announced_is_refused() -> None:
    # The kernels read where the announced size leads them.
    image = open_image(FILES["png"], max_pixels=MAX_PIXELS)._replace(width=40, height=56, pixels=None)
    with pytest.raises(BadImage, match="40x56 pixels announced, 56x40 decoded"):
        image.decode(1, memory)


@pytest.mark.parametrize("kernel", ["numba", "torch"])
def test_a_file_and_the_file_opened_have_the_same_crops(kernel: str) -> None:
    data = encode(large_picture(1003, 749), "JPEG")
    params = sample(crop_rng(0, 0, "a"), 1003, 749, CropsConfig(kernel=kernel, local_crop_size=32))
    first, second = apply(data, params), apply(open_image(data, max_pixels=MAX_PIXELS), params)
    np.testing.assert_array_equal(first.global_crops, second.global_crops)
    np.testing.assert_array_equal(first.local_crops, second.local_crops)
