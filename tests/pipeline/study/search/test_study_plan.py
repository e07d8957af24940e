"""How many trials fit a cluster: everyone finds what it needs, or the numbers say why not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinoray.jobs.cli.config import load
from dinoray.jobs.studies.config import StudyConfig
from dinoray.jobs.studies.resources import plan_of
from dinoray.models.errors import ResourceError
from dinoray.pipeline.cluster.resources import ResourcesConfig
from dinoray.pipeline.study.search.plan import StudyPlan, local_cpus, plan_study

SMALL = ResourcesConfig(train_workers=1, augment_actors=1)


def plan(resources: ResourcesConfig = SMALL, **changes: object) -> StudyPlan:
    settings = {
        "num_trials": 100,
        "cpus": 9,
        "gpus": 0,
        "use_gpu": False,
        "limit": None,
        "shares_stream": False,
        **changes,
    }
    return plan_study(resources, **settings)  # type: ignore[arg-type]


def test_as_many_trials_run_as_fit_beside_one_free_cpu() -> None:
    assert plan(cpus=9).trials_at_once == 4
    assert plan(cpus=8).trials_at_once == 3  # eight would leave none for Ray Data
    assert plan(cpus=9).describe() == ("plan: 4 trials at once, 2 CPUs each, 1 CPUs left for data, of 9 CPUs")


def test_gpus_bound_them_too() -> None:
    found = plan(ResourcesConfig(train_workers=2, augment_actors=2), cpus=64, gpus=7, use_gpu=True)
    assert (found.trials_at_once, found.gpus_each, found.cpus_each) == (3, 2, 4)
    assert "2 GPUs each" in found.describe()
    assert "of 64 CPUs and 7 GPUs" in found.describe()


def test_no_more_than_there_are_trials_and_no_more_than_asked_for() -> None:
    assert plan(cpus=100, num_trials=5).trials_at_once == 5
    assert plan(cpus=100, limit=2).trials_at_once == 2
    assert plan(cpus=5, limit=4, num_trials=2).trials_at_once == 2


def test_what_is_spare_goes_to_augmenting_up_to_the_most_that_was_set() -> None:
    auto = ResourcesConfig(train_workers=1, augment_actors="auto")
    assert plan(auto, cpus=21, limit=2).augment_actors == (1, 9)
    ranged = ResourcesConfig(train_workers=1, augment_actors=(2, 4))
    assert plan(ranged, cpus=21, limit=2).augment_actors == (2, 4)
    assert plan(SMALL, cpus=21, limit=2).augment_actors == (1, 1)


def test_each_stream_of_a_trial_has_an_augment_actor() -> None:
    auto = ResourcesConfig(train_workers=4, augment_actors="auto")
    found = plan(auto, cpus=15, num_streams=3)
    assert (found.trials_at_once, found.cpus_each, found.augment_actors) == (2, 7, (3, 3))
    assert plan(auto, cpus=9, num_streams=3).augment_actors == (3, 4)
    assert (auto.least_actors(3), auto.least_cpus(3)) == (3, 8)
    ranged = ResourcesConfig(train_workers=4, augment_actors=(4, 6))
    assert (ranged.least_actors(3), ranged.least_cpus(3)) == (4, 9)


def test_a_shared_stream_counts_once() -> None:
    wide = ResourcesConfig(train_workers=1, augment_actors=4)
    assert plan(wide, cpus=9).trials_at_once == 1
    shared = plan(wide, cpus=9, shares_stream=True)
    assert (shared.trials_at_once, shared.cpus_each, shared.cpus_shared) == (4, 1, 4)
    assert "4 CPUs augment for all of them" in shared.describe()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"cpus": 2}, ["1 trials at once need 2 CPUs", "has 2 CPUs", "lower resources.train_workers"]),
        ({"cpus": 9, "limit": 5}, ["5 trials at once need 10 CPUs", "has 9 CPUs", "tune.max_concurrent=4"]),
        ({"cpus": 99, "gpus": 0, "use_gpu": True}, ["1 GPUs", "has 99 CPUs and 0 GPUs", "tune.cluster_gpus"]),
    ],
)
def test_what_does_not_fit_is_refused_with_numbers_and_a_remedy(changes: dict, told: list[str]) -> None:
    with pytest.raises(ResourceError) as error:
        plan(**changes)
    for text in told:
        assert text in str(error.value)


def test_a_population_that_does_not_fit_is_told_to_be_smaller_not_to_wait() -> None:
    config = load(StudyConfig, "demo", None, ["tune.scheduler=pb2", "tune.trials=8"])
    each = plan_of(config, 8, {"CPU": 100}).cpus_each
    with pytest.raises(
        ResourceError, match=r"8 trials at once .* set tune\.trials=2, or set tune\.scheduler=asha"
    ):
        plan_of(config, 8, {"CPU": 2 * each + 1})
    with pytest.raises(ResourceError, match=r": set tune\.scheduler=asha"):
        plan_of(config, 8, {"CPU": each + 1})


@given(
    workers=st.integers(1, 8),
    actors=st.integers(1, 8),
    cpus=st.integers(1, 200),
    gpus=st.integers(0, 16),
    use_gpu=st.booleans(),
    shares=st.booleans(),
    limit=st.none() | st.integers(1, 20),
)
def test_whatever_is_planned_leaves_a_whole_cpu_and_promises_no_gpu_twice(
    workers: int, actors: int, cpus: int, gpus: int, use_gpu: bool, shares: bool, limit: int | None
) -> None:
    resources = ResourcesConfig(train_workers=workers, augment_actors=(actors, actors + 3))
    try:
        found = plan(resources, cpus=cpus, gpus=gpus, use_gpu=use_gpu, shares_stream=shares, limit=limit)
    except ResourceError:
        return
    assert found.cpus_for_data >= 1
    assert found.cpus_needed <= cpus
    assert found.trials_at_once * found.gpus_each <= gpus
    low, high = found.augment_actors
    extra = (high - low) * (1 if shares else found.trials_at_once)
    assert found.trials_at_once * found.cpus_each + found.cpus_shared + extra + 1 <= cpus


@given(
    cores=st.integers(1, 64),
    workers=st.integers(1, 4),
    limit=st.none() | st.integers(1, 8),
    shares=st.booleans(),
)
def test_a_ray_of_ones_own_always_has_room_for_the_plan(
    cores: int, workers: int, limit: int | None, shares: bool
) -> None:
    resources = ResourcesConfig(train_workers=workers, augment_actors=1)
    cpus = local_cpus(resources, cores=cores, limit=limit, shares_stream=shares)
    found = plan(resources, cpus=cpus, limit=limit, shares_stream=shares)
    assert found.trials_at_once >= 1
    assert found.trials_at_once == limit or limit is None
