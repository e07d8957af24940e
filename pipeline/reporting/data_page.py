"""The page about a data set: counts, formats, sizes, shapes, values, labels, bad images, duplicates and samples.

One self-contained HTML file, made of counts and pictures that others have gathered. No files and no Ray here.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dinoray.pipeline.data.statistics import Bars, DataStatistics
from dinoray.pipeline.reporting.bad_images import kinds
from dinoray.pipeline.reporting.page import (
    Html,
    charts,
    commands,
    contents,
    details,
    escape,
    facts,
    page,
    picture,
    section,
    sentences,
    table,
    tiles,
)

_MOST_LABELS, _MOST_KINDS, _MOST_BAD, _MOST_SIZES = 20, 12, 50, 10
_OF_WHICH = (
    "Of the {:,} images that could be decoded, as they were found: not shrunk, with duplicates. Values are 0 to "
    "255, of JPEGs at a reduced size."
)
_WIDTH, _ROW, _LEFT, _RIGHT = 360, 22, 120, 70  # pixels of a histogram


class Pairs(NamedTuple):
    """Images that repeat an earlier one."""

    num_exact: int
    num_near: int
    num_left_out: int
    num_other_label: int
    """Pairs whose labels differ."""
    sheet: bytes
    """Some pairs as PNG."""
    file: str
    """Address of the list."""


class DataPage(NamedTuple):
    """What a page shows."""

    address: str
    about: Sequence[str]
    """Lines on where the images come from, and what has been done."""
    num_images: int
    """Images that were found; those that are described are the ones that could be decoded."""
    num_packed: int
    statistics: DataStatistics
    bad: Sequence[Mapping[str, Any]]
    """The unusable images: key, status and reason."""
    bad_file: str
    ignored: Sequence[str]
    """Lines on what lay there and was not taken for an image."""
    pairs: Pairs
    samples: bytes
    """Some images as PNG."""
    next_commands: Mapping[str, str]


def build_data_page(data: DataPage) -> str:
    """Return the page as HTML: the same for the same data."""
    found = data.statistics
    sections = [
        section("Samples", picture(data.samples, "images from all over the set")),
        section("Formats", table(_formats(found))),
        section("Sizes and values", _sizes(found), note=_OF_WHICH.format(found.num_images)),
        _labels(found),
        _bad(data),
        section("Ignored", sentences(data.ignored), note="Objects and files that are no images."),
        _duplicates(data.pairs),
        section("Next", commands(data.next_commands)),
    ]
    title = f"{data.num_packed:,} images"
    head = Html(f'<h1>{escape(title)}</h1>\n<p class="address">{escape(data.address)}</p>')
    return page(title, [head, sentences(data.about), contents(sections), tiles(_tiles(data)), *sections])


def _tiles(data: DataPage) -> list[tuple[str, str, str]]:
    found, pairs = data.statistics, data.pairs
    width, height = found.median_size()
    classes = len([label for label in found.labels if label is not None])
    return [
        ("images found", f"{data.num_images:,}", ""),
        ("packed", f"{data.num_packed:,}", f"{data.num_packed / max(1, data.num_images):.2%}"),
        ("bad", f"{len(data.bad):,}", "left out"),
        ("exact duplicates", f"{pairs.num_exact:,}", ""),
        ("near-duplicates", f"{pairs.num_near:,}", ""),
        ("duplicates left out", f"{pairs.num_left_out:,}", ""),
        (
            "bytes of images",
            f"{found.num_bytes / 1e6:,.1f} MB",
            f"{found.num_bytes / max(1, found.num_images) / 1e3:,.1f} kB each",
        ),
        ("median size", f"{width} x {height}", "pixels"),
        *([("classes", f"{classes:,}", "")] if classes else []),
    ]


def _formats(found: DataStatistics) -> list[dict[str, Any]]:
    return [
        {
            "format": kind,
            "channels": channels,
            "images": f"{count:,}",
            "share": f"{count / found.num_images:.2%}",
        }
        for (kind, channels), count in found.kinds.most_common(_MOST_KINDS)
    ]


def _sizes(found: DataStatistics) -> Html:
    if not found.num_images:
        return Html("")
    smallest, largest = found.smallest_size(), found.largest_size()
    common = [
        {"width": size[0], "height": size[1], "images": f"{count:,}"}
        for size, count in found.sizes.most_common(_MOST_SIZES)
    ]
    lines = facts(
        {
            "smallest": f"{smallest[0]} x {smallest[1]} pixels",
            "largest": f"{largest[0]} x {largest[1]} pixels",
            "range of values": f"{found.low:g} to {found.high:g}",
            "images of one colour": f"{found.num_constant:,}",
        }
    )
    histograms = {
        "Pixels": "pixels",
        "Bytes of a file": "bytes",
        "Width : height": "shape",
        "Mean of an image": "mean",
    }
    drawn = charts([(title, _drawn(found.bars(name))) for title, name in histograms.items()])
    return Html(f"{lines}{drawn}{details('Commonest sizes', table(common))}")


def _labels(found: DataStatistics) -> Html:
    labels = {label: count for label, count in found.labels.items() if label is not None}
    if not labels:
        return Html("")
    ordered = sorted(labels.items(), key=lambda one: (-one[1], one[0]))
    rows = [{"label": label, "images": f"{count:,}"} for label, count in ordered[:_MOST_LABELS]]
    counts = [count for _, count in ordered]
    values = {
        "classes": f"{len(labels):,}",
        "images in the largest and smallest class": f"{counts[0]:,} and {counts[-1]:,}",
        "images without a label": f"{found.labels[None]:,}",
    }
    more = f"The {_MOST_LABELS} largest of {len(labels):,} classes." if len(labels) > _MOST_LABELS else ""
    return section("Labels", facts(values), table(rows), note=more)


def _bad(data: DataPage) -> Html:
    rows = list(data.bad[:_MOST_BAD])
    shown = f"first {len(rows)} of {len(data.bad):,}" if len(rows) < len(data.bad) else f"all {len(rows)}"
    named = [{name: row.get(name, "") for name in ("key", "status", "reason")} for row in rows]
    return section(
        "Bad images",
        table(kinds(data.bad)),
        details(f"Bad images: {shown}", table(named)) if rows else Html(""),
        note=f"Not packed. All are named in {data.bad_file}." if rows else "",
    )


def _duplicates(pairs: Pairs) -> Html:
    if not pairs.num_exact + pairs.num_near:
        return Html("")
    lines = [
        f"{pairs.num_exact:,} images are byte for byte the same as an earlier one, {pairs.num_near:,} nearly the same "
        f"picture; {pairs.num_left_out:,} of them were left out. All are listed in {pairs.file}."
    ]
    if pairs.num_other_label:
        lines.append(f"In {pairs.num_other_label:,} pairs the two labels differ.")
    return section("Duplicates", sentences(lines), picture(pairs.sheet, "original, then duplicate"))


def _drawn(bars: Bars) -> str:
    """Return horizontal bars as SVG, in the colours of the page."""
    most, room = max(bars.counts, default=0), _WIDTH - _LEFT - _RIGHT
    rows = []
    for number, (label, count) in enumerate(zip(bars.labels, bars.counts, strict=True)):
        y = number * _ROW
        width = room * count / max(1, most)
        rows.append(
            f'<text x="{_LEFT - 8}" y="{y + 15}" text-anchor="end">{escape(label)}</text>'
            f'<rect x="{_LEFT}" y="{y + 3}" width="{width:.1f}" height="{_ROW - 6}" fill="var(--series-1)"/>'
            f'<text x="{_LEFT + width + 6:.1f}" y="{y + 15}">{count:,}</text>'
        )
    height = max(1, len(bars.counts)) * _ROW
    return f'<svg viewBox="0 0 {_WIDTH} {height}" font-size="11" fill="var(--ink)">{"".join(rows)}</svg>'
