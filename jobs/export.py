"""Export a checkpoint for other programs: `dinoray export RUN [--step N|best|last] [--format FORMAT ...]`.

Each format is a folder with a README.md, its model card. One JSON file beside the folders holds the same facts. Each
file has been loaded back and compared before it is written. Runs in one process, without Ray.
"""

from collections.abc import Sequence

from dinoray.jobs.cli.arguments import CommandLine
from dinoray.jobs.cli.main import run_main
from dinoray.pipeline.export.loading_code import FILES


def main(argv: Sequence[str]) -> None:
    """Parse, and export."""
    parser = CommandLine("export", description="Export a checkpoint for use in other programs.")
    parser.add_argument("run", help="run directory or checkpoint folder, local or s3://")
    parser.add_network(default="best")
    parser.add_argument(
        "--format",
        choices=tuple(FILES),
        action="append",
        help="format of the exported files; may be repeated (default: timm)",
    )
    parser.add_argument("--out", default=None, help="output folder or s3:// prefix (default: RUN/export)")
    parser.add_argument(
        "--license",
        default="unknown",
        metavar="ID",
        help="licence of the weights in the model card, e.g. apache-2.0 (default: unknown)",
    )
    arguments = parser.parse_args(argv)
    # Only now: what follows loads PyTorch, for which --help and a wrong option need not wait.
    from dinoray.jobs.runs.exporting import export

    export(arguments)


if __name__ == "__main__":
    run_main(main)
