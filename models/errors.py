"""Errors that a user can fix, and the exit code that a job ends with.

DinorayError          1
  ConfigError         2   a value in the config, on the command line or in a run directory is wrong
  DataError           3   images, labels, checkpoints or storage cannot be read or written
  ResourceError       4   the machine or cluster lacks what the config asks for
"""

import re

_KEYS = re.compile(
    r"(?<=://)(?:"
    # A name, a colon and a key, which may contain any character; no port, no ARN and no IPv6 address.
    r"(?!arn:)[^/\s:@\[]+:(?!\d+(?:/|$|\s))\S*"
    r"|(?<!ssh://)[^/\s]+"
    r")(?=@)"
)


class DinorayError(Exception):
    """An error with a one-line message: name, value, rule, remedy.

    `exit_code` is the process's exit status.
    """

    exit_code = 1
    raised_by_all_ranks = False
    """True if all train workers raise the error at the same step, so that each of them can end by itself."""


class ConfigError(DinorayError, ValueError):
    """A configured value is wrong."""

    exit_code = 2
    raised_by_all_ranks = True


class DataError(DinorayError):
    """Data or storage is missing, forbidden or damaged."""

    exit_code = 3


class ResourceError(DinorayError):
    """The machine or cluster lacks what the config asks for."""

    exit_code = 4


def error_of(message: str, exit_code: int) -> DinorayError:
    """Return the error of another process, from its message and exit code."""
    kinds: dict[int, type[DinorayError]] = {k.exit_code: k for k in (ConfigError, DataError, ResourceError)}
    return kinds.get(exit_code, DinorayError)(message)


def one_line(error: BaseException | None, *, limit: int = 200) -> str:
    """Return an error's message on one line of at most `limit` characters; its type if it has no message."""
    return redact_credentials(" ".join(str(error).split()))[:limit] or type(error).__name__


def redact_credentials(text: str) -> str:
    """Replace name and password before the @ of addresses in `text` by `...`; a user name of SSH stays."""
    return _KEYS.sub("...", text)
