"""Packing a data set in one pass or two: the missing parts, made on a pool of actors, and every image accounted for.

An actor has room for some row groups of a Parquet source at a time, so one pass shuffles no further than among these.
Where there are more, its output goes to a folder beside the table, and a second pass makes the table from that.
"""

import hashlib
import json
from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from rich.console import Console

from dinoray.jobs.runs.data_lines import data_lines
from dinoray.jobs.runs.packing_page import PackedImages, finish_table
from dinoray.jobs.runs.parts_job import Earlier, PartsJob
from dinoray.models.errors import ConfigError, DataError
from dinoray.pipeline.data.duplicates import Indices
from dinoray.pipeline.data.manifests.manifest import Manifest, build_manifest
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.export.packing import (
    KIND,
    OF_FIRST_PASS,
    QUALITY,
    check_keys,
    packed_settings,
    shrink_pixels,
    write_part,
)
from dinoray.pipeline.export.packing_facts import KEEP, TableFacts
from dinoray.pipeline.export.packing_plan import Plan, make_plan
from dinoray.pipeline.export.parquet_parts import LEFT_OUT, QUARANTINE, SUMMARY, remove_parts
from dinoray.pipeline.storage.addresses import is_s3, split_s3_uri
from dinoray.pipeline.storage.files import Directory, MissingObject
from dinoray.pipeline.worker.config import Config

_ONE_PASS = "--one-pass"
_MADE_FROM = "_about/first_pass"
"""File of the digest of the first pass of which the parts are made."""


def pack_images(
    arguments: Namespace, config: Config, out: Directory, console: Console, *, next_command: str
) -> None:
    """Plan, refuse what does not fit what is there, pack the missing parts, and account for every image."""
    beside = Directory(f"{out.uri}-first-pass")
    for folder in (out, beside):
        _check_apart(Directory(config.data.path), folder, out)
    leaves_out = arguments.duplicates != KEEP
    if leaves_out and arguments.one_pass:
        raise ConfigError(
            f"--one-pass writes each image before all are known, so --duplicates {arguments.duplicates} cannot leave "
            "any out; leave out one of them"
        )
    max_pixels = shrink_pixels(config.crops) if arguments.shrink else None
    job = PartsJob(out, KIND, config, console, argument="source", verbose=arguments.verbose)
    source = job.list_images(
        {
            "max_pixels": max_pixels,
            "quality": QUALITY if arguments.shrink else None,
            "rows_per_file": arguments.rows_per_file,
            "duplicates": arguments.duplicates if leaves_out else None,  # as in tables of earlier versions
        }
    )
    make = partial(make_plan, source.manifest, digest=job.manifest_digest, max_pixels=max_pixels)
    plan: Plan = make(rows_per_file=arguments.rows_per_file)
    treatment = (
        "image files are stored unchanged, except damaged ones, which are left out"
        if max_pixels is None
        else f"images of more than {max_pixels} pixels are shrunk to {max_pixels} if that makes the file smaller: "
        f"no crop of {config.recipe} needs more"
    )
    images, *ignored = data_lines(source)
    about = "\n".join([f"{images}, {_megabytes(_listed_bytes(source.manifest))}", *ignored, treatment])
    facts, check = {"num_images": source.num_images}, partial(check_keys, source)
    finish = partial(
        finish_table,
        out=out,
        source=source,
        about=[images, *ignored, treatment],
        next_command=next_command,
        job=job,
    )
    two_passes = leaves_out or not (plan.mixes_all(source.manifest) or job.lacks(_ONE_PASS))
    if two_passes:
        job.settle({_ONE_PASS: arguments.one_pass})
        job.is_begun()  # or else it is refused, before it is by what follows from this
    if not two_passes or arguments.one_pass:
        job.begin({"num_parts": plan.num_parts, **plan.layout}, facts, check=check)

        def finish_one_pass(summary: Mapping[str, Any]) -> Mapping[str, Any]:
            packed = TableFacts(out, summary["num_parts"])
            return finish(
                summary, packed=PackedImages(out, packed, plan, source.config), repeats=packed.repeats()
            )

        _write(job, plan, source, about, finish=finish_one_pass)
        return
    _check_room_beside(out)
    first = job.into(beside)
    job.begin({}, facts, check=check)
    if not job.is_finished(None, _told):
        plan = make(rows_per_file=None)
        _check_nothing_else(first, out)
        first.begin({"num_parts": plan.num_parts, **plan.layout}, facts)
        _write(first, plan, source, f"{about}\n{_about_first(source, plan)}")
        packed = TableFacts(beside, plan.num_parts)
        repeats = packed.repeats()
        left_out = repeats.left_out(arguments.duplicates) if leaves_out else None
        again, earlier, digest = _first_pass(beside, config, left_out)
        _remove_others(out, digest, console)
        second = plan.again(again.manifest, digest=digest, rows_per_file=arguments.rows_per_file)
        finish_two = partial(
            finish,
            packed=PackedImages(beside, packed, plan, source.config),
            repeats=repeats,
            left_out=left_out,
        )
        about_second = "pass 2 of 2: shuffles what pass 1 wrote"
        if left_out is not None:
            about_second += f", and leaves out {len(left_out)} duplicates"
        _write(job, second, again, about_second, earlier=earlier, left_out=left_out, finish=finish_two)
    first.remove()


def _write(
    job: PartsJob,
    plan: Plan,
    source: Source,
    about: str,
    *,
    earlier: Earlier | None = None,
    left_out: Indices | None = None,
    finish: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda summary: {},
) -> None:
    job.write(
        partial(write_part, out=job.out, plan=plan, left_out=left_out),
        None,
        source,
        [plan.rows(part) for part in range(plan.num_parts)],
        identity=plan.identity,
        about=about,
        describe=_told,
        earlier=earlier,
        with_facts=plan.passes == 1,
        finish=finish,
    )


def _first_pass(beside: Directory, config: Config, left_out: Indices | None) -> tuple[Source, Earlier, str]:
    """Return what the first pass has written, as the source of the second, what became of its images, and a digest."""
    summary, quarantined = json.loads(beside.read(SUMMARY)), beside.read(QUARANTINE)
    if not summary[KIND.rows_out]:
        raise DataError(
            f"none of the {summary['rows_in']} images can be used; {beside.join(QUARANTINE)} names them with the "
            "reasons; set data.path to others"
        )
    data = config.data.model_copy(update={"path": beside.uri, **packed_settings()})
    source = Source(data, build_manifest(data, config.storage), config.storage)
    manifest = source.manifest
    if manifest.damaged:
        raise DataError(f"{manifest.uri(manifest.damaged[0])} is damaged; delete it and run again")
    if source.num_images != summary[KIND.rows_out]:
        raise DataError(
            f"{beside.uri} holds {source.num_images} images, but pass 1 wrote {summary[KIND.rows_out]}; "
            "move away what is not named part-*.parquet, or remove the folder, and run again"
        )
    # Not by ETags, which are other ones each time on a disk.
    listed = json.dumps(manifest.table.drop_columns("etag").to_pydict()).encode()
    known = quarantined + listed + (b"" if left_out is None else left_out.tobytes())
    digest = hashlib.blake2b(known, digest_size=16).hexdigest()
    bad = [json.loads(line) for line in quarantined.splitlines()]
    return source, Earlier(summary["rows_in"], bad, {name: summary[name] for name in OF_FIRST_PASS}), digest


def _remove_others(out: Directory, digest: str, console: Console) -> None:
    """Remove parts that were made from another outcome of the first pass, which had other bad images."""
    try:
        known = out.read(_MADE_FROM).decode()
    except MissingObject:
        known = digest
    if known != digest:
        console.print("pass 1 ended with other images than before: all parts are written again")
        remove_parts(out)
    out.write(_MADE_FROM, digest.encode())


def _check_nothing_else(first: PartsJob, out: Directory) -> None:
    """Raise ConfigError if the folder of the first pass holds what this job has not put there."""
    about = first.out.child("_about")
    if not first.is_begun() and ({*first.out.list()} - {"_about"} or about.list()):
        raise ConfigError(
            f"--out {out.uri}: the first pass goes to {first.out.uri}, which holds other files; "
            "move them away, or choose another --out"
        )


def _about_first(source: Source, plan: Plan) -> str:
    sizes = source.manifest.group_sizes
    if sizes is None:
        return "pass 1 of 2: decodes the images, and finds duplicates"
    num_groups = len(sizes)
    return (
        f"pass 1 of 2: shuffles the rows of {min(plan.groups_at_once, num_groups)} of {num_groups} "
        f"{source.manifest.of_kind.group}s at a "
        "time, which is what fits a part (--one-pass, if the rows are in random order already)"
    )


def _check_apart(source: Directory, folder: Directory, out: Directory) -> None:
    if f"{source.uri}/".startswith(f"{folder.uri}/") or f"{folder.uri}/".startswith(f"{source.uri}/"):
        raise ConfigError(
            f"--out {out.uri}: {folder.uri} must not be inside the folder of the images, {source.uri}, or contain it; "
            "choose another --out"
        )


def _check_room_beside(out: Directory) -> None:
    if is_s3(out.uri) and not split_s3_uri(out.uri)[1]:
        raise ConfigError(
            f"--out {out.uri}: is a bucket, beside which there is no place for the first pass; choose a folder in it"
        )


def _listed_bytes(manifest: Manifest) -> int:
    sizes = manifest.group_bytes
    return int((manifest.object_sizes if sizes is None else sizes).sum())


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"


def _told(summary: Mapping[str, Any]) -> str:
    before, after = _megabytes(summary["bytes_in"]), _megabytes(summary["bytes_out"])
    left_out = f" + {summary[LEFT_OUT]} duplicates" if LEFT_OUT in summary else ""
    counted = "{rows_in} images in = {rows_out} images out + {quarantined} quarantined".format(**summary)
    return f"{counted}{left_out}, {summary['num_shrunk']} shrunk, {before} before, {after} after"
