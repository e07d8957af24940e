"""What measuring.py found of the samples of a data set. Known to the training step, so it imports little."""

from typing import Any, NamedTuple

from dinoray.pipeline.data.config import PixelsConfig

Range = tuple[float, float]


class Measured(NamedTuple):
    """What was measured of a data set, or nothing, where its images have 8 bits."""

    value_range: Range | None = None
    """The samples that become 0 and 255; None: samples of 16 bits keep their high byte."""
    mean: tuple[float, ...] | None = None
    """Of each channel, as a share of 255."""
    std: tuple[float, ...] | None = None
    line: str = ""
    """What was measured, for a person."""

    def settle(self, config: PixelsConfig) -> dict[str, Any]:
        """Return the settings of `config` that are auto, with their values."""
        return {"value_range": self.value_range} if config.value_range == "auto" else {}


NOTHING = Measured()
"""Of images of 8 bits, and of a run that began before there was something to measure."""
