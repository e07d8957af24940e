"""What ends a refusal by the store: one table, by its error code, its message and the request.

Used by retry.py, which tells refusals from failures that may pass. A request was anonymous or not, and paid for by its
sender or not: the same answer then has another remedy. No client, no requests and no Ray here.
"""

import re

from dinoray.pipeline.storage.config import SIGNED, Access

SET_CREDENTIALS = "set AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the node a role"
OR_ANONYMOUS = ", or set storage.anonymous=true if only images in a public bucket are read with them"
ACCESS = "Access"
"""Where an answer of botocore holds the access of its request; s3.py puts it there."""

_CHECK_KEYS = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_PROFILE"
_RENEW = "renew the credentials (for SSO: aws sso login)"
_CHECK_REGION = "set AWS_REGION to the bucket's region"
_OF_CODES = {  # of answers that concern the whole store
    "NoSuchBucket": "check the bucket's name and AWS_ENDPOINT_URL",
    "InvalidBucketName": "check the bucket's name",
    "InvalidAccessKeyId": _CHECK_KEYS,
    "SignatureDoesNotMatch": _CHECK_KEYS,
    "InvalidToken": _CHECK_KEYS,
    "ExpiredToken": _RENEW,
    "ExpiredTokenException": _RENEW,
    "TokenRefreshRequired": _RENEW,
    "RequestExpired": "set this machine's clock",
    "RequestTimeTooSkewed": "set this machine's clock",
    "PermanentRedirect": _CHECK_REGION,
    "AuthorizationHeaderMalformed": _CHECK_REGION,
}

_READS = frozenset({"GetObject", "HeadObject", "ListObjectsV2", "HeadBucket"})
_CHECKSUM = re.compile(r"checksum|trailer|content-sha256|x-amz-sdk|aws-chunked", re.IGNORECASE)
_PAYER = re.compile(r"request.?payer|requester.?pays", re.IGNORECASE)
_NO_CHECKSUMS_SENT = (
    "set AWS_REQUEST_CHECKSUM_CALCULATION=when_required: this store knows no checksums of uploads"
)
_NO_CHECKSUMS_ASKED = "set AWS_RESPONSE_CHECKSUM_VALIDATION=when_required: this store sends no checksums"
_NOT_IMPLEMENTED = "the store lacks what was asked for, most often checksums:"
_MAY_WRITE = "allow s3:PutObject and s3:DeleteObject to these credentials, or choose another folder"
_MAY_READ = "allow s3:ListBucket and s3:GetObject (and s3:PutObject for a run directory) to these credentials"
_PAY = "set storage.requester_pays=true: the bucket's owner lets the requester pay"
_IF_PUBLIC = "of images, storage.anonymous=true reads a public bucket"
_IF_PAID = "storage.requester_pays=true one whose owner lets the requester pay"
_SIGN = f"set storage.anonymous=false, because this is not public, and {SET_CREDENTIALS}"


def store_remedy(code: str, status: int, message: str, operation: str) -> str | None:
    """Return the remedy of an answer that would be the same for all objects; None for any other answer."""
    if code in _OF_CODES:
        return _OF_CODES[code]
    is_of_checksums = code == "XAmzContentSHA256Mismatch" or _CHECKSUM.search(message) is not None
    if status != 501 and not (status in (400, 411) and is_of_checksums):
        return None
    remedy = _NO_CHECKSUMS_ASKED if operation in _READS else _NO_CHECKSUMS_SENT
    return remedy if is_of_checksums else f"{_NOT_IMPLEMENTED} {remedy}"


def refusal_remedy(status: int, message: str, operation: str, access: Access = SIGNED) -> str:
    """Return the remedy where the store refuses one object."""
    if status not in (401, 403):
        return "check the path and AWS_ENDPOINT_URL"
    if operation not in _READS:
        return _MAY_WRITE
    if access.anonymous:
        return _SIGN
    if access.requester_pays:
        return _MAY_READ
    return _PAY if _PAYER.search(message) else f"{_MAY_READ}; {_IF_PUBLIC}, {_IF_PAID}"
