"""The page "Adapt a backbone to your images" from start to end: its commands and code as printed, and their output."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import pytest
from jobs_processes import run_job
from paths import ROOT

from dinoray.pipeline.data.demo_images import PATTERNS

PAGE = (ROOT / "jobs" / "ADAPT.md").read_text()
LEFT_OUT = "..."
"""A line of an output block that stands for any number of lines."""
_BLOCK = re.compile(r"^```(bash|sh|python|)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
_CHOICE = re.compile(r"[a-z_]+\.[a-z_]+=")
_MEASURED = re.compile(
    r"\d+\.\d+|\d+:\d\d:\d\d|\d+(?=%| points| images/s| CPU core| steps of the heads| of [a-z]+ taken for)"
    r"|(?<=\bstep )\d+|(?<=step_)\d+"
)
_CLASS = re.compile(rf"\b({'|'.join(PATTERNS)})\b")


def masked(line: str) -> str:
    """`line` without what another machine may measure: fractions, percentages, speeds, times, which step, which class.

    Whole numbers stay, and all of a line that states a choice: `train.epochs=5: ...`.
    """
    return line if _CHOICE.match(line) else _CLASS.sub("CLASS", _MEASURED.sub("#", line))


class Part(NamedTuple):
    """A block to run, and the blocks of output that are shown below it."""

    language: str
    text: str
    shown: list[str]

    def run(self, folder: Path) -> str:
        """What it prints in `folder`: of bash, one `dinoray` command, of python, a program of its own."""
        if self.language == "bash":
            program, *words = shlex.split(self.text)
            assert program == "dinoray"
            return run_job("dinoray", *words, cwd=folder, env=NO_GPU)
        env = {**os.environ, **NO_GPU, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", self.text + FOREIGN * ("dinoray" not in self.text)],
            cwd=folder, env=env, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout


NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
FOREIGN = "\nimport sys\nassert 'dinoray' not in sys.modules\n"
"""Appended to code that is said to do without dinoray."""


def parts() -> Iterator[Part]:
    """The blocks of the page in their order."""
    part = None
    for language, text in _BLOCK.findall(PAGE):
        if language == "sh":  # not run: it would download weights
            continue
        if language:
            if part:
                yield part
            part = Part(language, text, [])
        else:
            assert part, "output stands below what prints it"
            part.shown.append(text)
    if part:
        yield part


def check(shown: str, printed: str) -> None:
    """AssertionError unless `printed` is `shown`, but for masked values, and for lines where `...` stands."""
    wanted = [line if line == LEFT_OUT else masked(line) for line in shown.splitlines()]
    found = [masked(line.rstrip()) for line in printed.splitlines()]
    missing = [line for line in wanted if line != LEFT_OUT and line not in found]
    assert not missing, f"not printed: {missing}; printed:\n{printed}"
    pattern = "".join(r"(?:.*\n)*" if line == LEFT_OUT else re.escape(line) + "\n" for line in wanted)
    assert re.fullmatch(pattern, "".join(f"{line}\n" for line in found)), (
        f"shown:\n{shown}\nprinted:\n{printed}"
    )


@pytest.mark.nightly
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_page_prints_what_it_shows(tmp_path: Path) -> None:
    for part in parts():
        printed = part.run(tmp_path).replace(f"{tmp_path}/", "")
        for shown in part.shown:
            check(shown, printed)
    assert (tmp_path / "runs" / "adapted" / "neighbours.html").exists()


@pytest.mark.parametrize(
    ("shown", "is_right"),
    [
        ("...\nstep 50/225  k-NN 61.5% (rings)\n", True),
        ("3 images\n...\nstep 75/225  k-NN 70.0% (dots)\n", True),
        ("step 75/225  k-NN 61.5% (rings)\n", False),  # a line before it is left out in silence
        ("4 images\n...\n", False),
        ("...\nstep 75/225  accuracy 61.5% (rings)\n", False),
        ("...\nstep 75/230  k-NN 61.5% (rings)\n", False),
        ("3 images\ntrain.epochs=5: few images\n...\n", False),
    ],
)
def test_output_is_compared_but_for_what_was_measured(shown: str, is_right: bool) -> None:
    printed = "3 images\ntrain.epochs=8: few images\nstep 75/225  k-NN 61.5% (rings)\n"
    with nullcontext() if is_right else pytest.raises(AssertionError):
        check(shown, printed)
