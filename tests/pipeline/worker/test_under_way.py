"""Which evaluations beside training are under way: their order, their number, and which are given up."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinoray.pipeline.worker.under_way import TimeLimit, UnderWay, due_between

events = st.lists(st.sampled_from(["due", "arrives", "fails", "fails for good"]), max_size=60)


@given(events, st.integers(1, 4), st.integers(1, 4))
def test_each_is_worked_at_in_its_turn_until_it_arrives_or_is_given_up(
    events: list[str], most: int, most_tries: int
) -> None:
    """Against a list of all that was asked for, in which each has its fate."""
    under_way: UnderWay[str] = UnderWay(most=most, most_tries=most_tries)
    asked, ended, tries, arrived = list[int](), 0, 0, list[int]()
    for event in events:
        waiting = asked[ended:]
        assert under_way.steps == waiting
        assert under_way.has_room == (len(waiting) < most)
        assert under_way.oldest == ((waiting[0], f"weights {waiting[0]}") if waiting else None)
        if event == "due":
            if under_way.has_room:
                step = 10 * (len(asked) + 1)
                asked.append(step)
                under_way.add(step, f"weights {step}")
        elif waiting and event == "arrives":
            arrived.append(under_way.arrived())
            assert arrived[-1] == waiting[0]
            ended, tries = ended + 1, 0
        elif waiting:
            tries += 1
            is_last = tries == most_tries or event == "fails for good"
            assert under_way.failed(for_good=event == "fails for good") == is_last
            ended, tries = (ended + 1, 0) if is_last else (ended, tries)
    assert arrived == sorted(set(arrived))


def test_one_more_may_be_asked_for_where_there_is_no_room_but_no_earlier_step() -> None:
    under_way: UnderWay[None] = UnderWay(most=1, most_tries=1)
    under_way.add(10, None)
    under_way.add(20, None)
    assert under_way.steps == [10, 20]
    with pytest.raises(AssertionError, match=r"step 20 after \[10, 20\]"):
        under_way.add(20, None)


def test_the_longest_evaluation_says_how_long_another_may_take() -> None:
    limit = TimeLimit("auto", outage_seconds=60)
    for begun_at, took, minutes in ((0, 60, 30), (5000, 600, 100), (9000, 60, 100)):
        limit.begin(begun_at)
        limit.arrived(begun_at + took)
        assert limit.seconds == 60 * (minutes + 1)
    limit.begin(10_000)
    assert not limit.is_over(16_060)
    assert limit.is_over(16_061)


def test_the_first_evaluation_may_take_a_day_unless_minutes_are_set() -> None:
    assert TimeLimit("auto", outage_seconds=60).seconds == 24 * 3600 + 60
    assert TimeLimit(2.5, outage_seconds=60).seconds == 150


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 60), st.integers(1, 60))
def test_what_is_due_is_each_multiple_and_the_last_step(
    first: int, last: int, total: int, every: int
) -> None:
    expected = [step for step in range(first + 1, last + 1) if step % every == 0 or step == total]
    assert due_between(first, last, total=total, every=every) == expected
