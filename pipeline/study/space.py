"""The search space of a study: dotted keys of the run's config, each with a domain, and points of the space.

A domain maps [0, 1] to values on the scale on which equal distances matter. So samplers
(study/search/samplers.py) and plots work on the unit cube without knowledge of scales. The defaults enclose
the values of temperature and centre that worked in the published ablations (arXiv 2104.14294, appendix). No
Ray here.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import ValidationInfo, field_validator

from dinoray.models.settings import Settings
from dinoray.pipeline.training.config import DINOConfig

Kind = Literal["uniform", "log", "one_minus_log", "int", "choice"]
_KINDS: tuple[Kind, ...] = ("uniform", "log", "one_minus_log", "int", "choice")
_EXAMPLE = (
    "{uniform: [0.02, 0.08]}, {log: [1e-4, 1e-2]}, {one_minus_log: [0.5, 0.99]}, {int: [1, 8]} "
    "or {choice: [a, b]}"
)
TEACHER_TEMP = "loss.teacher_temp"
WARMUP_TEMP = "loss.warmup_teacher_temp"
WARMUP_EPOCHS = "loss.warmup_teacher_temp_epochs"
CENTER_MOMENTUM = "loss.center_momentum"
CENTERING = "loss.centering"


class Domain(Settings):
    """The values that a setting may take, and the scale between them."""

    kind: Kind
    """`one_minus_log` is even along log(1 - x), for momenta: as much room from 0.9 to 0.99 as from 0 to 0.9."""
    values: tuple[Any, ...]
    """Least and largest; for `choice` all of them."""

    @field_validator("values")
    @classmethod
    def _bounds_are_in_order(cls, values: tuple[Any, ...], info: ValidationInfo) -> tuple[Any, ...]:
        kind = info.data.get("kind")
        if kind == "choice":
            if len(values) < 2 or len({repr(v) for v in values}) < len(values):
                raise ValueError(f"choice: {list(values)} must be two different values at least")
            return values
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        if len(values) != 2 or len(numbers) != 2 or not numbers[0] < numbers[1]:
            raise ValueError(f"{kind}: {list(values)} must be [least, largest], two numbers in order")
        if kind == "int" and not all(isinstance(v, int) for v in numbers):
            raise ValueError(f"int: {list(values)} must be two whole numbers")
        if kind == "log" and numbers[0] <= 0:
            raise ValueError(f"log: {list(values)} must be above 0")
        if kind == "one_minus_log" and not (numbers[0] >= 0 and numbers[1] < 1):
            raise ValueError(f"one_minus_log: {list(values)} must be within [0, 1), e.g. [0.5, 0.99]")
        return values

    @property
    def is_continuous(self) -> bool:
        """Return true if there are values between any two values."""
        return self.kind in ("uniform", "log", "one_minus_log")

    def at(self, u: float) -> Any:
        """Return the value at `u` of [0, 1] on the scale, numbers rounded to 4 digits."""
        if self.kind == "choice":
            return self.values[min(len(self.values) - 1, int(u * len(self.values)))]
        low, high = self.values
        if self.kind == "int":
            return min(high, low + int(u * (high - low + 1)))
        if self.kind == "uniform":
            value = _short(low + u * (high - low))
        elif self.kind == "log":
            value = _short(math.exp(math.log(low) + u * (math.log(high) - math.log(low))))
        else:
            rest = math.log(1 - low) + u * (math.log(1 - high) - math.log(1 - low))
            value = round(1 - _short(math.exp(rest)), 9)
        return min(max(value, low), high)

    def place(self, value: Any) -> float:
        """Return the `u` of a value: the middle of its share for discrete domains.

        Raises ValueError outside the domain.
        """
        if not self.holds(value):
            raise ValueError(f"{value!r} is not within {self.kind}: {list(self.values)}")
        if self.kind == "choice":
            return (self.values.index(value) + 0.5) / len(self.values)
        low, high = self.values
        if self.kind == "int":
            return (value - low + 0.5) / (high - low + 1)
        if self.kind == "uniform":
            return (value - low) / (high - low)
        if self.kind == "log":
            return math.log(value / low) / math.log(high / low)
        return math.log((1 - value) / (1 - low)) / math.log((1 - high) / (1 - low))

    def holds(self, value: Any) -> bool:
        """Return true if the value belongs to the domain."""
        if self.kind == "choice":
            return value in self.values
        return isinstance(value, int | float) and self.values[0] <= value <= self.values[1]

    def grid(self, num_points: int) -> list[Any]:
        """Return values at equal distances, ends included; all values if there are at most `num_points`."""
        if self.kind == "choice":
            return list(self.values)
        if self.kind == "int" and self.values[1] - self.values[0] < num_points:
            return list(range(self.values[0], self.values[1] + 1))
        if num_points == 1:
            return [self.at(0.5)]
        return list(dict.fromkeys(self.at(i / (num_points - 1)) for i in range(num_points)))


Space = Mapping[str, Domain]
"""Domains by dotted key."""


def parse_space(tree: Any) -> dict[str, Domain]:
    """Return the domains of a config tree, dotted or nested; a plain list is a choice.

    Raises ValueError for a bad domain.
    """
    if not isinstance(tree, Mapping):
        raise ValueError(f"{tree!r} must be a mapping of settings to domains, e.g. {_EXAMPLE}")
    space: dict[str, Domain] = {}
    for key, value in _leaves(tree):
        if isinstance(value, Domain):
            space[key] = value
            continue
        if isinstance(value, list | tuple):
            value = {"choice": value}
        if not isinstance(value, Mapping) or len(value) != 1 or next(iter(value)) not in _KINDS:
            raise ValueError(f"{key}: {value!r} is not a domain; write {_EXAMPLE}")
        ((kind, values),) = value.items()
        if not isinstance(values, list | tuple):
            raise ValueError(f"{key}: {kind}: {values!r} must be a list; write {_EXAMPLE}")
        try:
            space[key] = Domain(kind=kind, values=tuple(values))
        except ValueError as error:
            told = [e["msg"].removeprefix("Value error, ") for e in error.errors()]  # type: ignore[attr-defined]
            raise ValueError(f"{key}: {'; '.join(told)}") from error
    return space


def _leaves(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        is_domain = isinstance(value, Mapping) and any(name in _KINDS for name in value)
        if isinstance(value, Mapping) and value and not is_domain:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def default_space(config: DINOConfig) -> dict[str, Domain]:
    """Return teacher temperature, its warm-up (10 to 30 % of the run), and any center momentum."""
    space = {TEACHER_TEMP: Domain(kind="uniform", values=(0.02, 0.08))}
    least, most = math.ceil(0.1 * config.train.epochs), math.floor(0.3 * config.train.epochs)
    if 1 <= least < most:
        space[WARMUP_EPOCHS] = Domain(kind="int", values=(least, most))
    if config.loss.centering == "center":
        space[CENTER_MOMENTUM] = Domain(kind="one_minus_log", values=(0.5, 0.99))
    return space


def grid(space: Space, num_points: int) -> list[dict[str, Any]]:
    """Return all combinations of each domain's `grid`; the first key varies slowest."""
    axes = [domain.grid(num_points) for domain in space.values()]
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*axes)]


def at(space: Space, cube: Mapping[str, float]) -> dict[str, Any]:
    """Return the values at a point of the unit cube, which may hold additional keys."""
    return {key: domain.at(cube[key]) for key, domain in space.items()}


def place(space: Space, params: Mapping[str, Any]) -> dict[str, float]:
    """Return the point of the unit cube for these values."""
    return {key: domain.place(params[key]) for key, domain in space.items()}


def _short(value: float) -> float:
    return float(f"{value:.4g}")
