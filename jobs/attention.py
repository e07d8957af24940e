"""Draw attention maps of a checkpoint: `dinoray attention RUN [IMAGE ...] [--animate]`.

Checkpoint -> backbone -> the class token's attention on a few images -> one sheet and a folder of overlays. With
--animate, also an animation of the figures that the run's evaluations have drawn. Runs in one process, without Ray.
"""

import re
from collections.abc import Sequence

from dinoray.jobs.cli.arguments import CommandLine
from dinoray.jobs.cli.main import run_main
from dinoray.pipeline.figures.config import MASS


def main(argv: Sequence[str]) -> None:
    """Look at images with one checkpoint, animate the run's evaluations; write the pictures, print their paths."""
    parser = CommandLine("attention", description="Draw attention maps of a checkpoint.")
    parser.add_argument("run", help="run directory or checkpoint folder, local or s3://")
    parser.add_argument(
        "images",
        nargs="*",
        help="image files, folders, s3:// objects or prefixes, Parquet shards; among them settings as "
        "storage.anonymous=true",
    )
    parser.add_network()
    parser.add_argument(
        "--mass", type=float, default=MASS, help=f"share of the attention in a mask (default: {MASS})"
    )
    parser.add_argument(
        "--image-size", type=int, default=None, help="shorter side in pixels (default: about 30 patches)"
    )
    parser.add_argument(
        "--image-column",
        default=None,
        help="Parquet column of the images (default: the run's data.image_column)",
    )
    parser.add_argument("--max-images", type=int, default=8, help="largest number of images (default: 8)")
    parser.add_argument(
        "--animate",
        action="store_true",
        help="also write a GIF of the teacher's attention at each evaluation of the run",
    )
    parser.add_argument("--out", default=None, help="output folder or s3:// prefix (default: RUN/attention)")
    arguments = parser.parse_args(argv)
    given, arguments.images, arguments.overrides = arguments.images, [], []
    for one in given:
        (arguments.overrides if re.match(r"storage\.\w+=", one) else arguments.images).append(one)
    # Only now: what follows loads PyTorch, for which --help and a wrong option need not wait.
    from dinoray.jobs.runs.attention_pictures import animate, check, draw

    check(arguments)
    if arguments.images:
        draw(arguments)
    if arguments.animate:
        animate(arguments)


if __name__ == "__main__":
    run_main(main)
