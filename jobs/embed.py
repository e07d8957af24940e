"""Embed a data set with a checkpoint: `dinoray embed RUN_OR_CHECKPOINT DATA --out FOLDER_OR_S3 [options]`.

Images -> frozen backbone on a pool of actors -> Parquet parts of key and vector, written by the actors. The same
command continues what was interrupted, and does nothing for what is finished.
"""

from collections.abc import Sequence
from typing import get_args

from dinoray.jobs.cli.arguments import CommandLine, one_source, positive
from dinoray.jobs.cli.main import run_main
from dinoray.models.errors import ConfigError
from dinoray.pipeline.export.config import Dtype, Precision

_SECTIONS = ("data", "storage", "resources")


def main(argv: Sequence[str]) -> None:
    """Parse, and embed what is missing."""
    arguments = _parser().parse_args(argv)
    one_source(arguments.overrides, "embed")
    for override in arguments.overrides:
        if override.partition(".")[0] not in _SECTIONS:
            allowed = ", ".join(f"{section}.*" for section in _SECTIONS)
            raise ConfigError(f"{override!r}: only {allowed} can be set here; leave it out")
    # Only now: what follows loads PyTorch, for which --help and a wrong option need not wait.
    from dinoray.jobs.runs.embedding import embed_parts

    embed_parts(arguments)


def _parser() -> CommandLine:
    parser = CommandLine("embed", description="Embed a data set with a checkpoint.")
    parser.add_argument("checkpoint", help="run directory, or a checkpoint's own folder; local or s3://")
    parser.add_argument("data", help="images: a folder, s3://bucket/prefix, or Parquet in either")
    parser.add_argument(
        "--out", required=True, help="output folder or s3://bucket/prefix for the Parquet parts"
    )
    parser.add_network()
    parser.add_argument(
        "--dtype",
        choices=get_args(Dtype),
        default="float16",
        help="dtype of the stored vectors (default: float16)",
    )
    parser.add_argument(
        "--patch-tokens", action="store_true", help="also store the patch tokens of the last block"
    )
    parser.add_argument(
        "--image-size",
        type=positive,
        default=None,
        help="image size in pixels (default: the size of a global crop)",
    )
    parser.add_argument(
        "--rows-per-file",
        type=positive,
        default=None,
        help="images per Parquet part (default: chosen from the number of images)",
    )
    parser.add_argument(
        "--batch-size", type=positive, default=128, help="images per forward pass (default: 128)"
    )
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="fp32",
        help="precision of the forward pass; bf16 is faster on GPUs (default: fp32)",
    )
    parser.add_argument("--verbose", action="store_true", help="show Ray's own logs")
    parser.add_overrides("data.label_from_parent=true")
    return parser


if __name__ == "__main__":
    run_main(main)
