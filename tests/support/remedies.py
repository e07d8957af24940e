"""What a message says to do, read out of the message itself: a remedy that lies then fails its test."""

import re
import shlex


def settings_to_set(message: str) -> list[str]:
    """The settings that a message says to set, all of the first `; set a.b=c d.e=f`."""
    found = re.search(
        r"[;:,] (?:or )?set ((?:[a-z_]+(?:\.[a-z_]+)*=(?:\[[^]]*\]|[^\s,;]+)(?: |$|(?=[,;])))+)", message
    )
    assert found, message
    return found[1].split()


def command_to_run(message: str) -> list[str]:
    """The words of the first command in backticks, without `dinoray`."""
    found = re.search(r"`dinoray ([^`]*)`", message)
    assert found, message
    return shlex.split(found[1])
