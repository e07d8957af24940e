"""Every position is accounted for, over ranks and resumes; only too many bad images of late end the run."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ranks import bad_batch, two_ranks
from tiny import Batch

from dinoray.models.errors import DataError, DinorayError
from dinoray.pipeline.data.reading.source import Status
from dinoray.pipeline.training.bad_images import Quarantine


def batch(*statuses: Status, first_position: int = 0, reason: str = "because") -> Batch:
    """Rows of these statuses, with a note where one is due."""
    notes = [
        json.dumps({"key": f"{first_position + i}.jpg", "reason": reason, "bytes": 7}) if status else ""
        for i, status in enumerate(statuses)
    ]
    return {
        "position": np.arange(len(statuses)) + first_position,
        "status": np.array(statuses, np.int8),
        "note": np.array(notes, dtype=object),
    }


def seen(quarantine: Quarantine, good: int, *bad: Status, positions: int, reason: str = "because") -> None:
    """Have `good` images, and bad ones after them, noted and shared; `positions` are the sum until now."""
    first = positions - good - len(bad)
    quarantine.note(batch(*[Status.OK] * good, *bad, first_position=first, reason=reason))
    quarantine.share(positions=positions)


def check(
    quarantine: Quarantine,
    *,
    num_seen: int,
    num_images: int = 5000,
    limit: float = 0.01,
    most_passes: float = 1,
) -> None:
    size = {"num_seen": num_seen, "num_images": num_images}
    quarantine.check(**size, limit=limit, file="runs/demo/quarantine.jsonl", most_passes=most_passes)


def of(bad: int, num_seen: int) -> Quarantine:
    quarantine = Quarantine()
    seen(quarantine, num_seen - bad, *[Status.CORRUPT] * bad, positions=num_seen)
    return quarantine


def resumed(quarantine: Quarantine, positions: int) -> Quarantine:
    """As a checkpoint's JSON brings it back."""
    return Quarantine.restored(json.loads(json.dumps({"positions": positions, **quarantine.meta()})))


def test_good_rows_are_only_counted() -> None:
    quarantine = Quarantine()
    quarantine.note(batch(Status.OK, Status.OK))
    assert quarantine.share(positions=2) == []
    assert (quarantine.trained, quarantine.counts.total()) == (2, 0)


def test_bad_rows_are_told_once_with_all_that_is_known_of_them() -> None:
    quarantine = Quarantine(first=40)
    quarantine.note(batch(Status.OK, Status.CORRUPT, Status.MISSING, first_position=40))
    assert quarantine.share(positions=43) == [
        {"position": 41, "status": "corrupt", "key": "41.jpg", "reason": "because", "bytes": 7},
        {"position": 42, "status": "missing", "key": "42.jpg", "reason": "because", "bytes": 7},
    ]
    assert quarantine.share(positions=43) == []
    assert quarantine.counts == {"corrupt": 1, "missing": 1}
    assert quarantine.trained == 1


def test_records_can_be_written_as_json() -> None:
    quarantine = Quarantine()
    quarantine.note(batch(*list(Status)))
    records = quarantine.share(positions=len(Status))
    assert json.loads(json.dumps(records)) == records
    named = ["missing", "corrupt", "unreachable", "too_large", "denied", "archived"]
    assert [record["status"] for record in records] == named


def test_records_come_by_position() -> None:
    quarantine = Quarantine()
    quarantine.note(batch(Status.CORRUPT, first_position=9))
    quarantine.note(batch(Status.CORRUPT, first_position=2))
    assert [record["position"] for record in quarantine.share(positions=2)] == [2, 9]


@pytest.mark.parametrize("positions", [3, 5])
def test_a_position_that_is_lost_or_comes_twice_ends_the_run(positions: int) -> None:
    quarantine = Quarantine()
    quarantine.note(batch(Status.OK, Status.OK, Status.OK, Status.CORRUPT))
    with pytest.raises(
        DinorayError, match=f"{positions} positions .* are 3 images trained on and 1 replaced"
    ):
        quarantine.share(positions=positions)


def test_every_process_learns_what_all_found() -> None:
    alone = Quarantine(first=100)
    for rank in (0, 1):
        alone.note(bad_batch(rank))
    expected = alone.share(positions=106)
    assert [record["position"] for record in expected] == [0, 3, 5]
    for found in two_ranks():
        assert found.found == expected
        assert found.counts == dict(alone.counts) == {"corrupt": 1, "missing": 2}
        assert found.trained == alone.trained == 3


# The limit


@pytest.mark.parametrize(
    ("bad", "num_seen", "ends"),
    [
        (10, 1000, False),  # just the limit
        (11, 1000, True),
        (11, 1100, False),
        (999, 999, False),  # too early to tell
        (0, 10**4, False),
    ],
)
def test_a_run_ends_when_more_than_the_limit_is_bad(bad: int, num_seen: int, ends: bool) -> None:
    quarantine = of(bad, num_seen)
    if not ends:
        check(quarantine, num_seen=num_seen)
        return
    with pytest.raises(DataError) as caught:
        check(quarantine, num_seen=num_seen)
    assert str(caught.value) == (
        "11 of the last 1000 images could not be used, more than data.max_bad_fraction=0.01; in the whole run: "
        "11 changed file or damaged shard (999.jpg: because); mend or remove them, or raise data.max_bad_fraction; "
        "they are named in runs/demo/quarantine.jsonl"
    )


def test_the_five_commonest_reasons_are_told_with_an_example_each() -> None:
    quarantine, positions = Quarantine(), 0
    for number in range(7):
        positions += 100 + number
        bad = [Status.CORRUPT] * (number + 1)
        seen(quarantine, 99, *bad, positions=positions, reason=f"trouble {'abcdefg'[number]}: 12")
    with pytest.raises(DataError) as caught:
        check(quarantine, num_seen=positions, num_images=100)
    told = str(caught.value).split("in the whole run: ")[1].split("; ")[:-2]
    assert [reason.split(" (")[0] for reason in told] == [
        f"{n} trouble {name}" for n, name in zip((7, 6, 5, 4, 3), "gfedc", strict=True)
    ]
    assert told[0].endswith(".jpg: trouble g: 12)")


def test_reasons_that_all_differ_do_not_grow_without_bound() -> None:
    quarantine = Quarantine()
    for number in range(300):
        words = "".join("abcdefghij"[int(digit)] for digit in str(number))
        seen(quarantine, 0, Status.CORRUPT, positions=number + 1, reason=f"{words}: 1")
    kinds = quarantine.meta()["bad_kinds"]
    assert len(kinds) <= 101
    assert sum(times for times, *_ in kinds.values()) == 300


def test_a_small_set_is_judged_after_its_first_epoch() -> None:
    check(of(2, 19), num_seen=19, num_images=20)
    with pytest.raises(DataError, match="2 of the last 20 images"):
        check(of(2, 20), num_seen=20, num_images=20)


def test_a_limit_of_one_never_ends_a_run() -> None:
    check(of(2000, 2000), num_seen=2000, limit=1.0)


def test_one_bad_image_of_a_small_set_ends_no_run() -> None:
    check(of(1, 42), num_seen=42, num_images=42)
    check(of(2, 84), num_seen=84, num_images=42)  # the same one in each epoch
    with pytest.raises(DataError, match=r"2 of the last 42 images"):
        check(of(2, 42), num_seen=42, num_images=42)
    check(of(3, 42), num_seen=42, num_images=42, most_passes=2.5)  # one of a source that comes more often
    with pytest.raises(DataError, match=r"4 of the last 42 images"):
        check(of(4, 42), num_seen=42, num_images=42, most_passes=2.5)


def test_a_limit_of_zero_allows_none() -> None:
    with pytest.raises(DataError, match="1 of the last 2000"):
        check(of(1, 2000), num_seen=2000, limit=0.0)


def test_a_folder_that_is_lost_late_ends_the_run_soon() -> None:
    quarantine, epoch = Quarantine(), 1000
    for number in range(1, 51):
        seen(quarantine, epoch, positions=number * epoch)
        check(quarantine, num_seen=number * epoch, num_images=epoch, limit=0.04)
    seen(quarantine, 900, *[Status.MISSING] * 100, positions=51 * epoch)  # a fifth of a percent of all
    with pytest.raises(DataError, match="100 of the last 2000 images"):
        check(quarantine, num_seen=51 * epoch, num_images=epoch, limit=0.04)


@given(
    rows=st.lists(st.lists(st.sampled_from([Status.OK, Status.OK, Status.MISSING]), max_size=9), max_size=30),
    stops=st.sets(st.integers(0, 29)),
    num_images=st.integers(1, 40),
)
def test_stops_change_neither_counts_nor_when_a_run_ends(
    rows: list[list[Status]], stops: set[int], num_images: int
) -> None:
    whole, parts, positions = Quarantine(), Quarantine(), 0
    for number, statuses in enumerate(rows):
        positions += len(statuses)
        ends = []
        for quarantine in (whole, parts):
            quarantine.note(batch(*statuses, first_position=positions - len(statuses)))
            quarantine.share(positions=positions)
            try:
                check(quarantine, num_seen=positions, num_images=num_images, limit=0.4)
                ends.append("")
            except DataError as error:
                ends.append(str(error))
        assert ends[0] == ends[1]
        if number in stops:
            parts = resumed(parts, positions)
        assert (whole.trained, whole.counts, whole.meta()) == (parts.trained, parts.counts, parts.meta())


def test_positions_of_the_run_that_it_goes_on_from_are_not_counted() -> None:
    quarantine = Quarantine(first=1000)
    seen(quarantine, 8, *[Status.CORRUPT] * 2, positions=1010)
    quarantine = resumed(quarantine, 1010)
    seen(quarantine, 10, positions=1020)
    assert (quarantine.trained, quarantine.counts) == (18, {"corrupt": 2})
    with pytest.raises(DataError, match=r"^2 of the last 20 images"):
        check(quarantine, num_seen=1020, num_images=20, limit=0.04)


def test_a_checkpoint_of_an_earlier_version_goes_on_counting() -> None:
    quarantine = Quarantine.restored({"positions": 90, "bad_images": {"corrupt": 4, "missing": 1}})
    seen(quarantine, 9, Status.CORRUPT, positions=100)
    assert quarantine.counts == {"corrupt": 5, "missing": 1}
    assert quarantine.trained == 94
