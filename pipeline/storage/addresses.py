"""Addresses of folders and objects: a local path or `s3://bucket/prefix`.

Nothing is opened here, and no client imported: settings and the training step need neither botocore nor pyarrow.
"""

import os

from dinoray.models.errors import ConfigError, redact_credentials
from dinoray.pipeline.storage.remedies import SET_CREDENTIALS


def is_s3(uri: str) -> bool:
    """Return True for an `s3://` address, False for a local path. Raises ConfigError for any other scheme."""
    scheme, separator, _ = uri.partition("://")
    if not separator or not scheme.isalnum():
        return False
    if scheme != "s3":
        raise ConfigError(f"{uri!r} has the scheme {scheme}://; use a local path or s3://bucket/prefix")
    return True


def split_s3_uri(uri: str) -> tuple[str, str]:
    """Split `s3://bucket/key` into ("bucket", "key"); the key may be empty and is not unquoted."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not is_s3(uri) or not bucket:
        raise ConfigError(f"{uri!r} is not an S3 address; write s3://bucket/prefix")
    if redact_credentials(uri) != uri:
        raise ConfigError(f"{redact_credentials(uri)}: no keys in an address; {SET_CREDENTIALS}")
    return bucket, key


def normal_uri(uri: str) -> str:
    """Normalise a folder's address: `s3://` without a trailing slash; a local path absolute, `~` expanded."""
    if is_s3(uri):
        split_s3_uri(uri)  # raises for a bare s3://, which would lose its slashes and become a local path
        return uri.rstrip("/")
    return os.path.abspath(os.path.expanduser(uri))


def is_shared_path(uri: str) -> bool:
    """Return True for S3 and absolute paths. A relative path is in the job's own code folder on each node."""
    return is_s3(uri) or os.path.isabs(os.path.expanduser(uri))
