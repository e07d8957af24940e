"""Embed a data set with a checkpoint: `python -m jobs.embed RUN_OR_CHECKPOINT DATA --out FOLDER_OR_S3 [options]`.

Images -> frozen backbone on a pool of actors -> Parquet parts of key and vector, written by the actors. The same
command continues what was interrupted, and does nothing for what is finished.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, get_args

from rich.console import Console

from jobs.cli.arguments import CommandLine, positive
from jobs.cli.main import run_main
from jobs.runs.data_lines import describe_data
from jobs.runs.open_checkpoint import lone_config, open_network
from jobs.runs.write_parts import settings_of, write_missing
from models.errors import ConfigError
from pipeline.data.manifest import load_or_build
from pipeline.data.source import Source
from pipeline.evaluation.backbone_outputs import check_size
from pipeline.export.embeddings import (
    MANIFEST,
    SETTINGS,
    SUMMARY,
    Dtype,
    Plan,
    Precision,
    check_bad,
    check_settings,
    choose_rows_per_file,
    collect,
    measure,
    missing_parts,
    weights_digest,
    write_part,
)
from pipeline.storage.files import Directory

_SECTIONS = ("data", "resources")


def main(argv: Sequence[str]) -> None:
    """Plan, refuse what does not fit what is there, embed the missing parts, and account for every row."""
    arguments = _parser().parse_args(argv)
    for override in arguments.overrides:
        if override.partition(".")[0] not in _SECTIONS:
            raise ConfigError(
                f"{override!r}: only {' and '.join(f'{s}.*' for s in _SECTIONS)} can be set here"
            )
    console = Console()
    out = Directory(arguments.out)
    opened = open_network(arguments.checkpoint, arguments.step, arguments.which)
    config = lone_config(opened.network, {"data": {"path": arguments.data}}, arguments.overrides)
    size = arguments.image_size or opened.network.config.crops.global_crop_size
    check_size(opened.network, size)
    dim, num_patches = measure(opened.network, size, patch_tokens=arguments.patch_tokens)

    settings = {
        "step": opened.step,
        "which": arguments.which,
        **settings_of(config.data),
    }
    check_settings(out, settings)
    source = Source(config.data, load_or_build(config.data, out, MANIFEST, begun=SETTINGS))
    settings |= settings_of(source.config)
    row_bytes = (1 + num_patches) * dim * (2 if arguments.dtype == "float16" else 4)
    plan = Plan(
        weights=weights_digest(opened.network),
        embed_dim=dim,
        num_patches=num_patches,
        image_size=size,
        dtype=arguments.dtype,
        precision=arguments.precision,
        batch_size=arguments.batch_size,
        rows_per_file=choose_rows_per_file(
            arguments.rows_per_file, row_bytes=row_bytes, num_images=source.num_images
        ),
        with_labels=source.has_labels,
    )
    settings |= asdict(plan)
    settings["manifest"] = hashlib.blake2b(out.read(MANIFEST), digest_size=16).hexdigest()
    if not check_settings(out, settings):
        about = {"checkpoint": opened.found.folder.uri, "num_images": source.num_images}
        out.write(SETTINGS, json.dumps({**about, **settings}, indent=1).encode())

    num_parts = plan.num_parts(source.num_images)
    missing = missing_parts(out, num_parts)
    if not missing and out.exists(SUMMARY):
        console.print(f"{out.uri} is finished: {_told(json.loads(out.read(SUMMARY)))}", soft_wrap=True)
        return
    console.print(
        f"{describe_data(source)}\n{arguments.which} of {opened.found.folder.uri}\n"
        f"parts of up to {plan.rows_per_file} rows in {out.uri}: {len(missing)} of {num_parts} to do",
        highlight=False,
        soft_wrap=True,
    )

    limit = config.data.max_bad_fraction

    def account(numbers: Sequence[int]) -> tuple[int, int]:
        num_vectors, bad = collect(out, plan, source.num_images, numbers)
        check_bad(len(bad), source.num_images, limit=limit, out=out)
        return num_vectors, len(bad)

    if missing:
        write_missing(
            partial(write_part, out=out, crops=opened.network.config.crops, plan=plan),
            opened.network,
            source,
            missing=missing,
            num_parts=num_parts,
            account=lambda numbers: account(numbers)[1],
            limit=limit,
            resources=config.resources,
            console=console,
            verbose=arguments.verbose,
        )
    num_vectors, num_bad = account(range(num_parts))
    summary = {"rows_in": source.num_images, "vectors_out": num_vectors, "quarantined": num_bad}
    out.write(SUMMARY, json.dumps(summary).encode())
    console.print(f"{out.uri}: {_told(summary)}", highlight=False, soft_wrap=True)


def _parser() -> CommandLine:
    parser = CommandLine(prog="python -m jobs.embed", description="Embed a data set with a checkpoint.")
    parser.add_argument("checkpoint", help="run directory, or a checkpoint's own folder; local or s3://")
    parser.add_argument("data", help="images: a folder, s3://bucket/prefix, or Parquet in either")
    parser.add_argument("--out", required=True, help="folder or s3://bucket/prefix that gets the parts")
    parser.add_argument("--step", type=int, default=None, help="which checkpoint (default: the newest)")
    parser.add_argument("--which", choices=("teacher", "student"), default="teacher", help="which network")
    parser.add_argument("--dtype", choices=get_args(Dtype), default="float16", help="of the vectors")
    parser.add_argument("--patch-tokens", action="store_true", help="keep those of the last block as well")
    parser.add_argument(
        "--image-size", type=positive, default=None, help="pixels (default: of a global crop)"
    )
    parser.add_argument(
        "--rows-per-file", type=positive, default=None, help="images per part (default: by their number)"
    )
    parser.add_argument("--batch-size", type=positive, default=128, help="images per forward")
    parser.add_argument(
        "--precision", choices=get_args(Precision), default="fp32", help="bf16 is faster on GPUs"
    )
    parser.add_argument("--verbose", action="store_true", help="show Ray's own logs")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. data.label_from_parent=true")
    return parser


def _told(summary: dict[str, Any]) -> str:
    return "{rows_in} images in = {vectors_out} vectors out + {quarantined} quarantined".format(**summary)


if __name__ == "__main__":
    run_main(main)
