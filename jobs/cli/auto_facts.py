"""What the recipe auto knows of images and devices, and what it makes of that: choices, each with a reason.

Plain values, which a run keeps in choices.json. No images, devices or Ray here: jobs/runs/looking.py collects facts.
"""

import contextlib
from collections.abc import Iterable, Mapping
from itertools import groupby
from operator import attrgetter
from typing import Any, NamedTuple

from dinoray.models.counts import count
from dinoray.models.settings import flatten


class Facts(NamedTuple):
    """What is known before a run starts."""

    num_images: int
    width: int = 0
    """Of the median image, in pixels; 0: not known."""
    height: int = 0
    channels: int = 3
    """Channels that differ: 1 for images that are all gray, which are decoded as three equal channels."""
    num_classes: int = 0
    """Different labels; 0: none, or not counted."""
    gpus: int = 0
    gpu_bytes: int = 0
    """Memory of a GPU; 0: not known."""
    cpus: int = 1
    """CPU cores of this machine, or of all nodes of a cluster."""

    @property
    def images(self) -> str:
        """`1 image`, `12,000 images`."""
        return count(self.num_images, "image")

    @property
    def line(self) -> str:
        """One line for a person."""
        size = f" of {self.width} x {self.height} pixels (median)" if self.width else ""
        classes = f", {self.num_classes} classes" if self.num_classes else ""
        memory = f" of {self.gpu_bytes / 1e9:.0f} GB" if self.gpu_bytes else ""
        gpus = count(self.gpus, "GPU") if self.gpus else "no GPU"
        images = f"{self.images}{size}, {count(self.channels, 'channel')}{classes}"
        return f"{images}; {gpus}{memory}, {count(self.cpus, 'CPU core')}"


class Choice(NamedTuple):
    """A setting that the recipe chooses."""

    key: str
    value: Any
    reason: str

    @property
    def typed(self) -> str:
        """`backbone.name=resnet18`, as on a command line."""
        return f"{self.key}={_shown(self.value)}"


class Choices:
    """Choices as they are made: a setting of the user is taken as it is, and is no choice."""

    def __init__(self, facts: Facts, settings: Mapping[str, Any]) -> None:
        self.facts, self.made = facts, list[Choice]()
        self._given = dict(flatten(settings))

    @property
    def gpus(self) -> int:
        """GPUs that the run may use: none if the settings say so, those asked for where none is up yet."""
        use_gpu = self.given("resources.use_gpu", "auto")
        if use_gpu is False:
            return 0
        asked = int(self.given_number("resources.train_workers") or 1)
        return max(self.facts.gpus, asked) if use_gpu is True else self.facts.gpus

    def has(self, key: str) -> bool:
        """Return True if the user has set `key`, or something in it."""
        return any(given == key or given.startswith(f"{key}.") for given in self._given)

    def given(self, key: str, otherwise: Any = None) -> Any:
        """Return the user's value, whatever it is."""
        return self._given.get(key, otherwise)

    def given_number(self, key: str) -> float | None:
        """Return the user's number; None if there is none above 0, which the validation of settings then says."""
        value = self._given.get(key)
        if isinstance(value, str):
            with contextlib.suppress(ValueError):  # a number that YAML takes for text, such as 1e-3
                value = float(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        return value if 0 < value < float("inf") else None

    def take(self, key: str, value: Any, reason: str) -> None:
        """Choose `value`, unless the user has set `key`."""
        if not self.has(key):
            self.made.append(Choice(key, value, reason))

    def number(self, key: str, value: float, reason: str) -> float:
        """As `take`; return the number that is in force."""
        self.take(key, value, reason)
        if self.has(key) and self._given.get(key) == 0:
            return 0
        return self.given_number(key) or value


def choice_lines(choices: Iterable[Choice]) -> list[str]:
    """`backbone.name=resnet18: 7,000 images and 1 GPU; ...`; neighbours of one reason stand on one line."""
    groups = groupby(choices, key=attrgetter("reason"))
    return [f"{' '.join(choice.typed for choice in group)}: {reason}" for reason, group in groups]


def _shown(value: Any) -> str:
    """A value as one types it on a command line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_shown(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_shown, value)) + "]"
    return (
        str(value).lower()
        if isinstance(value, bool)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )
