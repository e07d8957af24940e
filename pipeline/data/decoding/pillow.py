"""Open an image file with Pillow, and decode with Pillow what no other decoder here decodes correctly.

For an animation the first frame is decoded. Used by decode.py, and in the process that decoder_process.py starts for
files that may take long.
"""

import io
import logging
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dinoray.models.errors import one_line
from dinoray.pipeline.data.decoding.bad_image import BadImage
from dinoray.pipeline.data.decoding.heif import register_heif
from dinoray.pipeline.data.decoding.samples import Samples

register_heif()
# Load all plugins now, because Pillow lists only loaded formats. An old Pillow has no AVIF.
Image.init()
_FORMATS = tuple(
    name
    for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "JPEG2000", "AVIF", "HEIF")
    if name in Image.OPEN
)
_COLOURS = {"P", "RGB", "CMYK", "YCbCr", "RGBX"}
_GRAYS = {"1", "L"}
# A file that can be used needs no warning, and one that cannot is named with its reason.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


def open_pillow(data: bytes) -> Image.Image:
    """Read the header of an image file. Raises BadImage if there is none, or if it claims too many pixels."""
    if not data:
        raise BadImage("empty: 0 bytes")
    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage(f"too large: {one_line(error)}") from error
    except Image.UnidentifiedImageError as error:
        raise BadImage(f"not an image: starts with {data[:8]!r}") from error
    except Exception as error:  # any parser may raise any exception
        raise BadImage(f"damaged header: {one_line(error)}") from error


def decode_pillow(image: Image.Image) -> Samples:
    """Decode the first frame of an opened file, as it is stored; only a TIFF comes upright.

    Raises BadImage if its samples are neither gray nor colours, and what Pillow raises if it is damaged.
    """
    image.load()
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return Samples(_deep(image)[..., None], 1)
    if image.mode in ("LA", "La"):
        return Samples(np.array(image.convert("LA")), 1, has_alpha=True)
    if image.has_transparency_data:
        pixels = np.array(image.convert("RGBA"))
        # Programs that know no transparency leave the fourth byte of a BMP's pixels 0.
        if image.format != "BMP" or pixels[..., 3].any():
            return Samples(pixels, 3, has_alpha=True)
        return Samples(np.ascontiguousarray(pixels[..., :3]), 3)
    if image.mode in _GRAYS:
        return Samples(np.array(image.convert("L"))[..., None], 1)
    if image.mode not in _COLOURS:
        raise BadImage(f"neither gray nor colours: Pillow mode {image.mode}")
    return Samples(np.array(image.convert("RGB")), 3)


def _deep(image: Image.Image) -> npt.NDArray[Any]:
    values = np.array(image)
    # Pillow stretches the samples of a PGM to 16 bits, and holds them in 32.
    return values.astype(np.uint16) if image.format == "PPM" and image.mode == "I" else values
