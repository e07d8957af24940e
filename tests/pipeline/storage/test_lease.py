"""The lease as pure logic: who gets it and when; two drivers never hold it at once, whatever is lost or late."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lease_simulation import Fate, Life, Simulation, Store, holder

from dinoray.pipeline.storage.lease import (
    TIMING,
    Found,
    Lease,
    Read,
    Record,
    State,
    Write,
)

SECONDS = st.sampled_from([0.0, 0.01, 0.5, 3.0, 9.0, 11.0, 28.0, 33.0, 50.0])
FATES = st.builds(
    Fate,
    SECONDS,
    SECONDS,
    is_lost=st.sampled_from([False, False, True]),
    is_answer_lost=st.sampled_from([False, False, True]),
)
TIMES = st.floats(0, 200, allow_nan=False)
LIVES = st.builds(
    lambda starts, lasts, gives_back, rate, sleeps, pause: Life(
        starts, starts + lasts, gives_back, rate, starts + sleeps, starts + sleeps + pause
    ),
    starts=TIMES,
    lasts=TIMES,
    gives_back=st.booleans(),
    rate=st.sampled_from([0.97, 1.0, 1.03]),
    sleeps=TIMES,
    pause=st.sampled_from([0.0, 5.0, 29.0, 35.0, 90.0]),
)


def always(request_seconds: float = 0.0, answer_seconds: float = 0.0) -> Iterator[Fate]:
    return itertools.repeat(Fate(request_seconds, answer_seconds))


@given(
    lives=st.lists(LIVES, min_size=2, max_size=4),
    fates=st.lists(FATES, min_size=1, max_size=30),
    same_machine=st.booleans(),
)
@settings(max_examples=400)
def test_two_drivers_never_hold_the_lease_at_once(
    lives: list[Life], fates: list[Fate], same_machine: bool
) -> None:
    simulation = Simulation(lives, itertools.cycle(fates), same_machine=same_machine)

    def check(now: float) -> None:
        assert len(simulation.holders(now)) <= 1

    simulation.run(500, check)


@given(
    faults=st.lists(
        st.sampled_from([Fate(), Fate(answer_seconds=9), Fate(is_answer_lost=True), Fate(9, 0.5), Fate(20)]),
        min_size=1,
        max_size=4,
    ),
    cut_off=st.integers(4, 30),
    rates=st.sampled_from([(0.97, 1.03), (1.0, 1.0), (1.03, 0.97)]),
    starts=st.floats(0, 2),
)
@settings(max_examples=300)
def test_a_holder_that_is_cut_off_is_unsure_before_another_takes_the_lease(
    faults: list[Fate], cut_off: int, rates: tuple[float, float], starts: float
) -> None:
    """Others start every two seconds: those that see a renewal are refused, and one sees the last as it is made."""
    slow, fast = rates
    first = Life(rate=slow, faults=(Fate(), Fate(), *faults), cut_off=cut_off)
    watchers = [Life(0.01 + starts + 2 * i, rate=fast) for i in range(25)]
    simulation = Simulation([first, *watchers], always())

    def check(now: float) -> None:
        assert len(simulation.holders(now)) <= 1

    simulation.run(120, check)
    assert simulation.drivers[0].lease.valid_until < simulation.drivers[0].clock(120)


@given(faults=st.lists(FATES, max_size=20), seconds=st.floats(1, 100))
def test_a_lone_driver_gets_the_lease_and_keeps_it_through_any_outage(
    faults: list[Fate], seconds: float
) -> None:
    simulation = Simulation([Life()], itertools.chain(faults, always()))
    simulation.run(1000 + seconds)
    (driver,) = simulation.drivers
    assert driver.lease.state is State.HELD
    assert simulation.holders(1000 + seconds) == [driver.name]
    assert simulation.store.record is not None


@given(starts=st.floats(10, 20))
def test_a_second_driver_is_refused_after_one_renewal(starts: float) -> None:
    simulation = Simulation([Life(), Life(starts)], always(0.05, 0.05))
    first, second = simulation.drivers
    simulation.run(starts + TIMING.renew + TIMING.poll + 0.5)
    assert (first.lease.state, second.lease.state) == (State.HELD, State.REFUSED)
    assert second.lease.other is not None
    assert second.lease.other.holder == holder(first.name)
    simulation.run(500)
    assert simulation.store.record == first.lease.record


@given(killed=st.floats(5, 20), starts=st.floats(5, 60))
def test_the_lease_of_a_killed_driver_is_free_a_term_after_it_was_first_seen(
    killed: float, starts: float
) -> None:
    simulation = Simulation([Life(ends=killed), Life(max(starts, killed + 0.01))], always())
    second = simulation.drivers[1]
    waits = TIMING.term + TIMING.margin
    simulation.run(second.life.starts + waits - 0.1)
    assert second.lease.state is State.WATCHING
    simulation.run(second.life.starts + waits + 2 * TIMING.poll)
    assert second.lease.state is State.HELD


@pytest.mark.parametrize("gives_back", [True, False])
def test_a_driver_that_has_ended_here_or_has_given_back_makes_nobody_wait(gives_back: bool) -> None:
    lives = [Life(ends=10, gives_back=gives_back), Life(11)]
    simulation = Simulation(lives, always(), same_machine=not gives_back)
    simulation.run(11.5)
    assert simulation.drivers[1].lease.state is State.HELD
    assert simulation.holders(11.5) == [simulation.drivers[1].name]


def test_a_driver_that_lives_on_this_machine_is_known_to_at_once() -> None:
    simulation = Simulation([Life(sleeps=5), Life(100)], always(), same_machine=True)
    simulation.run(100.5)
    assert simulation.drivers[1].lease.state is State.REFUSED


def test_a_holder_that_was_taken_over_finds_out_and_writes_no_more() -> None:
    simulation = Simulation([Life(sleeps=10, wakes=100), Life(20)], always())
    first, second = simulation.drivers
    simulation.run(99)
    assert (first.lease.state, second.lease.state) == (State.HELD, State.HELD)
    assert simulation.holders(99) == [second.name]
    simulation.run(101)
    assert first.lease.state is State.LOST
    simulation.run(200)
    assert second.lease.state is State.HELD


def test_of_two_that_start_at_once_one_is_refused() -> None:
    simulation = Simulation([Life(), Life()], always(0.1, 0.1))
    simulation.run(3)
    assert sorted(driver.lease.state.value for driver in simulation.drivers) == ["held", "refused"]


def test_a_renewal_whose_answer_was_lost_is_known_from_the_record() -> None:
    fates = itertools.chain([Fate()] * 2, [Fate(is_answer_lost=True)], always())
    simulation = Simulation([Life()], fates)
    simulation.run(60)
    (driver,) = simulation.drivers
    assert driver.lease.state is State.HELD
    assert simulation.holders(60) == [driver.name]


def test_a_record_that_a_person_deletes_is_written_again() -> None:
    store = Store()
    simulation = Simulation([Life()], always(), store=store)
    simulation.run(10)
    store.record = None
    simulation.run(20)
    assert store.record == simulation.drivers[0].lease.record


def test_a_record_is_what_was_encoded_and_nothing_else_is_one() -> None:
    record = Record(holder("a"), renewals=3, is_given_back=True)
    assert Record.decode(record.encode()) == record
    assert asdict(record) == json.loads(record.encode())
    for torn in (b"", record.encode()[:-9], b"[]", b"{}", b'{"holder": 1}', b"\xff"):
        assert Record.decode(torn) is None


def test_an_unreadable_record_is_waited_for_like_another_drivers() -> None:
    lease, now = Lease(holder("a"), is_gone=lambda other: None), 0.0
    while lease.state is State.WATCHING:
        assert lease.request(now) == Read()
        lease.answer(Found(None, "7"), now=now)
        now += TIMING.poll
    assert now > TIMING.term + TIMING.margin
    lease.take()
    assert lease.request(now) == Write(Record(holder("a")), "7")
