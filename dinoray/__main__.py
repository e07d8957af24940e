"""The commands: `dinoray NAME ...` and `python -m dinoray NAME ...` are `python -m jobs.NAME ...`."""

import os
import runpy
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from dinoray.jobs.__main__ import ORDER, describe_commands

_INSTEAD = {"report": "; pretrain writes report.html into the run directory, tune study.html into a study's"}
"""Commands that there are not, but might be -> what to do instead."""


def main(argv: Sequence[str]) -> int:
    """Run a command, or list them; the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(describe_commands())
        return 0 if argv else 2
    name, *arguments = argv
    if name in ("-V", "--version"):
        print(f"dinoray {metadata.version('dinoray')}  {Path(__file__).parent}")
        return 0
    if name not in ORDER:
        from dinoray.jobs.cli.keys import did_you_mean  # only now: it loads all settings

        print(
            f"error: {name} is not a command{_INSTEAD.get(name) or did_you_mean(name, ORDER)}; "
            "dinoray --help lists the commands",
            file=sys.stderr,
        )
        return 2
    sys.argv = [f"dinoray {name}", *arguments]
    runpy.run_module(f"dinoray.jobs.{name}", run_name="__main__")
    return 0


def console() -> None:
    """The console command: as `python -m dinoray`, which finds a checkout in the current folder first.

    So a job that is submitted as `dinoray pretrain ...` runs the code that was uploaded with it, not an older
    installation on the node.
    """
    os.execv(sys.executable, [sys.executable, "-m", "dinoray", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
