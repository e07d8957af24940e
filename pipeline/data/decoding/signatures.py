"""The first bytes of files: which are images that can be decoded, which are Parquet or tar. Pure functions."""

import re
from typing import Literal

from dinoray.pipeline.data.decoding.heif import HEIF_IS_READ
from dinoray.pipeline.data.decoding.npy import begins_picture, is_npy

Content = Literal["image", "parquet", "tar"]

HEAD_BYTES = 265
"""Bytes of a file that suffice: the mark of a tar file lies behind its first name."""
_IMAGE = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF.{4}WEBP|BM.{4}\0{4}|II\*\0|MM\0\*|II\+\0|MM\0\+"
    rb"|\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n|P[1-7][ \t\r\n#]|.{4}ftypavi[fs]",
    re.DOTALL,
)
_HEIF = re.compile(rb".{4}ftyp(?:hei[cxms]|hevc|mif1|msf1)", re.DOTALL)
_TAR_MARK = 257


def content_of(head: bytes) -> Content | None:
    """Return what begins with these bytes (HEAD_BYTES suffice): an image that can be read, Parquet, tar, or neither.

    An array of numpy is an image if its shape and type are those of one.
    """
    if head.startswith(b"PAR1"):
        return "parquet"
    if is_npy(head):
        return "image" if begins_picture(head) else None
    if _IMAGE.match(head) or (HEIF_IS_READ and _HEIF.match(head)):
        return "image"
    return "tar" if head.startswith(b"ustar", _TAR_MARK) else None


def begins_as_an_image(head: bytes) -> bool:
    """Return True for an image, also for HEIC where it cannot be read."""
    return content_of(head) == "image" or _HEIF.match(head) is not None
