"""Decode an image file's bytes to uint8 pixels, or raise BadImage with a reason; never half a picture.

Stands between the source, whose bytes may be anything, and augment/multicrop.py, which takes any picture. The
header is read first, so a file that claims too many pixels costs nothing. The decoder is chosen by content,
never by file name, and there is one rule for all who decode:

    turbo     JPEG in gray or YCbCr without a flaw
    OpenCV    PNG and WebP without transparency, PNG of 16 bits
    tiff.py   TIFF of more than 8 bits, of bands, or with channels beside gray or RGB; pages as channels
    npy.py    arrays of numpy
    netpbm.py PGM, PPM and PAM
    Pillow    the rest, and a second chance where the others refuse

None of them turns a picture: orientation.py does, for all. Only Pillow turns a TIFF itself.

No files, no storage and no Ray here.
"""

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from dinoray.models.errors import ResourceError, one_line
from dinoray.pipeline.data.config import PixelsConfig
from dinoray.pipeline.data.decoding.bad_image import BadImage
from dinoray.pipeline.data.decoding.decoder_process import decode_apart
from dinoray.pipeline.data.decoding.jpeg_segments import check_scans
from dinoray.pipeline.data.decoding.netpbm import decode_netpbm, decode_pam, is_deep_pam, is_pam
from dinoray.pipeline.data.decoding.npy import is_deep_npy, is_npy, open_npy
from dinoray.pipeline.data.decoding.orientation import (
    orientation_in,
    orientation_of,
    orientation_of_jpeg,
    turn_upright,
    valid_orientation,
)
from dinoray.pipeline.data.decoding.pillow import decode_pillow, open_pillow
from dinoray.pipeline.data.decoding.png_chunks import (
    bare_png,
    has_alpha_and_gray,
    is_16_bit,
    transparent_gray,
)
from dinoray.pipeline.data.decoding.samples import Samples, to_pixels
from dinoray.pipeline.data.decoding.tiff import (
    MAX_CHANNELS,
    decode_page,
    is_pillows,
    is_readable,
    is_subsampled,
    not_read,
)
from dinoray.pipeline.data.decoding.tiff_pages import Page, is_tiff, read_pages
from dinoray.pipeline.data.decoding.turbo import decode_turbo, turbo_size

_OPENCV_MODES = {"1", "L", "RGB"}
_JPEG_IN_TIFF = {"jpeg", "tiff_jpeg"}
_DEFAULTS = PixelsConfig()
# A file that can be used needs no warning, and one that cannot is named with its reason.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def decode(
    data: bytes, *, max_pixels: int, min_side: int = 1, config: PixelsConfig = _DEFAULTS
) -> npt.NDArray[np.uint8]:
    """Decode an image file into uint8 [H,W,`config.channels`], C-contiguous and upright; three channels are RGB.

    `config` decides what becomes of samples of more than 8 bits. Raises BadImage for anything that is not a whole
    image of at most `max_pixels` pixels whose shorter side has at least `min_side`. Files of more than about 179
    megapixels are refused whatever `max_pixels` is. Raises ResourceError if the machine cannot start a process for
    a file that needs one.
    """
    size = turbo_size(data) if config.channels == 3 else None
    if size is not None:
        check_jpeg(data, size, max_pixels=max_pixels, min_side=min_side)
        pixels = decode_turbo(data, *size, 1, lambda num_bytes: np.empty(num_bytes, np.uint8))
        if pixels is not None:
            return turn_upright(pixels, orientation_of_jpeg(data))
    return to_pixels(read_samples(data, max_pixels=max_pixels, min_side=min_side, config=config), config)


def read_samples(
    data: bytes, *, max_pixels: int, min_side: int = 1, config: PixelsConfig = _DEFAULTS
) -> Samples:
    """Decode an image file into its samples of whatever depth and channels, upright. Raises as `decode` does."""
    if (samples := open_array(data)) is not None:
        check_size(samples.values.shape[1], samples.values.shape[0], max_pixels=max_pixels, min_side=min_side)
        return samples
    if is_tiff(data):
        pages = _chosen(read_pages(data), config)
        if config.page != 0 or not is_pillows(pages[0]) or (config.channels != 3 and is_readable(pages[0])):
            return _joined([_decode_tiff(data, page, max_pixels, min_side) for page in pages])
        header = _open_tiff(data, pages[0])
    else:
        header = open_pillow(data)
    width, height = header.size
    check_size(width, height, max_pixels=max_pixels, min_side=min_side)
    if header.format in ("JPEG", "MPO"):
        check_scans(data, width, height)
    if header.format == "JPEG2000" and _stops_between_tiles(data):
        raise BadImage("cut off JPEG2000: no end of codestream")
    orientation = 1 if header.format == "TIFF" else orientation_of(data, header)
    try:
        samples = _decode_opened(data, header)
    except (BadImage, ResourceError):
        raise
    # Arbitrary bytes reach a dozen parsers here, and each parser has its own exceptions.
    except Exception as error:
        raise BadImage(f"damaged or cut off {header.format}: {one_line(error)}") from error
    shape = samples.values.shape[:2]
    if shape != (height, width) and not (header.format == "TIFF" and shape == (width, height)):
        raise BadImage(f"damaged {header.format}: {width}x{height} pixels announced, {shape} decoded")
    return _upright(samples, orientation)


def open_array(data: bytes) -> Samples | None:
    """Return the samples of a file that holds them as they are, NPY or PAM; None for others. Raises BadImage."""
    if is_npy(data):
        return open_npy(data)
    return decode_pam(data) if is_pam(data) else None


def is_deep(data: bytes) -> bool:
    """Return True if the header of a file says that its samples may have more than 8 bits. Decodes nothing."""
    if data[:2] == b"\xff\xd8":
        return False
    try:
        if is_npy(data):
            return is_deep_npy(data)
        if is_pam(data):
            return is_deep_pam(data)
        if is_tiff(data):
            return read_pages(data)[0].bits > 8
        header = open_pillow(data)
    except BadImage:
        return False
    # Pillow's mode of a PNG in colours is that of 8 bits.
    return (header.format == "PNG" and is_16_bit(data)) or header.mode.startswith(("I", "F"))


def check_size(width: int, height: int, *, max_pixels: int, min_side: int) -> None:
    """Raise BadImage if a picture has more than `max_pixels` pixels or a side shorter than `min_side`."""
    if width * height > max_pixels:
        raise BadImage(f"too large: {width}x{height} pixels, max_pixels={max_pixels}")
    if min(width, height) < min_side:
        raise BadImage(f"too small: {width}x{height} pixels, min_side={min_side}")


def check_jpeg(data: bytes, size: tuple[int, int], *, max_pixels: int, min_side: int) -> None:
    """Raise BadImage if a JPEG of (width, height) is too large, too small, or has too many scans."""
    check_size(*size, max_pixels=max_pixels, min_side=min_side)
    check_scans(data, *size)


def eval_crop(
    image: npt.NDArray[np.uint8],
    *,
    size: int,
    short: int | None = None,
    resampling: Image.Resampling = Image.Resampling.BICUBIC,
) -> npt.NDArray[np.uint8]:
    """Return the centre crop of an image (uint8 [H,W,C]) for evaluation: uint8 [size,size,C].

    The shorter side is resized to `short` (antialiased), None: DINO's size * 256 / 224; then the central square is cut.
    """
    height, width = image.shape[:2]
    short = short or round(size * 256 / 224)
    new_width, new_height = (
        (short, short * height // width) if width <= height else (short * width // height, short)
    )
    left, top = round((new_width - size) / 2), round((new_height - size) / 2)
    x_scale, y_scale = width / new_width, height / new_height
    # Only the square is computed: a whole 1 x 5000 image would become 256 x 1,280,000 pixels.
    box = (left * x_scale, top * y_scale, (left + size) * x_scale, (top + size) * y_scale)

    def crop(samples: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        return np.array(Image.fromarray(samples).resize((size, size), resampling, box=box))

    num_channels = image.shape[2]
    return crop(image) if num_channels == 3 else np.dstack([crop(image[..., i]) for i in range(num_channels)])


def _decode_opened(data: bytes, header: Image.Image) -> Samples:
    samples = _decode_opencv(data, header)
    if samples is None and header.format == "PPM":
        samples = decode_netpbm(data)
    if samples is not None:
        return samples
    return decode_apart(data) if _may_be_slow(header) else decode_pillow(header)


def _decode_tiff(data: bytes, page: Page, max_pixels: int, min_side: int) -> Samples:
    check_size(page.width, page.height, max_pixels=max_pixels, min_side=min_side)
    try:
        samples = decode_page(data, page)
    except BadImage:
        raise
    except Exception as error:  # of numpy, on tags that contradict one another
        raise BadImage(f"damaged TIFF: {one_line(error)}") from error
    return _upright(
        samples, valid_orientation(page.orientation) if page.orientation else orientation_in(None, page.xmp)
    )


def _open_tiff(data: bytes, page: Page) -> Image.Image:
    if is_subsampled(page):  # Pillow takes it for cut off
        raise BadImage(not_read(page))
    try:
        header = open_pillow(data)
    except BadImage as error:
        if isinstance(error.__cause__, UnidentifiedImageError):
            raise BadImage(not_read(page)) from error
        raise
    if header.mode == "LAB":
        raise BadImage(not_read(page))
    return header


def _chosen(pages: list[Page], config: PixelsConfig) -> list[Page]:
    if config.page == "channels":
        if len(pages) > MAX_CHANNELS:
            raise BadImage(f"{len(pages)} pages, of which at most {MAX_CHANNELS} can be channels")
        return pages
    if config.page >= len(pages):
        raise BadImage(f"{len(pages)} pages, but data.page={config.page} counts from 0")
    return [pages[config.page]]


def _joined(pages: list[Samples]) -> Samples:
    """Return pages as the channels of one picture."""
    if len(pages) == 1:
        return pages[0]
    if len({(page.values.shape[:2], page.values.dtype) for page in pages}) > 1:
        raise BadImage("its pages differ in size or type, so they cannot be channels of one picture")
    values = np.concatenate([page.values for page in pages], axis=2)
    return Samples(values, values.shape[2], is_inverted=pages[0].is_inverted)


def _upright(samples: Samples, orientation: int) -> Samples:
    return samples._replace(values=turn_upright(samples.values, orientation))


def _decode_opencv(data: bytes, header: Image.Image) -> Samples | None:
    """Decode a file that OpenCV decodes correctly, as stored; None for others, and for those that it refuses."""
    if header.format == "PNG" and (is_16_bit(data) or _is_plain(header) or header.mode in ("1", "L")):
        bare = bare_png(data)
        if bare is None:
            return None
        if is_16_bit(data):
            samples = _deep_png(bare)
        else:
            samples = _read(bare, cv2.IMREAD_COLOR_RGB if header.mode == "RGB" else cv2.IMREAD_GRAYSCALE)
        level = transparent_gray(data)
        return samples if samples is None or level is None else _with_transparent(samples, level)
    if header.format == "WEBP" and _is_plain(header):
        return _read(data, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    return None


def _is_plain(header: Image.Image) -> bool:
    return header.mode in _OPENCV_MODES and not header.has_transparency_data


def _read(data: bytes, flags: int) -> Samples | None:
    pixels: npt.NDArray[Any] | None = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if pixels is None:
        return None
    return Samples(pixels[..., None], 1) if pixels.ndim == 2 else Samples(pixels, 3)


def _deep_png(data: bytes) -> Samples | None:
    """Decode a PNG of 16 bits, of which Pillow keeps 8 if it has colours."""
    samples = _read(data, cv2.IMREAD_UNCHANGED)
    if samples is None or samples.num_colours == 1:
        return samples
    if samples.values.shape[2] == 3:
        return Samples(cv2.cvtColor(samples.values, cv2.COLOR_BGR2RGB), 3)
    values = cv2.cvtColor(samples.values, cv2.COLOR_BGRA2RGBA)
    if has_alpha_and_gray(data):
        return Samples(np.ascontiguousarray(values[..., [0, 3]]), 1, has_alpha=True)
    return Samples(values, 3, has_alpha=True)


def _with_transparent(gray: Samples, level: int) -> Samples:
    """Return a gray picture with the alpha that its transparent level means."""
    full = np.iinfo(gray.values.dtype).max
    alpha = np.where(gray.values == level, 0, full).astype(gray.values.dtype)
    return Samples(np.concatenate([gray.values, alpha], axis=2), 1, has_alpha=True)


def _may_be_slow(header: Image.Image) -> bool:
    """Return True if the time for such a file is not bounded by its number of pixels.

    The coded bits of JPEG 2000 and AVIF decide it, and the scans of a JPEG inside a TIFF.
    """
    return header.format in ("JPEG2000", "AVIF") or (
        header.format == "TIFF" and header.info.get("compression") in _JPEG_IN_TIFF
    )


def _stops_between_tiles(data: bytes) -> bool:
    """Return True if a JPEG 2000 file has no end marker.

    Its decoder would return a picture with black tiles.
    """
    # Tile data contain no FF followed by more than 8F: after the last tile start, FF D9 can only be the end.
    return not 0 <= data.rfind(b"\xff\x90") < data.rfind(b"\xff\xd9")
