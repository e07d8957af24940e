"""How far fifty training steps part from an independent reference of DINO's published step.

    python benchmarks/parity.py [configuration ...]

`tests/support/dino_reference.py` is DINO written out a second time, in float64 and without a line of this package
or of timm. Both start from the same weights and see the same crops, for 50 steps that pass through the warm-ups of
the learning rate and of the teacher's temperature and through the freeze of the last layer. Ours runs three times,
as `tests/support/side_by_side.py` explains: as float64, where the algorithm alone is compared; as float32 with each
step from the reference's state, where one step's rounding is; and as float32 throughout, where rounding has fifty
steps to grow.

Prints a table for RESULTS.md: the largest relative deviation of each quantity, max |a - b| / max |b| of a tensor, over
all tensors and steps. Takes about a minute on a CPU.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

import torch
from side_by_side import CONFIGURATIONS, MODES, SCHEDULES, TENSORS, deviations

from dinoray.jobs.cli.main import run_main
from dinoray.models.errors import ConfigError

TITLES = {
    "center": "centre",
    "grads": "gradients",
    "clipped": "gradients, clipped",
}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configurations", nargs="*", metavar="configuration", help=", ".join(CONFIGURATIONS))
    names = parser.parse_args(argv).configurations or list(CONFIGURATIONS)
    for name in names:
        if name not in CONFIGURATIONS:
            raise ConfigError(f"configuration={name!r} is none of {', '.join(map(repr, CONFIGURATIONS))}")
    torch.set_num_threads(1)
    columns = ("loss", *TENSORS)
    print(f"| configuration | arithmetic | schedules | {' | '.join(TITLES.get(c, c) for c in columns)} |")
    print("|---" * (3 + len(columns)) + "|")
    for name in names:
        for mode in MODES:
            apart = deviations(name)[mode]
            values = [max(apart[s] for s in SCHEDULES), *(apart[c] for c in columns)]
            print(f"| {name} | {mode} | {' | '.join(f'{value:.0e}' for value in values)} |", flush=True)


if __name__ == "__main__":
    run_main(main)
