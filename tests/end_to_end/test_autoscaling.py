"""Nodes come when the trainer waits for data, and go when it does not."""

from pathlib import Path

import pytest
from growing_run import MOST_ACTORS, waits, watch_growth

pytestmark = [
    *(pytest.mark.nightly, pytest.mark.ray, pytest.mark.s3, pytest.mark.slow),
    pytest.mark.timeout(1500),  # more than its waits together may take
]


def test_cpu_nodes_follow_the_trainers_wait_for_data_and_no_gpu_node_is_started(tmp_path: Path) -> None:
    seen = watch_growth(tmp_path)
    records, few, many = seen.records, seen.few, seen.many

    assert seen.before == []
    assert (few[0]["nodes_cpu"], many[-1]["nodes_cpu"]) == (1, MOST_ACTORS)
    assert waits(many) < waits(few)
    assert records[-1]["augment_target"] < MOST_ACTORS
    assert records[-1]["nodes_cpu"] < MOST_ACTORS
    assert waits(records[seen.far :]) < 0.1
    assert seen.after == []
    assert all(r["nodes_gpu"] == 0 and r["nodes_head"] == 1 for r in records)
    sizes = [r["augment_target"] for r in records]
    assert sorted(sizes[: seen.far]) == sizes[: seen.far], "it only grows while it starves"
    assert sorted(sizes[seen.far :], reverse=True) == sizes[seen.far :], "and only shrinks while it is fed"
    assert records[-1]["dollars"] > records[0]["dollars"] > 0
    assert "the same command resumes from step" in seen.output
    assert "nodes 1 head + 3 cpu  augment actors 3 of 3" in seen.output
