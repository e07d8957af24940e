"""A run on a cluster that grows and shrinks under it: nodes, actors, images/s and data wait over time.

Ray's own autoscaler on a head without other nodes; nodes are processes of this machine. The store is made distant, so
that an actor fetches slowly while its CPU idles, and then near. `python benchmarks/growth.py`; some minutes.
"""

import argparse
import sys
import tempfile
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from growing_run import Growth, images_per_second, waits, watch_growth  # noqa: E402


def timeline(seen: Growth) -> list[str]:
    """Return one table line for each period with the same nodes and actors."""
    start = seen.records[0]["time"]
    near = seen.records[seen.far]["time"]

    def sort(record: dict[str, Any]) -> tuple[bool, float, float, float]:
        return record["time"] >= near, record["nodes_cpu"], record["augment_actors"], record["augment_target"]

    lines = []
    for (is_near, nodes, actors, target), group in groupby(seen.records, sort):
        records = list(group)
        if len(records) > 1:
            lines.append(
                f"| {records[0]['time'] - start:.0f} to {records[-1]['time'] - start:.0f} s "
                f"| {'near' if is_near else 'far'} | {nodes:.0f} | {actors:.0f} of {target:.0f} "
                f"| {images_per_second(records):.0f} | {waits(records):.0%} |"
            )
    return lines


def main() -> None:
    """Observe one run and print the table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seen = watch_growth(Path(folder), settle_seconds=90, latest_seconds=45)
    last = [r for r in seen.records if r["time"] > seen.records[-1]["time"] - 20]
    print("| | images/s | data wait |")
    print("|---|---|---|")
    for what, records in (
        ("far, 1 actor", seen.few),
        ("far, 3 actors, the last 45 s", seen.many),
        ("near, the last 20 s", last),
    ):
        print(f"| {what} | {images_per_second(records):.0f} | {waits(records):.0%} |")
    print()
    print("| time | store | CPU nodes | augment actors | images/s | data wait |")
    print("|---|---|---|---|---|---|")
    print("\n".join(timeline(seen)))
    print(f"nodes beside the head before: {len(seen.before)}, after: {len(seen.after)}; GPU nodes: ", end="")
    print(f"{max(r['nodes_gpu'] for r in seen.records):.0f} at most; ${seen.records[-1]['dollars']:.2f}")


if __name__ == "__main__":
    main()
