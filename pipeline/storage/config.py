"""The section `storage` of a config."""

from pydantic import Field

from dinoray.models.settings import Settings


class StorageConfig(Settings):
    """Storage that does not answer."""

    give_up_after_seconds: float = Field(default=900, ge=0)
    """Seconds for which each read of images waits for storage that does not answer, before the run ends."""


DEFAULTS = StorageConfig()
