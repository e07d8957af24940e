"""The size of the augment pool against a trainer and actors of known speed, by the second."""

import math
import pickle
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from dinoray.pipeline.cluster.pool_size import (
    FED,
    STARVED,
    Actors,
    PoolSize,
    TrainerReading,
    divide_work,
    share_actors,
)


@dataclass
class Cluster:
    """A trainer that takes `demand` images/s, actors that make `rate` each and take `boot` seconds to come up."""

    demand: float
    rate: float
    boot: int
    most: int = 10_000
    """Actors that find a place."""
    link: float = math.inf
    """Images/s that reach the trainer at most."""
    pool: PoolSize = field(default_factory=lambda: PoolSize(1, 64, target=1, cool_down_seconds=30))
    sizes: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _ages: list[int] = field(default_factory=list)

    @property
    def running(self) -> int:
        return sum(age >= self.boot for age in self._ages[: self.most])

    @property
    def images_per_second(self) -> float:
        return min(self.demand, self.link, self.rate * self.running)

    @property
    def data_wait(self) -> float:
        return 1 - self.images_per_second / self.demand

    def run(self, seconds: int) -> "Cluster":
        for now in range(len(self.sizes), len(self.sizes) + seconds):
            target = self.pool.target
            self._ages = [age + 1 for age in self._ages[:target]] + [0] * (target - len(self._ages))
            self.pool.observe(Actors(self.running, target - self.running), now)
            if self.running and now % 5 == 4:
                images = 5 * self.images_per_second
                self.pool.adjust(TrainerReading(5, 5 * self.data_wait, images, images / self.rate), now)
                self.notes += [self.pool.note] if self.pool.note else []
            self.sizes.append(self.pool.target)
        return self

    @property
    def changes(self) -> list[int]:
        return [b for a, b in zip(self.sizes, self.sizes[1:], strict=False) if a != b]


def test_a_starving_trainer_gets_the_actors_it_takes_and_no_more() -> None:
    cluster = Cluster(demand=100, rate=10, boot=20).run(300)
    assert cluster.running == 10
    assert cluster.data_wait == 0
    assert cluster.changes == [4, 10]  # fourfold at most, then 4 / (1 - 60 %)


def test_nothing_is_decided_before_the_actors_asked_for_are_up() -> None:
    cluster = Cluster(demand=100, rate=10, boot=40).run(60)
    assert cluster.changes == [4]
    cluster.run(100)
    assert cluster.changes == [4, 10]


def test_idle_actors_go_after_the_cool_down_and_the_busy_ones_stay_with_headroom() -> None:
    cluster = Cluster(demand=100, rate=10, boot=1).run(100)
    cluster.demand = 40
    cluster.run(20)
    assert cluster.running >= 9  # the time before counts too
    cluster.run(100)
    assert cluster.running == 5  # 4 that are busy, and a quarter
    assert cluster.data_wait == 0


def test_a_trainer_that_waits_at_times_keeps_its_actors() -> None:
    pool = PoolSize(1, 8, target=8, cool_down_seconds=30)
    for now in range(0, 600, 5):
        pool.observe(Actors(8, 0), now)
        pool.adjust(TrainerReading(5, 0.4 if now % 25 == 0 else 0, 50, 5), now)
    assert pool.target == 8


def test_what_more_actors_cannot_mend_is_told_and_ends_the_growth() -> None:
    cluster = Cluster(demand=100, rate=10, boot=1, link=35).run(600)
    assert cluster.sizes[-1] < 30
    assert [note.partition(":")[0] for note in cluster.notes] == [
        "12 augment actors instead of 4 brought +0% images/s"
    ]


def test_legs_of_a_run_go_on_with_what_the_pool_has_come_to_know() -> None:
    pool = PoolSize(1, 200, target=4, cool_down_seconds=30)
    cluster = Cluster(demand=100, rate=10, boot=5, link=35, pool=pool)
    for _ in range(20):
        cluster.run(61)
        cluster.pool = pickle.loads(pickle.dumps(cluster.pool))
        cluster._ages = []  # each leg's actors are new
    assert max(cluster.sizes) == 12  # that growth is judged, though no leg is long enough for it
    (note,) = cluster.notes
    assert note.startswith(
        "12 augment actors instead of 4 brought +0% images/s: it is not CPUs that are short;"
    )


def test_growth_in_vain_up_to_the_most_is_not_told_as_a_lack_of_actors() -> None:
    pool = PoolSize(1, 12, target=1, cool_down_seconds=30)
    notes = Cluster(demand=100, rate=10, boot=1, link=35, pool=pool).run(3000).notes
    assert notes
    assert all("it is not CPUs that are short" in note for note in notes)


def test_a_trainer_that_starves_with_all_actors_there_may_be_is_told_of_once() -> None:
    pool = PoolSize(1, 6, target=1, cool_down_seconds=30)
    (note,) = Cluster(demand=100, rate=10, boot=1, pool=pool).run(600).notes
    assert note.startswith("training waits for data 40% of the time with all 6 augment actors there may be:")


def test_places_that_the_cluster_does_not_have_are_not_asked_for_again_and_again() -> None:
    cluster = Cluster(demand=100, rate=10, boot=1, most=3).run(600)
    assert cluster.running == 3
    assert cluster.changes == [4]


def test_the_range_is_kept() -> None:
    pool = PoolSize(2, 6, target=2, cool_down_seconds=10)
    few = Cluster(demand=1000, rate=10, boot=1, pool=pool).run(200)
    assert few.running == 6
    few.demand = 1
    few.run(200)
    assert few.running == 2


@given(demand=st.floats(1, 2000), rate=st.floats(1, 100), boot=st.integers(1, 90), start=st.integers(1, 64))
def test_any_steady_load_is_met_in_a_few_changes_that_never_come_back(
    demand: float, rate: float, boot: int, start: int
) -> None:
    pool = PoolSize(1, 64, target=start, cool_down_seconds=30)
    cluster = Cluster(demand=demand, rate=rate, boot=boot, pool=pool).run(2000)
    needed = min(64, math.ceil(demand / rate * (1 - STARVED)))
    assert needed <= cluster.running
    assert cluster.running <= max(
        start if cluster.data_wait > FED else 1, math.ceil(demand / rate * 1.25) + 2
    )
    assert len(cluster.changes) <= 8
    settled = len(cluster.changes)
    assert len(cluster.run(1000).changes) == settled


works = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@given(works, st.integers(0, 60))
def test_all_actors_are_divided_and_each_pool_has_one(work: list[int], total: int) -> None:
    shares = share_actors(total, work)
    assert sum(shares) == max(total, len(work))
    assert min(shares) >= 1


@given(works, st.integers(6, 60))
def test_one_more_actor_is_taken_from_no_pool(work: list[int], total: int) -> None:
    gains = [
        more - less
        for less, more in zip(share_actors(total, work), share_actors(total + 1, work), strict=True)
    ]
    assert sorted(gains) == [*[0] * (len(work) - 1), 1]


@given(works, st.integers(6, 60))
def test_no_other_division_makes_the_slowest_pool_faster(work: list[int], total: int) -> None:
    shares = share_actors(total, work)
    slowest = max(w / share for w, share in zip(work, shares, strict=True))
    # For a faster one each pool would need more than its work over that rate.
    needed = [math.floor(w / slowest + 1e-9) + 1 for w in work]
    assert sum(needed) > total


def test_shares_by_hand() -> None:
    assert share_actors(8, [1, 1, 1, 1]) == [2, 2, 2, 2]
    assert share_actors(9, [2, 1]) == [6, 3]  # two train workers beside one
    assert share_actors(6, [1, 1, 1, 1]) == [2, 2, 1, 1]
    assert share_actors(3, [1, 1, 1, 1]) == [1, 1, 1, 1]
    assert share_actors(5, [1]) == [5]


def test_work_is_divided_by_ranks_until_images_cost_clearly_more_in_one_stream() -> None:
    ranks, by_ranks = [2, 1], (2.0, 1.0)
    assert divide_work(by_ranks, ranks, {}) == by_ranks
    assert divide_work(by_ranks, ranks, {0: 4.0}) == by_ranks  # the other's is not known
    assert divide_work(by_ranks, ranks, {0: 4.0, 1: 4.5}) == by_ranks
    uneven = divide_work(by_ranks, ranks, {0: 4.0, 1: 6.0})
    assert uneven == (8, 6)
    assert divide_work(uneven, ranks, {0: 4.1, 1: 5.9}) == uneven
    assert divide_work(uneven, ranks, {0: 4.0, 1: 4.0}) == (8, 4)
