"""The section `storage` of a config, and what of it belongs to each request."""

from typing import NamedTuple

from pydantic import Field, model_validator

from dinoray.models.settings import Settings


class Access(NamedTuple):
    """How data on S3 is requested. Without both: signed, and the bucket's owner pays."""

    anonymous: bool = False
    """Requests are not signed, so they need no credentials: for public buckets."""
    requester_pays: bool = False
    """Each request says that its sender pays for it: for buckets whose owner does not."""


SIGNED = Access()
"""How all other objects are requested: run directories, checkpoints, and what commands write."""


class StorageConfig(Settings):
    """Storage of images and runs: how the images are accessed, and how long a run waits for storage."""

    anonymous: bool = False
    """Read images on S3 without credentials, from public buckets; run directories and outputs still need them."""

    requester_pays: bool = False
    """Read images from S3 buckets whose owner lets the requester pay; the account of the credentials is charged."""

    give_up_after_seconds: float = Field(default=900, ge=0)
    """Seconds that each read of images and write of a run waits for failing or full storage, before the run ends."""

    hedge_after_seconds: float | None = Field(default=None, gt=0)
    """Seconds after which an image or shard on S3 that has not arrived is requested again; null: never."""

    @property
    def access(self) -> Access:
        """How the images are requested."""
        return Access(self.anonymous, self.requester_pays)

    @model_validator(mode="after")
    def _somebody_pays(self) -> "StorageConfig":
        if self.anonymous and self.requester_pays:
            raise ValueError(
                "storage.anonymous=true and storage.requester_pays=true: nobody can be charged for a request "
                "without credentials; set one of them to false"
            )
        return self


DEFAULTS = StorageConfig()
