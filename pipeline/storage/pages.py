"""One page of a listing of S3: its request, and a quick reading of the answer.

botocore takes 90 ms of a core for the XML of 1,000 keys, which would be the rate of a listing however many requests
were under way. So the objects are read from the answer, and removed from it, before botocore sees it: all else
(errors, retries, a damaged answer) stays as botocore has it. No client and no threads here.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import unquote_plus

import pyarrow as pa

EVENT = "before-parse.*.ListObjectsV2"
"""botocore's event that `take_objects` handles.

By this name it is called before the handlers of "before-parse.s3.*", one of which parses the whole body to look for an
error in it.
"""
_OBJECTS = "Objects"

Request = Callable[..., dict[str, Any]]
"""A client's list_objects_v2."""


class Objects(NamedTuple):
    """Listed objects in the store's order: keys, sizes in bytes, ETags without quotes, storage classes.

    The lists are equally long.
    """

    keys: list[str]
    sizes: list[int]
    etags: list[str]
    classes: list[str | None]
    """None for the class that a store keeps objects in unless it is told otherwise."""

    def cut(self, place: int) -> tuple["Objects", "Objects"]:
        """Return the first `place` objects and the others."""
        first, others = ((column[:place] for column in self), (column[place:] for column in self))
        return Objects._make(first), Objects._make(others)

    def to_arrow(self) -> pa.RecordBatch:
        """Return the columns of LISTED."""
        return pa.record_batch(
            [pa.array(column, field.type) for column, field in zip(self, LISTED, strict=True)], LISTED
        )


class Page(NamedTuple):
    """The objects of one answer, its common prefixes, and the token that the next page is asked for with."""

    objects: Objects
    folders: list[str]
    token: str | None
    """None on the last page."""


LISTED = pa.schema(
    {"key": pa.large_string(), "size": pa.int64(), "etag": pa.string(), "storage_class": pa.string()}
)
"""Objects in Arrow."""


def etag_text(etag: str) -> str:
    """Return an ETag without its quotes or a proxy's mark of weakness."""
    return etag.removeprefix("W/").strip('"')


def request_page(request: Request, **parameters: str | int | None) -> Page:
    """Make one request; parameters that are None are left out. Raises botocore's errors."""
    answer = request(**{name: value for name, value in parameters.items() if value is not None})
    objects = answer.get(_OBJECTS)
    if objects is None:
        items = answer.get("Contents", [])
        etags = [etag_text(str(item.get("ETag", ""))) for item in items]
        classes = [_class(item.get("StorageClass")) for item in items]
        objects = Objects([item["Key"] for item in items], [item["Size"] for item in items], etags, classes)
    folders = [entry["Prefix"] for entry in answer.get("CommonPrefixes", [])]
    return Page(objects, folders, answer["NextContinuationToken"] if answer.get("IsTruncated") else None)


def take_objects(
    response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: object
) -> None:
    """Move the objects from the body of an answer to its parsed form, as `Objects`.

    An answer that is an error, is damaged, or looks unusual is left to botocore.
    """
    if response_dict["status_code"] >= 300:
        return
    try:
        text = response_dict["body"].decode()
        found = _OBJECT.findall(text)
        rest = _OBJECT.sub("", text)
        objects = _objects(found, is_quoted="<EncodingType>url</EncodingType>" in rest)
    except ValueError:
        return
    if "<Contents" in rest:
        return
    response_dict["body"] = rest.encode()
    customized_response_dict[_OBJECTS] = objects


_TEXT = r"[^<>&\r\x00-\x08\x0b\x0c\x0e-\x1f]*"
"""What XML hands on as it stands."""
_ETAG = r"(?:&quot;|[^<>&\s\x00-\x1f])*"
_OTHERS = "LastModified|ChecksumAlgorithm|ChecksumType|ID|DisplayName"
_OBJECT = re.compile(
    rf"<Contents>(?:<Key>({_TEXT})</Key>|<Size>([0-9]+)</Size>|<ETag>({_ETAG})</ETag>|<StorageClass>({_TEXT})</StorageClass>"
    rf"|<({_OTHERS})>{_TEXT}</\5>|</?Owner>|<Owner ?/>|\s+)*</Contents>"
)
"""An object as stores write it: no attributes, comments, or entities but the quotes of an ETag."""


def _objects(found: list[tuple[str, ...]], *, is_quoted: bool) -> Objects:
    """Return what was found by _OBJECT. Raises ValueError if an object has no key or no size."""
    keys = [key for key, *_ in found]
    if "" in keys:
        raise ValueError("an object without a key")
    if is_quoted:
        keys = [unquote_plus(key) if "%" in key or "+" in key else key for key in keys]
    etags = [etag_text(etag.replace("&quot;", '"')) for _, _, etag, *_ in found]
    classes = [_class(name) for _, _, _, name, *_ in found]
    return Objects(keys, [int(size) for _, size, *_ in found], etags, classes)


def _class(name: str | None) -> str | None:
    return None if name in ("", "STANDARD") else name
