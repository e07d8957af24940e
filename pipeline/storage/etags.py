"""Tell an object that was overwritten from one of a store whose ETags differ between reads and listings.

Some gateways to other storage make up ETags, or hand on those of parts. There an ETag says nothing of an object. Knows
requests, not images.
"""

import logging
from typing import Any

import botocore.exceptions

from dinoray.pipeline.storage import pages
from dinoray.pipeline.storage.retry import code_and_status

logger = logging.getLogger(__name__)

_other_etags: set[str] = set()
"""Addresses of buckets whose reads are known to have other ETags than their listings."""


def is_listed_so(client: Any, bucket: str, key: str, etag: str) -> bool:
    """Return True if a listing still has the object with this ETag, although a read of it has another.

    One request for each object that was overwritten, one in all for a store that is so. Raises botocore's errors.
    """
    place = f"{client.meta.endpoint_url}/{bucket}"
    if place in _other_etags:
        return True
    try:
        page = pages.request_page(client.list_objects_v2, Bucket=bucket, Prefix=key, MaxKeys=1)
    except botocore.exceptions.ClientError as error:
        if code_and_status(error)[1] == 403:  # who may read need not be allowed to list
            return False
        raise
    if (key, etag) not in zip(page.objects.keys, page.objects.etags, strict=True):
        return False
    if place not in _other_etags:
        _other_etags.add(place)
        logger.warning(
            "s3://%s: reads have other ETags than listings, so objects that are overwritten are not noticed",
            bucket,
        )
    return True
