"""The command lines that are printed for a person to copy.

They call the console command `dinoray`, which works wherever the package is installed; `python -m jobs.NAME` works in
a checkout only.
"""

import shlex


def command(name: str, *arguments: str) -> str:
    """Return `dinoray NAME ARGUMENTS...`, each argument quoted for a shell."""
    return shlex.join(command_words(name, *arguments))


def command_words(name: str, *arguments: str) -> list[str]:
    """Return the words of `command`, e.g. for the job that another command submits."""
    return ["dinoray", name, *arguments]
