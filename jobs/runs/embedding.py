"""Embedding a data set: the parts that are missing, made on a pool of actors, and every row accounted for."""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from rich.console import Console

from dinoray.jobs.runs.data_lines import data_lines
from dinoray.jobs.runs.open_checkpoint import open_network, standalone_config
from dinoray.jobs.runs.parts_job import PartsJob
from dinoray.pipeline.evaluation.backbone_outputs import check_size
from dinoray.pipeline.export.embeddings import (
    KIND,
    Plan,
    choose_rows_per_file,
    measure,
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

    job = PartsJob(out, KIND, config, console, argument="data", verbose=arguments.verbose)
    source = job.list_images({"step": opened.step, "which": arguments.which})
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
    job.begin(asdict(plan), {"checkpoint": opened.found.folder.uri, "num_images": source.num_images})
    job.write(
        partial(write_part, out=out, crops=opened.network.config.crops, plan=plan),
        opened.network,
        source,
        [plan.rows(part, source.num_images) for part in range(plan.num_parts(source.num_images))],
        identity=plan.identity,
        about="\n".join([*data_lines(source), f"{arguments.which} of {opened.found.folder.uri}"]),
        describe=_told,
    )


def _told(summary: Mapping[str, Any]) -> str:
    return "{rows_in} images in = {vectors_out} vectors out + {quarantined} quarantined".format(**summary)
