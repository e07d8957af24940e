"""Pack images for pretraining: `dinoray pack SOURCE --out FOLDER_OR_S3 [--shrink] [--recipe R] [options]`.

Image objects or Parquet of any layout -> a pool of actors -> Parquet parts, whose images are shrunk on request to
what a recipe's crops need of them. The same command continues what was interrupted, and does nothing for what is
finished.
"""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from rich.console import Console

from dinoray.jobs.cli.arguments import CommandLine, positive
from dinoray.jobs.cli.config import apply_overrides, validate
from dinoray.jobs.cli.main import run_main
from dinoray.jobs.cli.recipes import RECIPES
from dinoray.jobs.runs.data_lines import describe_data
from dinoray.jobs.runs.parts_job import PartsJob
from dinoray.models.commands import command
from dinoray.models.errors import ConfigError
from dinoray.pipeline.data.manifest import Manifest
from dinoray.pipeline.export.packing import KIND, QUALITY, check_keys, shrink_pixels, write_part
from dinoray.pipeline.export.packing_plan import make_plan
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.worker.config import Config

_RECIPE = "vit_small_imagenet_vanilla"  # its crops are the published ones


def main(argv: Sequence[str]) -> None:
    """Plan, refuse what does not fit what is there, pack the missing parts, and account for every row."""
    arguments = _parser().parse_args(argv)
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    config = _config(arguments)
    out = Directory(arguments.out)
    _check_apart(Directory(config.data.path), out)
    max_pixels = shrink_pixels(config.crops) if arguments.shrink else None
    job = PartsJob(out, KIND, config, console, argument="source", verbose=arguments.verbose)
    source = job.list_images(
        {
            "max_pixels": max_pixels,
            "quality": QUALITY if arguments.shrink else None,
            "rows_per_file": arguments.rows_per_file,
        }
    )
    plan = make_plan(
        source.manifest,
        digest=job.manifest_digest,
        max_pixels=max_pixels,
        rows_per_file=arguments.rows_per_file,
    )
    about = {"num_images": source.num_images}
    job.begin({"num_parts": plan.num_parts, **plan.layout}, about, check=lambda: check_keys(source))
    treatment = (
        "image files are stored unchanged"
        if max_pixels is None
        else f"images of more than {max_pixels} pixels are shrunk to {max_pixels} if that makes the file smaller: "
        f"no crop of {arguments.recipe} needs more"
    )
    job.write(
        partial(write_part, out=out, plan=plan),
        None,
        source,
        [plan.rows(part) for part in range(plan.num_parts)],
        identity=plan.identity,
        about=f"{describe_data(source)}, {_megabytes(_listed_bytes(source.manifest))}\n{treatment}",
        describe=_told,
    )
    console.print(_next_command(arguments, out))


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
        default=_RECIPE,
        help=f"recipe whose crop sizes decide the size of shrunk images (default: {_RECIPE})",
    )
    parser.add_argument(
        "--rows-per-file",
        type=positive,
        default=None,
        help="images per Parquet part (default: chosen from the size of the images)",
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
    tree = {
        **RECIPES[arguments.recipe](),
        "name": "pack",
        "recipe": arguments.recipe,
        "data": {"path": arguments.source},
    }
    return validate(apply_overrides(tree, arguments.overrides))


def _check_apart(source: Directory, out: Directory) -> None:
    if f"{source.uri}/".startswith(f"{out.uri}/") or f"{out.uri}/".startswith(f"{source.uri}/"):
        raise ConfigError(
            f"--out {out.uri}: must not be inside the folder of the images, {source.uri}, or contain it; "
            "choose another --out"
        )


def _listed_bytes(manifest: Manifest) -> int:
    sizes = manifest.group_bytes
    return int((manifest.table["size"].to_numpy() if sizes is None else sizes).sum())


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"


def _told(summary: Mapping[str, Any]) -> str:
    before, after = _megabytes(summary["bytes_in"]), _megabytes(summary["bytes_out"])
    return (
        "{rows_in} images in = {rows_out} images out + {quarantined} quarantined, {num_shrunk} shrunk, ".format(
            **summary
        )
        + f"{before} before, {after} after"
    )


def _next_command(arguments: Namespace, out: Directory) -> str:
    """The command that pretrains from what was packed."""
    crops = [override for override in arguments.overrides if override.startswith("crops.")]
    line = command("pretrain", "--recipe", arguments.recipe, f"data.path={out.uri}", *crops)
    return f"command that pretrains on the packed images:\n{line}"


if __name__ == "__main__":
    run_main(main)
