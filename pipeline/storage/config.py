"""The section `storage` of a config."""

from pydantic import Field

from dinoray.models.settings import Settings


class StorageConfig(Settings):
    """Storage that does not answer."""

    give_up_after_seconds: float = Field(default=900, ge=0)
    """Seconds for which each read of images waits for storage that does not answer, before the run ends."""

    hedge_after_seconds: float | None = Field(default=None, gt=0)
    """Seconds after which an image or shard on S3 that has not arrived is requested again; null: never."""


DEFAULTS = StorageConfig()
