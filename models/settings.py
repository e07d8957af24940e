"""The base class of every config section. It is in the lowest package, since all rooms define sections."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, field_validator

from dinoray.models.errors import redact_credentials

Auto: TypeAlias = Literal["auto"]
"""Placeholder for a number that depends on the number of images; pipeline/training/auto.py replaces it."""


Number = TypeVar("Number", int, float)


class Settings(BaseModel):
    """Frozen, strict base of each config section: unknown keys are errors, attribute docstrings are the help."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _holds_no_keys(cls, value: Any) -> Any:
        if isinstance(value, str) and redact_credentials(value) != value:
            raise ValueError(
                f"{redact_credentials(value)} was given with a name or key before an @, which would be stored and "
                "shown; those belong in the environment (AWS_PROFILE, AWS_ACCESS_KEY_ID, ...) or in a role"
            )
        return value


def number(value: Number | Auto) -> Number:
    """Return `value`. Raises ValueError if it is still `auto`."""
    if value == "auto":
        raise ValueError("a value is still auto; pipeline.training.auto.resolve puts the number in")
    return value


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in a tree; an empty mapping is a value."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
