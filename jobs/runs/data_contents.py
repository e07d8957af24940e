"""What lies at `data.path`, from a sample: for a person who has not looked into it yet. No Ray here.

Lists for a few seconds, reads some images, and answers in lines: how many there are and where labels come from, their
formats and sizes, which could not be used, what is ignored, and the command to go on with. The facts are those by which
the recipe auto chooses, too.
"""

import time
from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import pyarrow.compute as pc

from dinoray.jobs.cli.auto_facts import Facts
from dinoray.jobs.runs.data_lines import data_lines, describe_reading
from dinoray.models.commands import command
from dinoray.pipeline.augment.config import CropsConfig
from dinoray.pipeline.data.decoding.bad_image import BadImage
from dinoray.pipeline.data.decoding.image_facts import (
    ImageFacts,
    decode_whole,
    facts_table,
    measure_image,
    open_any,
)
from dinoray.pipeline.data.duplicates import Indices
from dinoray.pipeline.data.listing.bounds import Bound
from dinoray.pipeline.data.manifests.manifest import Manifest, build_manifest
from dinoray.pipeline.data.reading.bad_kinds import kind_of
from dinoray.pipeline.data.reading.source import Source, Status
from dinoray.pipeline.data.statistics import DataStatistics, evenly
from dinoray.pipeline.export.packing import shrink_pixels
from dinoray.pipeline.storage.addresses import is_s3, split_s3_uri
from dinoray.pipeline.storage.config import Access
from dinoray.pipeline.storage.s3 import list_page
from dinoray.pipeline.worker.config import Config

_SAMPLE, _AT_ONCE, _ROW_GROUPS = 64, 16, 4
_SECONDS, _GIVE_UP_SECONDS = 5.0, 20.0
_LARGE = 4.0
"""Times the pixels that crops need from which on decoding costs so much that shrinking pays."""
_MANY_OBJECTS = 100_000
"""Objects on S3 from which on requests are worth saving."""
_LEAST_FOLDERS = 4
_GRAY = ("gray", "black and white")
"""How the names of channels begin in files whose channels do not differ."""


class Line(NamedTuple):
    """One thing that was found."""

    verdict: Literal["ok", "warn", "FAIL"]
    name: str
    text: str
    exit_code: int = 0


def look_into_data(
    config: Config, *, recipe: str | None, overrides: Sequence[str], bound: Bound | None = None
) -> tuple[list[Line], Facts]:
    """Return what lies at `config.data.path`, and the facts on the images. Raises what `build_manifest` raises.

    `recipe`: the one that is named; None: auto is to choose.
    """
    bound = bound or Bound(seconds=_SECONDS)
    storage = config.storage.model_copy(update={"give_up_after_seconds": _GIVE_UP_SECONDS})
    manifest = build_manifest(config.data, storage, bound=bound)
    source = Source(config.data, manifest, storage)
    number, about, is_exact = _num_images(manifest, bound, storage.access)
    images, *ignored = data_lines(source)
    described = images.removeprefix("data: ")
    if not is_exact:
        described = f"{number}; the part that was looked into: {described}"
    lines = [Line("ok", "contents", described), *(Line("ok", "left out", line) for line in ignored)]
    sample, bad = read_sample(source)
    if sample.num_images:
        lines.append(Line("ok", "images", _describe_sample(sample)))
    if bad:
        lines.append(_describe_bad(bad, sample.num_images + len(bad), config.data.max_bad_fraction))
    following = _next_command(config, source, sample, recipe=recipe, overrides=overrides)
    return [*lines, Line("ok", "next", following)], facts_on_images(source, sample, num_images=about)


def facts_on_images(source: Source, sample: DataStatistics, *, num_images: int) -> Facts:
    """Return the facts on the images of a source, of which `sample` was read; those on devices are not known."""
    width, height = sample.median_size()
    is_gray = bool(sample.kinds) and all(channels.startswith(_GRAY) for _, channels in sample.kinds)
    return Facts(
        num_images=num_images,
        width=width,
        height=height,
        channels=1 if is_gray else source.config.channels,
        num_classes=_num_classes(source),
    )


def _num_classes(source: Source) -> int:
    """Return the number of labels that the listing has; 0 where they stand in columns of Parquet."""
    table = source.manifest.table
    if not source.has_labels or "label" not in table.column_names:
        return 0
    return int(pc.count_distinct(table["label"], mode="only_valid").as_py())


def _num_images(manifest: Manifest, bound: Bound, access: Access) -> tuple[str, int, bool]:
    """Return the number of images in words and as it is estimated, and whether it is exact."""
    number = manifest.num_images
    if bound.is_listed_whole:
        if bound.share_of_files == 1:
            return f"{number:,} images", number, True
        in_all = _rounded(number / bound.share_of_files)
        return f"about {in_all:,} images, by the bytes of the files", in_all, False
    share = _share_of_folders(manifest, bound, access)
    if share is None:
        return f"more than {number:,} images; the listing was ended after {_SECONDS:g} s", number, False
    in_all = _rounded(number / share / bound.share_of_files)
    return f"about {in_all:,} images: {number:,} in the first {share:.0%} of the folders", in_all, False


def _share_of_folders(manifest: Manifest, bound: Bound, access: Access) -> float | None:
    """Return the share of the folders directly below the path that were listed; None if they tell nothing."""
    if not is_s3(manifest.path):
        return None
    bucket, key = split_s3_uri(manifest.path)
    page = list_page(bucket, f"{key}/" if key else "", delimiter="/", access=access)
    listed = sum(folder <= bound.last_key for folder in page.folders)
    if page.token is not None or listed < _LEAST_FOLDERS or page.objects.keys:
        return None
    return listed / len(page.folders)


def _rounded(number: float) -> int:
    """Return a number with two digits that count."""
    digits = max(0, len(str(int(number))) - 2)
    return round(number / 10**digits) * 10**digits


def read_sample(source: Source) -> tuple[DataStatistics, list[tuple[str, Status, str]]]:
    """Read and decode some images; return what the usable ones are, and key, status and reason of the others."""
    found, bad = DataStatistics(), []
    rows = _sample_rows(source.manifest)
    end = time.monotonic() + _SECONDS
    for first in range(0, len(rows), _AT_ONCE):
        facts: list[ImageFacts] = []
        for fetched in source.fetch(rows[first : first + _AT_ONCE]):
            if fetched.data is None:
                bad.append((fetched.key, fetched.status, fetched.reason))
                continue
            try:
                image = open_any(fetched.data, max_pixels=source.config.max_pixels, config=source.config)
                facts.append(measure_image(image, decode_whole(image)))
            except BadImage as error:
                bad.append((fetched.key, Status.CORRUPT, error.reason))
        found.add(facts_table(facts))
        if time.monotonic() > end:
            break
    return found, bad


def _sample_rows(manifest: Manifest) -> list[int]:
    """Return images from all over the set, in an order of which each beginning is spread too; few row groups of it."""
    groups, group_bytes = manifest.group_sizes, manifest.group_bytes
    if groups is None or group_bytes is None:
        rows: Indices = evenly(manifest.num_images, _SAMPLE)
    else:
        candidates = evenly(len(groups), 4 * _ROW_GROUPS)
        chosen = candidates[np.argsort(group_bytes[candidates], kind="stable")[:_ROW_GROUPS]]
        begins = np.cumsum(groups) - groups
        rows = np.concatenate([begins[g] + evenly(int(groups[g]), _SAMPLE // len(chosen)) for g in chosen])
        return rows.tolist()
    return np.random.default_rng(0).permutation(rows).tolist()


def _describe_sample(found: DataStatistics) -> str:
    kinds = ", ".join(f"{count} {kind} ({channels})" for (kind, channels), count in found.kinds.most_common())
    sizes = [found.median_size(), found.smallest_size(), found.largest_size()]
    median, smallest, largest = (f"{width} x {height}" for width, height in sizes)
    size = median if smallest == largest else f"median {median}, {smallest} to {largest}"
    return (
        f"{found.num_images} read: {kinds}; {size} pixels; {found.num_bytes / found.num_images / 1e3:,.1f} kB each; "
        f"values from {found.low:g} to {found.high:g} of 255"
    )


def _describe_bad(bad: Sequence[tuple[str, Status, str]], number: int, limit: float) -> Line:
    kinds = Counter(kind_of(status.name.lower(), reason) for _, status, reason in bad)
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    key, _, reason = bad[0]
    text = f"{len(bad)} of {number} that were read cannot be used ({counts}), e.g. {key}: {reason}"
    share = len(bad) / number
    if share > limit:
        enough = min(1.0, 1.5 * share)
        text += f"; a run ends above data.max_bad_fraction={limit:g}: mend them, or set it to {enough:.2g}"
    return Line("warn", "bad images", text)


def _next_command(
    config: Config, source: Source, sample: DataStatistics, *, recipe: str | None, overrides: Sequence[str]
) -> str:
    """Return the command to go on with, and why."""
    manifest = source.manifest
    named = ["--recipe", recipe] if recipe else []
    about_data = [
        one
        for one in overrides
        if one.startswith(("data.", "crops.", "storage.")) and not one.startswith("data.path=")
    ]
    needed = shrink_pixels(config.crops if recipe else CropsConfig())  # auto's crops are no larger
    width, height = sample.median_size()
    reason = ""
    if manifest.rows_per_group is not None:
        pass  # packed already
    elif width * height > _LARGE * needed:
        reason = (
            f"the median image has {width * height / 1e6:.2g} megapixels, crops need {needed / 1e6:.2g}: decoding "
            "would be most of the work"
        )
    elif reading := [
        line for line in describe_reading(source, config, most_actors=1) if command("pack") in line
    ]:
        reason = f"neighbouring rows may be alike ({reading[0].partition('; each byte')[0].removeprefix('reading: ')})"
    elif is_s3(manifest.root) and manifest.kind == "images" and manifest.num_images >= _MANY_OBJECTS:
        reason = "each image is a request per epoch: packed, 16 images are one"
    if not reason:
        return command("pretrain", *named, f"data.path={manifest.path}", *about_data)
    shrink = ["--shrink"] if width * height > _LARGE * needed else []
    pack = command("pack", manifest.path, "--out", "FOLDER", *shrink, *named, *about_data)
    return f"{reason}; `{pack}`, then `{command('pretrain', *named, 'data.path=FOLDER')}`"
