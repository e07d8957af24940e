"""Name the trouble of an image that could not be used: the same words for all images with the same trouble."""

import re
from typing import Any

from dinoray.pipeline.data.reading.fetched import Status

FIRST_CHECK = 1000
"""Images: before so many were seen, the share of bad ones says little."""

_KINDS = {
    Status.MISSING: "missing",
    Status.UNREACHABLE: "unreachable",
    Status.TOO_LARGE: "too many bytes",
    Status.DENIED: "refused",
    Status.ARCHIVED: "archived",
    Status.CORRUPT: "changed file or damaged shard",
}


def kind_of(status: Any, reason: Any) -> str:
    """Return a name for the trouble, without the image's name, size or bytes."""
    known = Status.__members__.get(str(status).upper())
    if known is None:
        return str(status)
    if known is not Status.CORRUPT:
        return _KINDS[known]
    if str(reason) in ("null", "0 bytes"):
        return "empty"
    # Those of BadImage begin with words and a colon; those of storage with an address.
    words = re.match(r"[A-Za-z][A-Za-z0-9 ]*(?=: )", str(reason))
    return words[0] if words else _KINDS[known]
