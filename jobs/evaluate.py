"""Evaluate a checkpoint: `dinoray evaluate RUN_OR_CHECKPOINT [--step N] [--probes LIST] [key=value ...]`.

Ray Data embeds images with the frozen backbone on a pool of actors. k-NN and a linear probe classify labelled
ones; RankMe, CLID, LiDAR and feature std need no labels. `--probes neighbours` writes neighbours.html: query images and
their nearest neighbours before and after.
"""

from collections.abc import Sequence

from dinoray.jobs.cli.arguments import CommandLine
from dinoray.jobs.cli.main import run_main
from dinoray.pipeline.evaluation.config import LABEL_FREE, LABELLED, NEIGHBOURS


def main(argv: Sequence[str]) -> None:
    """Parse, embed and probe."""
    parser = CommandLine("evaluate", description="Probe the features of a checkpoint.")
    parser.add_argument("checkpoint", help="run directory, or a checkpoint's own folder; local or s3://")
    parser.add_network()
    parser.add_argument(
        "--probes",
        default=None,
        metavar="LIST",
        help=f"comma-separated list out of {','.join((*LABELLED, *LABEL_FREE, NEIGHBOURS))} (default: all but "
        f"{NEIGHBOURS} that the data allows)",
    )
    parser.add_argument("--verbose", action="store_true", help="show Ray's own logs")
    parser.add_overrides("eval.val_path=s3://bucket/val")
    arguments = parser.parse_args(argv)
    # Only now: what follows loads PyTorch, for which --help and a wrong option need not wait.
    from dinoray.jobs.runs.scoring import score

    score(arguments)


if __name__ == "__main__":
    run_main(main)
