"""Pack images for pretraining: `python -m jobs.pack SOURCE --out FOLDER_OR_S3 [--shrink] [--recipe R] [options]`.

Image objects or Parquet of any layout -> a pool of actors -> Parquet parts, whose images are shrunk on request to
what a recipe's crops need of them. The same command continues what was interrupted, and does nothing for what is
finished.
"""

import hashlib
import json
import shlex
from argparse import Namespace
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from rich.console import Console

from dinoray.jobs.cli.arguments import CommandLine, positive
from dinoray.jobs.cli.config import Config, apply_overrides, validate
from dinoray.jobs.cli.main import run_main
from dinoray.jobs.cli.recipes import RECIPES
from dinoray.jobs.runs.data_lines import describe_data
from dinoray.jobs.runs.write_parts import settings_of, write_missing
from dinoray.models.errors import ConfigError
from dinoray.pipeline.data.manifest import Manifest, load_or_build
from dinoray.pipeline.data.source import Source
from dinoray.pipeline.export.packing import (
    FACTS,
    KIND,
    MANIFEST,
    QUALITY,
    SETTINGS,
    Plan,
    check_keys,
    collect,
    cut_parts,
    shrink_pixels,
    write_part,
)
from dinoray.pipeline.export.parquet_parts import (
    SUMMARY,
    PartFooter,
    check_bad,
    check_settings,
    missing_parts,
)
from dinoray.pipeline.storage.files import Directory

_RECIPE = "vit_small_imagenet_vanilla"  # its crops are the published ones


def main(argv: Sequence[str]) -> None:
    """Plan, refuse what does not fit what is there, pack the missing parts, and account for every row."""
    arguments = _parser().parse_args(argv)
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    config = _config(arguments)
    data, out = config.data, Directory(arguments.out)
    _check_apart(Directory(data.path), out)
    source, plan = _plan(arguments, config, out)

    missing = missing_parts(out, plan.num_parts)
    if not missing and out.exists(SUMMARY):
        console.print(f"{out.uri} is finished: {_told(json.loads(out.read(SUMMARY)))}")
        console.print(_next_command(arguments, out))
        return
    console.print(
        f"{describe_data(source)}, {_megabytes(_listed_bytes(source.manifest))}\n"
        + (
            "image files are stored unchanged\n"
            if plan.max_pixels is None
            else f"images of more than {plan.max_pixels} pixels are shrunk to {plan.max_pixels} if that makes the file "
            f"smaller: no crop of {arguments.recipe} needs more\n"
        )
        + f"parts of up to {max(map(len, map(plan.rows, range(plan.num_parts))))} images in {out.uri}: "
        f"{len(missing)} of {plan.num_parts} to do"
    )

    def account(numbers: Sequence[int]) -> tuple[list[PartFooter], int]:
        footers, bad = collect(out, plan, numbers)
        check_bad(len(bad), source.num_images, limit=data.max_bad_fraction, out=out, kind=KIND)
        return footers, len(bad)

    if missing:
        write_missing(
            partial(write_part, out=out, plan=plan),
            None,
            source,
            missing=missing,
            num_parts=plan.num_parts,
            account=lambda numbers: account(numbers)[1],
            limit=data.max_bad_fraction,
            resources=config.resources.model_copy(update={"use_gpu": False}),
            console=console,
            verbose=arguments.verbose,
        )
    footers, num_bad = account(range(plan.num_parts))
    summary = {"rows_in": source.num_images, "rows_out": sum(footer.num_rows for footer in footers)}
    summary |= {"quarantined": num_bad}
    summary |= {name: sum(footer.note[name] for footer in footers) for name in FACTS}
    out.write(SUMMARY, json.dumps(summary).encode())
    console.print(f"{out.uri}: {_told(summary)}")
    console.print(_next_command(arguments, out))


def _parser() -> CommandLine:
    parser = CommandLine(prog="python -m jobs.pack", description="Pack images for pretraining.")
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
    sections = ("data", "resources", "crops") if arguments.shrink else ("data", "resources")
    for override in arguments.overrides:
        if override.partition(".")[0] not in sections:
            allowed = ", ".join(f"{section}.*" for section in sections)
            raise ConfigError(f"{override!r}: only {allowed} can be set here (crops.* goes with --shrink)")
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


def _plan(arguments: Namespace, config: Config, out: Directory) -> tuple[Source, Plan]:
    """List the images and cut the parts. ConfigError when `out` was begun otherwise, or two images have one key."""
    max_pixels = shrink_pixels(config.crops) if arguments.shrink else None
    settings: dict[str, Any] = {
        "max_pixels": max_pixels,
        "quality": QUALITY if arguments.shrink else None,
        "rows_per_file": arguments.rows_per_file,
    }
    settings |= settings_of(config.data)
    begun = check_settings(out, settings, KIND)
    source = Source(config.data, load_or_build(config.data, out, MANIFEST, begun=SETTINGS))
    settings |= settings_of(source.config)
    digest = hashlib.blake2b(out.read(MANIFEST), digest_size=16).hexdigest()
    edges = cut_parts(source.manifest, max_pixels=max_pixels, rows_per_file=arguments.rows_per_file)
    plan = Plan(digest, edges, max_pixels)
    settings |= {"manifest": digest, "num_parts": plan.num_parts}
    check_settings(out, settings, KIND)
    if not begun:
        check_keys(source)
        out.write(SETTINGS, json.dumps({"num_images": source.num_images, **settings}, indent=1).encode())
    return source, plan


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
    words = ["python", "-m", "jobs.pretrain", "--recipe", arguments.recipe, f"data.path={out.uri}"]
    words += [override for override in arguments.overrides if override.startswith("crops.")]
    return "command that pretrains on the packed images:\n" + shlex.join(words)


if __name__ == "__main__":
    run_main(main)
