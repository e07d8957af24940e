"""Open an image file with Pillow, and decode what OpenCV does not decode correctly.

For an animation the first frame is decoded. EXIF orientation is applied. 16-bit samples keep their high byte.
Pixels without a fixed range (float, 32-bit, Lab) are refused. Used by decode.py, and in the process that
decoder_process.py starts for files that may take long.
"""

import contextlib
import io

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from dinoray.models.errors import one_line
from dinoray.pipeline.data.bad_image import BadImage
from dinoray.pipeline.data.heif import register_heif

register_heif()
# Load all plugins now, because Pillow lists only loaded formats. An old Pillow has no AVIF.
Image.init()
_FORMATS = tuple(
    name
    for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "JPEG2000", "AVIF", "HEIF")
    if name in Image.OPEN
)
_MODES = {"1", "L", "P", "RGB", "CMYK", "YCbCr"}
_BACKGROUND = (255, 255, 255)


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


def decode_pillow(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Decode the first frame of an opened file into uint8 RGB [H,W,3], upright.

    Raises BadImage if its samples are not of 8 or 16 bits, and what Pillow raises if it is damaged.
    """
    image.load()
    # A damaged EXIF block does not mean damaged pixels: they are used as stored.
    with contextlib.suppress(Exception):
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        # Shifted here, because convert() clips 16-bit samples to white.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        image = Image.new("RGB", picture.size, _BACKGROUND)
        image.paste(picture, mask=picture.getchannel("A"))
    if image.mode not in _MODES:
        raise BadImage(f"not 8 or 16 bits a channel: Pillow mode {image.mode}")
    return np.array(image.convert("RGB"))
