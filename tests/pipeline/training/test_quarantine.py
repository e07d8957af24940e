"""Bad images are counted exactly, over ranks and resumes, and end the run only when there are too many."""

import json

import numpy as np
import pytest
from ranks import bad_batch, two_ranks
from tiny import Batch

from dinoray.models.errors import DataError
from dinoray.pipeline.data.source import Status
from dinoray.pipeline.training.bad_images import Quarantine


def batch(*statuses: Status, first_position: int = 0) -> Batch:
    """Rows of these statuses, with a note where one is due."""
    notes = [
        json.dumps({"key": f"{first_position + i}.jpg", "reason": "because"}) if status else ""
        for i, status in enumerate(statuses)
    ]
    return {
        "position": np.arange(len(statuses)) + first_position,
        "status": np.array(statuses, np.int8),
        "note": np.array(notes, dtype=object),
    }


def check(quarantine: Quarantine, *, num_seen: int, num_images: int = 5000, limit: float = 0.01) -> None:
    quarantine.check(num_seen=num_seen, num_images=num_images, limit=limit, file="runs/demo/quarantine.jsonl")


def test_good_rows_are_not_noted() -> None:
    quarantine = Quarantine({})
    quarantine.note(batch(Status.OK, Status.OK))
    assert quarantine.share() == []
    assert quarantine.counts.total() == 0


def test_bad_rows_are_told_once_with_all_that_is_known_of_them() -> None:
    quarantine = Quarantine({})
    quarantine.note(batch(Status.OK, Status.CORRUPT, Status.MISSING, first_position=40))
    assert quarantine.share() == [
        {"position": 41, "status": "corrupt", "key": "41.jpg", "reason": "because"},
        {"position": 42, "status": "missing", "key": "42.jpg", "reason": "because"},
    ]
    assert quarantine.share() == []
    assert quarantine.counts == {"corrupt": 1, "missing": 1}


def test_records_can_be_written_as_json() -> None:
    quarantine = Quarantine({})
    quarantine.note(batch(*list(Status)))
    records = quarantine.share()
    assert json.loads(json.dumps(records)) == records
    named = ["missing", "corrupt", "unreachable", "too_large", "denied", "archived"]
    assert [record["status"] for record in records] == named


def test_records_come_by_position() -> None:
    quarantine = Quarantine({})
    quarantine.note(batch(Status.CORRUPT, first_position=9))
    quarantine.note(batch(Status.CORRUPT, first_position=2))
    assert [record["position"] for record in quarantine.share()] == [2, 9]


def test_a_resumed_run_goes_on_counting_from_its_checkpoint() -> None:
    counts = {"corrupt": 4, "missing": 1}
    quarantine = Quarantine(counts)
    quarantine.note(batch(Status.CORRUPT))
    quarantine.share()
    assert dict(quarantine.counts) == {"corrupt": 5, "missing": 1}
    assert counts == {"corrupt": 4, "missing": 1}


def test_every_process_learns_what_all_found() -> None:
    alone = Quarantine({"corrupt": 10})
    for rank in (0, 1):
        alone.note(bad_batch(rank))
    expected = alone.share()
    assert [record["position"] for record in expected] == [0, 3, 5]
    for found in two_ranks():
        assert found.found == expected
        assert found.counts == dict(alone.counts) == {"corrupt": 11, "missing": 2}


@pytest.mark.parametrize(
    ("bad", "num_seen", "ends"),
    [
        (10, 1000, False),  # just the limit
        (11, 1000, True),
        (11, 1100, False),
        (999, 999, False),  # too early to tell
        (0, 10**6, False),
    ],
)
def test_a_run_ends_when_more_than_the_limit_is_bad(bad: int, num_seen: int, ends: bool) -> None:
    quarantine = Quarantine({"corrupt": bad})
    if not ends:
        check(quarantine, num_seen=num_seen)
        return
    with pytest.raises(DataError) as caught:
        check(quarantine, num_seen=num_seen)
    assert str(caught.value) == (
        "11 of 1000 images could not be used ({'corrupt': 11}), more than data.max_bad_fraction=0.01; "
        "they are named in runs/demo/quarantine.jsonl"
    )


def test_a_small_set_is_judged_after_its_first_epoch() -> None:
    check(Quarantine({"missing": 2}), num_seen=19, num_images=20)
    with pytest.raises(DataError, match="2 of 20 images"):
        check(Quarantine({"missing": 2}), num_seen=20, num_images=20)


def test_a_limit_of_one_never_ends_a_run_and_a_limit_of_zero_allows_none() -> None:
    check(Quarantine({"missing": 2000}), num_seen=2000, limit=1.0)
    with pytest.raises(DataError, match="1 of 2000"):
        check(Quarantine({"missing": 1}), num_seen=2000, limit=0.0)
