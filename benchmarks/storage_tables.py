"""The tables of benchmarks/storage.py: medians of rounds, ratios, and what is kept of a rate far from the store."""

import statistics
from typing import Any

KEPT = 0.85
"""Share of its rate near the store that our stream must keep far from it."""

Row = dict[str, Any]
"""Figures of one round of one candidate."""
Results = dict[tuple[str, str], dict[float, list[Row | str]]]
"""(set, candidate) -> latency in seconds -> its rounds, each with figures, or why there are none."""


def median_row(rounds: list[Row]) -> Row:
    """Return the median of each figure."""
    return {name: statistics.median(row[name] for row in rounds) for name in rounds[0]}


def table(results: Results) -> str:
    """Return Markdown: a row for each candidate and latency; a ratio is ours of the same set by theirs."""
    head = "| set | candidate | latency, ms | images/s | ours / it | CPU ms per image | it / ours "
    lines = [f"{head}| bytes read / used | GETs per image | proxy, cores |", "|---" * 10 + "|"]
    for (layout, name), by_latency in results.items():
        for latency, rounds in by_latency.items():
            start = f"| {layout} | {name} | {1000 * latency:g} | "
            good = [row for row in rounds if isinstance(row, dict)]
            if not good:
                lines.append(f"{start}{rounds[0]} |" + " |" * 6)
                continue
            row, ours = median_row(good), our_row(results, layout, latency)
            quicker = f"{ours['images_per_second'] / row['images_per_second']:.2f}" if ours else "-"
            dearer = f"{row['cpu_ms'] / ours['cpu_ms']:.2f}" if ours else "-"
            lines.append(
                f"{start}{row['images_per_second']:.0f} | {quicker} | {row['cpu_ms']:.1f} | {dearer} | "
                f"{row['bytes_read_per_used']:.2f} | {row['gets_per_image']:.3f} | {row['proxy_cores']:.2f} |"
            )
    return "\n".join(lines)


def our_row(results: Results, layout: str, latency: float) -> Row | None:
    """Return our medians for a set; the formats of other libraries are compared with our packed set."""
    own = results.get((layout, "ours")) or results.get(("packed", "ours")) or {}
    rounds = [row for row in own.get(latency, []) if isinstance(row, dict)]
    return median_row(rounds) if rounds else None


def kept(results: Results) -> list[str]:
    """Return a line for each set: the share of its rate that our stream keeps at the largest latency."""
    lines = []
    for layout, name in results:
        latencies = results[layout, name]
        near, far = (our_row(results, layout, pick(latencies)) for pick in (min, max))
        if name != "ours" or near is None or far is None or len(latencies) < 2:
            continue
        share = far["images_per_second"] / near["images_per_second"]
        lines.append(
            f"ours, {layout}: {share:.0%} of its rate at {1000 * min(latencies):g} ms is kept at "
            f"{1000 * max(latencies):g} ms ({'' if share >= KEPT else 'not '}at least {KEPT:.0%})"
        )
    return lines
