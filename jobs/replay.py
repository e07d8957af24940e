"""Repeat one step of a run in one process: `dinoray replay RUN --step N [--checkpoint NAME] [key=value ...]`.

The newest checkpoint before the step is restored, and all steps up to it are run with the same crops and seeds, without
Ray. Printed: losses and schedules beside those that the run logged, the first values that are not finite, the images.
"""

from collections.abc import Sequence

from dinoray.jobs.cli.arguments import CommandLine, positive
from dinoray.jobs.cli.main import run_main


def main(argv: Sequence[str]) -> None:
    """Parse, and replay."""
    parser = CommandLine("replay", description="Repeat one step of a run in one process, without Ray.")
    parser.add_argument("run", help="run directory, local or s3://; nothing is written there")
    parser.add_argument(
        "--step",
        type=positive,
        default=None,
        metavar="N",
        help="step to repeat; the first is 1, as in metrics.jsonl",
    )
    parser.add_argument(
        "--checkpoint",
        default=None,
        metavar="NAME",
        help="checkpoint to restore, e.g. step_00001000; initial: the weights that the run began with (default: the "
        "newest one before the step; initial if none was due before)",
    )
    parser.add_argument(
        "--alone",
        action="store_true",
        help="run the step on the checkpoint's weights, without the steps between them",
    )
    parser.add_argument(
        "--images", type=positive, default=16, metavar="COUNT", help="images to print (default: 16)"
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default=None,
        help="default: cuda for a run on GPUs, if there is one here",
    )
    parser.add_overrides("train.precision=bf16")
    arguments = parser.parse_args(argv)
    # Only now: what follows loads PyTorch, for which --help and a wrong option need not wait.
    from dinoray.jobs.runs.replaying import replay

    replay(arguments)


if __name__ == "__main__":
    run_main(main)
