"""The base of every config section, and the errors a person can act on.

Both stand at the lowest layer because every layer above declares a config beside the thing it configures
and every layer can find that a value is wrong.

Errors and the exit code that a job ends with:

    DinorayError          1
      ConfigError         2   a value in the config, on the command line or in a run directory is wrong
      DataError           3   images, labels, checkpoints or storage cannot be read or written
      ResourceError       4   the machine or cluster lacks what the config asks for
"""

import re
from typing import Any, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, field_validator

Auto: TypeAlias = Literal["auto"]
"""Stands for a number that follows from the number of images; pipeline/automatic.py puts it in."""

_KEYS = re.compile(
    r"(?<=://)(?:"
    # A name, a colon and a key, which may have any sign in it; no port, no ARN and no IPv6 address.
    r"(?!arn:)[^/\s:@\[]+:(?!\d+(?:/|$|\s))\S*"
    r"|(?<!ssh://)[^/\s]+"
    r")(?=@)"
)

Number = TypeVar("Number", int, float)


class DinorayError(Exception):
    """One line for a person: name, value, rule, remedy. `exit_code` is the process's exit status."""

    exit_code = 1
    all_processes_raise_it = False
    """Whether all train workers come to it at the same step, so that each of them can end by itself."""


class ConfigError(DinorayError, ValueError):
    """A configured value is wrong."""

    exit_code = 2
    all_processes_raise_it = True


class DataError(DinorayError):
    """Data or storage is missing, forbidden or damaged."""

    exit_code = 3


class ResourceError(DinorayError):
    """The machine or cluster lacks what the config asks for."""

    exit_code = 4


def error_of(message: str, exit_code: int) -> DinorayError:
    """The error that a process ended with, as another one was told of it."""
    kinds: dict[int, type[DinorayError]] = {k.exit_code: k for k in (ConfigError, DataError, ResourceError)}
    return kinds.get(exit_code, DinorayError)(message)


class Settings(BaseModel):
    """Frozen, strict base of each config section: unknown keys are errors, attribute docstrings are the help."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _holds_no_keys(cls, value: Any) -> Any:
        if isinstance(value, str) and without_keys(value) != value:
            raise ValueError(
                f"{without_keys(value)} was given with a name or key before an @, which would be stored and shown; "
                "those belong in the environment (AWS_PROFILE, AWS_ACCESS_KEY_ID, ...) or in a role"
            )
        return value


def number(value: Number | Auto) -> Number:
    """`value`, which must no longer be `auto`."""
    if value == "auto":
        raise ValueError("a value is still auto; pipeline.automatic.resolve puts the number in")
    return value


def one_line(error: BaseException | None, *, limit: int = 200) -> str:
    """What another library's error says, on one line of at most `limit` characters; its type where it says nothing."""
    return without_keys(" ".join(str(error).split()))[:limit] or type(error).__name__


def without_keys(text: str) -> str:
    """`text`, where what stands before the @ of an address, a name and a password, is `...`; not the user of SSH."""
    return _KEYS.sub("...", text)
