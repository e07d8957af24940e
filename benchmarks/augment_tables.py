"""Results of benchmarks/augment.py as rows: ratios, a Markdown table, JSON, a chart.

The input is CPU seconds by name and image, whatever their source.
"""

import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, NamedTuple

from dinoray.jobs.runs.run_files import processor

REFERENCE, OURS, FLOOR = "published", "ours", "decode only"


class Row(NamedTuple):
    """Results of one pipeline on one set of images."""

    name: str
    output: str
    """dtype of the crops; empty for a pipeline that makes none."""
    images_per_second: float
    """Images per second of one core, over all images together."""
    ratio_to_published: float | None
    """Speed relative to the published pipeline on the same image, median over the images."""
    cpu_milliseconds: float
    """CPU milliseconds per image, median over the images."""
    ratio_to_decode_only: float | None
    """Speed as a share of the decode-only speed, median over the images."""


def rows_of(seconds: Mapping[str, Sequence[float]], outputs: Mapping[str, str]) -> list[Row]:
    """Return rows from CPU seconds by name, one per image, in the same order of images for every name."""
    return [
        Row(
            name=name,
            output=outputs[name],
            images_per_second=len(own) / sum(own),
            ratio_to_published=_ratio(seconds.get(REFERENCE), own),
            cpu_milliseconds=1000 * statistics.median(own),
            ratio_to_decode_only=_ratio(seconds.get(FLOOR), own),
        )
        for name, own in seconds.items()
    ]


def _ratio(others: Sequence[float] | None, own: Sequence[float]) -> float | None:
    if others is None:
        return None
    return statistics.median(a / b for a, b in zip(others, own, strict=True))


def table(title: str, rows: Sequence[Row], left_out: Mapping[str, str]) -> str:
    """Return Markdown for RESULTS.md."""
    lines = [
        f"| {title} | crops | images/s | x published | CPU ms, median | of decode only |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        speed, ratio, share = row.images_per_second, row.ratio_to_published, row.ratio_to_decode_only
        cells = [
            f"**{row.name}**" if row.name == OURS else row.name,
            row.output or "-",
            f"{speed:.1f}" if speed < 100 else f"{speed:.0f}",
            "-" if ratio is None else f"{ratio:.2f}",
            f"{row.cpu_milliseconds:.2f}",
            "-" if share is None else f"{share:.0%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"| {name} | {reason} | - | - | - | - |" for name, reason in left_out.items()]
    if any(row.name == OURS for row in rows):
        lines += [
            "",
            "Ratios are medians of each image's. Ours decodes large JPEGs at a fraction, decode only at full size.",
        ]
    return "\n".join(lines)


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the rows as JSON values."""
    return [row._asdict() for row in rows]


def machine() -> dict[str, Any]:
    """Return the processor, and the versions of the compared packages."""
    libraries = {"torch", "torchvision", "pillow", "opencv-python-headless", "simplejpeg", "numba", "numpy"}
    libraries |= {"albumentations", "lightly", "kornia", "dinoray"}
    versions = {d.metadata["Name"].lower(): d.version for d in distributions()}
    kept = {n: v for n, v in sorted(versions.items()) if n in libraries or n.startswith("nvidia-dali")}
    return {"processor": processor(), "versions": kept}


_INK, _FAINT, _RULE = "#18181b", "#71717a", "#d4d4d8"
_COLOURS = {
    REFERENCE: "#52525b",
    "peer": "#a1a1aa",
    OURS: "#2563eb",
    "variant": "#93b4f5",
    "floor": "#ffffff",
}


def plot(sets: Mapping[str, Sequence[Row]], file: Path) -> None:
    """Plot bars of images per second, one panel per set, fastest on top; white bars make no crops."""
    import matplotlib
    from matplotlib.figure import Figure

    tallest = max(len(rows) for rows in sets.values())
    settings = {"font.size": 9, "text.color": _INK, "text.parse_math": False, "hatch.linewidth": 0.5}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(5.2 * len(sets), 0.9 + 0.3 * tallest), dpi=150, layout="constrained")
        panels = figure.subplots(1, len(sets), squeeze=False)[0]
        for panel, (title, rows) in zip(panels, sets.items(), strict=True):
            rows = sorted(rows, key=lambda row: row.images_per_second)
            speeds = [row.images_per_second for row in rows]
            bars = panel.barh([row.name for row in rows], speeds, height=0.7, linewidth=0.8)
            for bar, row in zip(bars, rows, strict=True):
                bar.set_facecolor(_COLOURS[_part(row)])
                bar.set_edgecolor(_FAINT if _part(row) == "floor" else "none")
                text = f"{row.images_per_second:.0f}"
                if row.output and row.ratio_to_published is not None:
                    text += f"   {row.ratio_to_published:.1f}x"
                weight = "bold" if row.name == OURS else "normal"
                panel.annotate(
                    text,
                    (row.images_per_second, bar.get_y() + bar.get_height() / 2),
                    xytext=(4, 0),
                    textcoords="offset points",
                    va="center",
                    weight=weight,
                )
            for side, spine in panel.spines.items():
                spine.set_visible(side == "left")
                spine.set_color(_RULE)
            panel.set_title(title, loc="left", weight="bold")
            panel.set_xticks([])
            panel.tick_params(axis="y", length=0)
            panel.set_xlim(0, max(speeds) * 1.3)
        figure.supxlabel(
            "images/s on one CPU core, and how many times the published pipeline's speed; white bars only decode",
            fontsize=8,
            color=_FAINT,
        )
        figure.savefig(file)


def _part(row: Row) -> str:
    if not row.output:
        return "floor"
    if row.name in (REFERENCE, OURS):
        return row.name
    return "variant" if row.name.startswith(OURS) else "peer"
