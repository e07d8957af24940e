"""Embedding a data set: the parts that are missing, made on a pool of actors, and every row accounted for."""

import hashlib
import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from rich.console import Console

from dinoray.jobs.runs.data_lines import describe_data
from dinoray.jobs.runs.open_checkpoint import open_network, standalone_config
from dinoray.jobs.runs.write_parts import settings_of, write_missing
from dinoray.pipeline.data.manifest import load_or_build
from dinoray.pipeline.data.source import Source
from dinoray.pipeline.evaluation.backbone_outputs import check_size
from dinoray.pipeline.export.embeddings import (
    MANIFEST,
    SETTINGS,
    SUMMARY,
    Plan,
    check_bad,
    check_settings,
    choose_rows_per_file,
    collect,
    measure,
    missing_parts,
    weights_digest,
    write_part,
)
from dinoray.pipeline.storage.files import Directory


def embed_parts(arguments: Namespace) -> None:
    """Plan, refuse what does not fit what is there, embed the missing parts, and account for every row."""
    console = Console()
    out = Directory(arguments.out)
    opened = open_network(arguments.checkpoint, arguments.step, arguments.which)
    config = standalone_config(opened.network, {"data": {"path": arguments.data}}, arguments.overrides)
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


def _told(summary: dict[str, Any]) -> str:
    return "{rows_in} images in = {vectors_out} vectors out + {quarantined} quarantined".format(**summary)
