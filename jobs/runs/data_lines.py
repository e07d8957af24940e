"""Lines for a person: what lies at `data.path`, and on which images a run is evaluated."""

import math

import pyarrow as pa

from dinoray.models.commands import command
from dinoray.models.counts import count
from dinoray.pipeline.augment.config import crop_bytes
from dinoray.pipeline.data.listing.folder_labels import AUTO
from dinoray.pipeline.data.listing.ignored import ignored_line, some_names
from dinoray.pipeline.data.reading.reads import count_reads
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.evaluation.class_names import overlap_warnings
from dinoray.pipeline.evaluation.config import EvalConfig
from dinoray.pipeline.worker.config import Config
from dinoray.pipeline.worker.inputs import Inputs

_FEW_GROUPS = 10
"""A batch from fewer row groups may hold images that are much alike: others often store them class by class."""


def data_lines(images: Source) -> list[str]:
    """`data: 7,390 images in 37 class folders at /photos (labels from folder names; ...)`, and what is ignored there.

    Of a mix, its shares, and these lines of each source.
    """
    if images.parts:
        lines = [mixing_line(images)]
        for part, name in zip(images.parts, images.manifest.names, strict=True):
            described, *ignored = data_lines(part)
            lines += [described, *(one.replace("ignored:", f"ignored in {name}:", 1) for one in ignored)]
        return lines
    line = ignored_line(images.manifest.ignored)
    return [_describe_images(images), *([] if line is None else [line])]


def mixing_line(images: Source) -> str:
    """`mixing: photos 70% (1,200 images, 2.3 passes an epoch), web 30% (4,000 images, 0.3 passes an epoch)`."""
    weights, names = images.manifest.weights, images.manifest.names
    shares = [weight / sum(weights) for weight in weights]
    shown = (
        f"{name} {100 * share:.3g}% ({part.num_images:,} images, "
        f"{share * images.num_images / part.num_images:.2g} passes an epoch)"
        for part, name, share in zip(images.parts, names, shares, strict=True)
    )
    return f"mixing: {', '.join(shown)}"


def _describe_images(images: Source) -> str:
    manifest, notes = images.manifest, list(images.manifest.notes)
    where = ""
    if manifest.group_sizes is not None:
        where = f" in {count(manifest.objects.num_rows, manifest.of_kind.file)}"
    if manifest.of_kind.has_columns:
        columns = {"images": images.config.image_column, "keys": images.config.key_column}
        shown = ", ".join(
            f"{what} from column {name!r}" for what, name in columns.items() if name is not None
        )
        notes = [shown, *(notes or [_labels(images)])]
    else:
        notes = notes or [_labels(images)]
    labels = manifest.table["label"] if "label" in manifest.table.column_names else None
    if labels is not None and images.config.label_from_parent is True:
        folders = count(_num_different(labels), "class folder")
        outside = f" ({labels.null_count} outside of them)" if labels.null_count else ""
        where += f" in {folders}{outside}"
    if manifest.damaged:
        unreadable = count(len(manifest.damaged), f"unreadable {manifest.of_kind.file}")
        notes.append(f"{unreadable} left out: {some_names(manifest.damaged)}")
    return f"data: {count(images.num_images, 'image')}{where} at {manifest.path} ({'; '.join(notes)})"


def describe_reading(images: Source, config: Config, *, most_actors: int) -> list[str]:
    """A line on images that are shuffled in windows: how well, and what up to `most_actors` augment actors read.

    `reading: windows of 2,400 images (264 MB), shuffled; a batch of 512 is from 16 row groups, about 32 neighbours of
    each; each byte is read 1.01 times`
    """
    if images.parts:
        return []  # a batch has images of all sources
    order, manifest = images.order(config.train.seed), images.manifest
    window, sizes, num_bytes = order.window(0), manifest.group_sizes, manifest.group_bytes
    if window is None or sizes is None or num_bytes is None:
        return []
    reads = count_reads(
        manifest,
        order,
        train_workers=config.resources.most_workers,
        global_batch_size=config.train.global_batch_size,
        image_bytes=crop_bytes(config.crops),
        most_actors=most_actors,
        cpus_per_actor=config.resources.cpus_per_augment_actor,
        num_streams=config.data.streams,
    )
    batch, num_images = config.train.global_batch_size, int(sizes[window.groups].sum())
    num_groups = min(len(sizes), len(window.groups) * math.ceil(batch / num_images))
    mixed = f"about {batch / num_groups:.3g} neighbours of each"
    if manifest.labels is None and images.config.label_from_parent is True:
        labels = manifest.table["label"]  # of each row group
        here = _num_different(labels.take(window.groups))
        mixed = f"{here} of {count(_num_different(labels), 'class folder')}"
    remedy = ""
    if num_groups < min(_FEW_GROUPS, len(sizes)):
        pack = command("pack", manifest.path, "--out", "FOLDER")
        remedy = f"; `{pack}` writes Parquet whose rows are shuffled further"
    return [
        f"reading: windows of {count(num_images, 'image')} "
        f"({num_bytes[window.groups].sum() / 1e6:.3g} MB), shuffled; a batch of {batch} is from up to "
        f"{count(num_groups, manifest.of_kind.group)}, {mixed}; each byte is read {reads.times_read:.2f} times{remedy}"
    ]


def describe_evaluation(inputs: Inputs, config: EvalConfig) -> str:
    """`evaluation: k-NN of 480 images at /photos/val by 2160 at /photos/train`, or how to get it."""
    if inputs.labelled is None:
        remedy = (
            "for k-NN start a run with another name and eval.val_path=auto"
            if inputs.images.has_labels
            else "for k-NN set eval.val_path and eval.train_path to images in one folder per class"
        )
        if inputs.mismatch and config.val_path == AUTO:
            remedy = "for k-NN start a run with another name and labels that repeat"
        if not config.label_free:
            return f"evaluation: none (eval.label_free=false); {remedy}"
        return f"evaluation: RankMe and CLID, which need no labels; {remedy}"
    train, val = inputs.labelled
    voters, classified = (
        min(train.num_images, config.max_train_images),
        min(val.num_images, config.max_val_images),
    )
    if config.val_path != AUTO:
        where = f"at {val.manifest.path} by {voters:,} at {train.manifest.path}"
        return f"evaluation: k-NN of {count(classified, 'image')} {where}"
    return (
        f"evaluation: k-NN of {count(classified, 'held-out image')} by {voters:,} others of "
        f"{train.config.setting}; training uses all of them without labels; set eval.val_path=PATH to use other images"
    )


def unlabelled_warnings(labelled: tuple[Source, Source] | None, config: EvalConfig) -> list[str]:
    """A line on each set that `eval` names and that has images without a label, which are not evaluated."""
    if labelled is None or config.val_path == AUTO:
        return []
    left_out = {side.manifest.path: side.manifest.num_images - side.num_images for side in labelled}
    return [
        f"{count(number, 'image')} at {path} without a label: not evaluated; move them into class folders, or "
        "remove them"
        for path, number in left_out.items()
        if number
    ]


def evaluation_warnings(inputs: Inputs, config: EvalConfig) -> list[str]:
    """Lines on labelled images that an evaluation leaves out, and on classes that its two sets do not share."""
    mismatch = [inputs.mismatch.text] if inputs.mismatch else []
    labelled = inputs.labelled
    return [*unlabelled_warnings(labelled, config), *overlap_warnings(labelled, config), *mismatch]


def _labels(images: Source) -> str:
    """Where labels are by settings that a person has given."""
    if images.config.label_column is not None:
        return f"labels from column {images.config.label_column!r}"
    return "labels from folder names" if images.config.label_from_parent is True else "no labels"


def _num_different(labels: pa.ChunkedArray) -> int:
    return len(labels.unique().drop_null())
