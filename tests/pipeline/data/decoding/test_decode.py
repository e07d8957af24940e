"""Decoding: the upright RGB picture that people see, whatever the format; and the crop for evaluation."""

import cv2
import numpy as np
import pytest
from crops_oracle import drawn_pictures, photo_files
from image_files import FILES, MAX_PIXELS, encode, picture, pillow
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from dinoray.pipeline.data.decoding.decode import decode, eval_crop

ORIENTATION = 0x0112


# Pictures come out as people see them.


@pytest.mark.parametrize("name", FILES)
def test_every_format_decodes_as_pillow_shows_it(name: str) -> None:
    pixels = decode(FILES[name], max_pixels=MAX_PIXELS)
    assert pixels.shape == (40, 56, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    # The libraries convert CMYK with different rounding; all else is the same to the last level.
    assert np.abs(pixels.astype(int) - pillow(FILES[name])).max() <= (1 if "cmyk" in name else 0)


def test_channels_come_in_the_order_red_green_blue() -> None:
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    for image_format in ("PNG", "JPEG", "GIF"):
        assert decode(encode(red, image_format), max_pixels=64).mean(axis=(0, 1)).argmax() == 0


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_and_nonsense_ignored(image_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}.get(image_format, {})
    pixels = decode(encode(picture(), image_format, exif=exif, **options), max_pixels=MAX_PIXELS)
    turn = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
            6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}.get(orientation)  # fmt: skip
    upright = Image.fromarray(picture())
    if turn is not None:
        upright = upright.transpose(Image.Transpose[turn])
    assert pixels.shape == np.asarray(upright).shape
    # JPEG's own loss; the smallest for a wrong turn is above 20.
    assert np.abs(pixels.astype(int) - np.asarray(upright)).mean() < 4


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("block", [b"II*\0\xff\xff\xff\x7f" + b"\x99" * 40, b"nonsense", b""])
def test_a_damaged_exif_block_does_not_cost_the_picture(image_format: str, block: bytes) -> None:
    data = encode(picture(), image_format, exif=b"Exif\0\0" + block)
    assert decode(data, max_pixels=MAX_PIXELS).shape == (40, 56, 3)


@pytest.mark.parametrize("extension", [".png", ".tiff", ".jp2"])
def test_16_bit_gray_keeps_its_high_byte(extension: str) -> None:
    gray = (np.add.outer(np.arange(40), np.arange(56)) * 600).astype(np.uint16)
    pixels = decode(cv2.imencode(extension, gray)[1].tobytes(), max_pixels=MAX_PIXELS)
    np.testing.assert_array_equal(pixels, np.repeat((gray >> 8)[..., None], 3, axis=-1))


@pytest.mark.parametrize(("extension", "tolerance"), [(".png", 0), (".jp2", 1)])
def test_16_bit_colour_keeps_its_high_byte_or_rounds_to_it(extension: str, tolerance: int) -> None:
    gray = (np.add.outer(np.arange(40), np.arange(56)) * 600).astype(np.uint16)
    bgr = np.stack([gray, gray // 2, gray // 3], axis=-1)
    pixels = decode(cv2.imencode(extension, bgr)[1].tobytes(), max_pixels=MAX_PIXELS)
    assert np.abs(pixels.astype(int) - (bgr[..., ::-1] >> 8)).max() <= tolerance


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "WEBP"])
def test_transparency_is_laid_over_white(mode: str, image_format: str) -> None:
    image = Image.new(mode, (9, 8), (0,) * len(mode))  # black, and wholly transparent
    image.paste((100,) * (len(mode) - 1) + (255,), (0, 0, 3, 8))
    image.paste((0,) * (len(mode) - 1) + (128,), (3, 0, 6, 8))
    options = {"lossless": True, "exact": True} if image_format == "WEBP" else {}
    pixels = decode(encode(image, image_format, **options), max_pixels=MAX_PIXELS)
    assert pixels[:, :3].min() == pixels[:, :3].max() == 100
    assert pixels[:, 3:6].min() == pixels[:, 3:6].max() == 127
    assert pixels[:, 6:].min() == 255


def test_a_transparent_palette_entry_is_white() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.paste(0, (0, 0, 2, 4))
    for image_format in ("PNG", "GIF"):
        pixels = decode(encode(image, image_format, transparency=1), max_pixels=MAX_PIXELS)
        assert pixels[0, 0].tolist() == [10, 20, 30]
        assert pixels[0, 3].tolist() == [255, 255, 255]


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_colour_declared_transparent_is_white(mode: str) -> None:
    seen, unseen = ((10, 20, 30), (90, 90, 90)) if mode == "RGB" else (10, 90)
    image = Image.new(mode, (4, 4), unseen)
    image.paste(seen, (0, 0, 2, 4))
    pixels = decode(encode(image, "PNG", transparency=unseen), max_pixels=MAX_PIXELS)
    assert pixels[0, 0].tolist() == ([10, 20, 30] if mode == "RGB" else [10, 10, 10])
    assert pixels[0, 3].tolist() == [255, 255, 255]


@pytest.mark.parametrize("image_format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animation_gives_its_first_frame(image_format: str) -> None:
    frames = [Image.new("RGB", (12, 10), colour) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    options = {"lossless": True} if image_format == "WEBP" else {}
    data = encode(frames[0], image_format, save_all=True, append_images=frames[1:], **options)
    pixels = decode(data, max_pixels=MAX_PIXELS)
    assert pixels.shape == (10, 12, 3)
    assert pixels[5, 5].tolist() == [200, 0, 0]


def test_an_animated_png_gives_the_picture_that_viewers_without_animation_show() -> None:
    frames = [Image.new("RGB", (12, 10), colour) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    data = encode(frames[0], "PNG", save_all=True, append_images=frames[1:], default_image=True)
    assert decode(data, max_pixels=MAX_PIXELS)[5, 5].tolist() == [200, 0, 0]


def test_bytes_after_the_picture_are_ignored() -> None:
    first, second = FILES["jpeg"], encode(255 - picture(), "JPEG")
    alone = decode(first, max_pixels=MAX_PIXELS)
    np.testing.assert_array_equal(decode(first + b"\xa5" * 5000, max_pixels=MAX_PIXELS), alone)
    np.testing.assert_array_equal(decode(first + second, max_pixels=MAX_PIXELS), alone)


@pytest.mark.skipif(not photo_files(1), reason="needs ../shared/data/photos-small")
def test_photographs_decode_as_pillow_shows_them() -> None:
    for file in photo_files(40):
        np.testing.assert_array_equal(decode(file, max_pixels=MAX_PIXELS), pillow(file))


# Evaluation.


@pytest.mark.parametrize("size", [96, 224])
def test_the_evaluation_crop_is_torchvisions_resize_and_center_crop(size: int) -> None:
    reference = Compose([Resize(round(size * 256 / 224), InterpolationMode.BICUBIC), CenterCrop(size)])
    for image in drawn_pictures()[:4]:
        theirs = np.asarray(reference(Image.fromarray(image))).astype(int)
        assert np.abs(eval_crop(image, size=size).astype(int) - theirs).mean() < 0.05


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (20, 3000), (300, 301)])
def test_every_shape_has_an_evaluation_crop(shape: tuple[int, int]) -> None:
    crop = eval_crop(np.full((*shape, 3), 50, np.uint8), size=224)
    assert crop.shape == (224, 224, 3)
    assert crop.dtype == np.uint8
    assert (crop == 50).all()
