"""Pack images for pretraining: `dinoray pack SOURCE --out FOLDER_OR_S3 [--shrink] [--recipe R] [options]`.

Image objects or Parquet of any layout -> a pool of actors -> Parquet parts, whose images are shrunk on request to
what a recipe's crops need of them, and data.html, a page about them. Each image is decoded, and damaged ones are left
out. Images are shuffled; Parquet needs two passes for that, and so does leaving out duplicates, the first one into a
folder beside --out, which is removed at the end. The same command continues what was interrupted, and does nothing
for what is finished.
"""

from argparse import Namespace
from collections.abc import Sequence

from rich.console import Console

from dinoray.jobs.cli.arguments import CommandLine, one_source, positive
from dinoray.jobs.cli.config import apply_overrides, validate
from dinoray.jobs.cli.main import run_main
from dinoray.jobs.cli.recipes import RECIPES
from dinoray.jobs.runs.packing import pack_images
from dinoray.models.commands import command
from dinoray.models.errors import ConfigError
from dinoray.pipeline.augment.config import OF_COLOURS
from dinoray.pipeline.data.config import PixelsConfig
from dinoray.pipeline.export.packing_facts import EXACT, KEEP, NEAR
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.worker.config import Config

_OF_PIXELS = tuple(f"data.{name}=" for name in PixelsConfig.model_fields)
_RECIPE = "vit_small_imagenet_vanilla"  # its crops are the published ones


def main(argv: Sequence[str]) -> None:
    """Pack what is missing, and print the command that pretrains from it."""
    arguments = _parser().parse_args(argv)
    one_source(arguments.overrides, "pack")
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    out = Directory(arguments.out)
    config = _config(arguments)
    line = _next_command(arguments, config, out)
    pack_images(arguments, config, out, console, next_command=line)
    console.print(f"command that pretrains on the packed images:\n{line}")


def _parser() -> CommandLine:
    parser = CommandLine("pack", description="Pack images for pretraining.")
    parser.add_argument("source", help="images: a folder, s3://bucket/prefix, or Parquet in either")
    parser.add_argument(
        "--out", required=True, help="output folder or s3://bucket/prefix for the Parquet parts"
    )
    parser.add_argument(
        "--shrink", action="store_true", help="shrink images that are larger than the crops need"
    )
    parser.add_argument(
        "--recipe",
        choices=tuple(RECIPES),
        help=f"recipe whose crop sizes decide the size of shrunk images (default: {_RECIPE})",
    )
    parser.add_argument(
        "--rows-per-file",
        type=positive,
        default=None,
        help="images per Parquet part (default: chosen from the size of the images)",
    )
    parser.add_argument(
        "--one-pass",
        action="store_true",
        help="for Parquet whose rows are in random order already: write each image once, not twice",
    )
    parser.add_argument(
        "--duplicates",
        choices=(KEEP, EXACT, NEAR),
        default=KEEP,
        help="images that repeat an earlier one: keep all, leave out exact copies, or near-duplicates too "
        "(default: keep; data.html shows them)",
    )
    parser.add_argument("--verbose", action="store_true", help="show Ray's own logs")
    parser.add_overrides("data.label_from_parent=true")
    return parser


def _config(arguments: Namespace) -> Config:
    """The recipe's settings for `arguments.source`, which the recipe knows nothing of, with the overrides."""
    sections = ("data", "storage", "resources", *(("crops",) if arguments.shrink else ()))
    for override in arguments.overrides:
        if override.partition(".")[0] not in sections:
            allowed = ", ".join(f"{section}.*" for section in sections)
            raise ConfigError(
                f"{override!r}: only {allowed} can be set here (crops.* goes with --shrink); leave it out"
            )
    recipe = arguments.recipe or _RECIPE
    tree = {
        **RECIPES[recipe](),
        "name": "pack",
        "recipe": recipe,
        "data": {"path": arguments.source},
    }
    tree = apply_overrides(tree, arguments.overrides)
    if tree["data"].get("channels", 3) != 3:  # no crop is made here
        tree["crops"] = {**tree.get("crops", {}), **dict.fromkeys(OF_COLOURS, 0)}
    return validate(tree)


def _next_command(arguments: Namespace, config: Config, out: Directory) -> str:
    """The command that pretrains from what was packed; without a recipe, auto is to choose."""
    kept = [one for one in arguments.overrides if one.startswith(("crops.", *_OF_PIXELS))]
    named = ["--recipe", arguments.recipe] if arguments.recipe else []
    if named and config.data.channels != 3:
        given = {one.partition("=")[0] for one in kept}
        kept += [f"crops.{name}=0" for name in OF_COLOURS if f"crops.{name}" not in given]
    return command("pretrain", *named, f"data.path={out.uri}", *kept)


if __name__ == "__main__":
    run_main(main)
