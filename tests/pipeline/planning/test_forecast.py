"""The forecast: arithmetic that one can check by hand, what must hold for all figures, and the table of types."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forecast_inputs import FIGURES, RUN
from hypothesis import assume, given
from hypothesis import strategies as st

from dinoray.models.errors import ConfigError
from dinoray.pipeline.planning.forecast import Forecast, forecast, forecast_here, with_workers
from dinoray.pipeline.planning.node_rates import (
    STREAM_SHARE,
    Figures,
    Run,
    augmenting,
    carried,
    streams_for,
)
from dinoray.pipeline.planning.prices import NODE_TYPES, PlanSettings
from dinoray.pipeline.training.config import CheckpointConfig


def plan(**changes: Any) -> PlanSettings:
    """Nodes in round numbers: GPU nodes of 4 GPUs, 24 CPUs, 100 Gbit/s; CPU nodes of 16 CPUs, 10 Gbit/s."""
    sizes: dict[str, dict[str, float]] = {
        "gpu": {"hourly": 10, "cpus": 24, "gpus": 4, "gbit": 100, "memory_gib": 256},
        "cpu": {"hourly": 2, "cpus": 16, "gbit": 10, "memory_gib": 64},
        "head": {"hourly": 1, "cpus": 4, "gbit": 10, "memory_gib": 16},
    }
    sizes = {name: node | changes.pop(name, {}) for name, node in sizes.items()}
    nodes = {"gpu_node": "gpu", "cpu_node": "cpu", "head_node": "head", "prices": sizes}
    return PlanSettings.model_validate({**nodes, "spot_share": 0.5, "startup_minutes": 2600 / 60, **changes})


def found(changes: dict[str, Any] | None = None, figures: Figures = FIGURES, **nodes: Any) -> Forecast:
    return forecast(replace(RUN, **(changes or {})), figures, plan(**nodes))


# By hand


def test_gpu_nodes_augment_on_the_cpus_they_have_left_and_cpu_nodes_do_the_rest_with_a_fifth_to_spare() -> (
    None
):
    made = found()
    assert (made.gpu_nodes, made.spare_cpus) == (1, 24 - 4 - 1)
    # 4 x 1000 images/s and a fifth are 4800, of which 19 CPUs make 1900; 2900 are two nodes of 1600.
    assert (made.demand, made.cpu_nodes) == (4000, 2)
    assert made.of_a_cpu_node[:3] == (pytest.approx(1600), "augmentation", 16)
    assert (made.images_per_second, made.bottleneck) == (4000, "training step")
    # More than one node's actors at once, so that both nodes start: 19 + 16 + 1, and at most all.
    assert made.augment_actors == (36, 51)
    assert made.augment_cpus == pytest.approx(48)


@pytest.mark.parametrize(
    ("images_per_second", "train_workers", "num_streams"),
    [
        (7000, 8, 1),
        (7001, 8, 2),
        (20_000, 8, 4),  # three would do, but would not divide the train workers
        (20_000, 6, 3),
        (20_000, 5, 5),
        (20_000, 2, 2),  # no more than there are train workers
        (7001, 1, 1),
    ],
)
def test_there_are_as_many_streams_as_bring_the_images(
    images_per_second: float, train_workers: int, num_streams: int
) -> None:
    assert streams_for(images_per_second, train_workers) == num_streams


def test_a_forecast_has_the_streams_for_what_is_trained_not_for_what_the_gpus_could_train() -> None:
    fast = FIGURES._replace(images_per_second_per_gpu=2500)
    assert found({}, fast).num_streams == 2  # 10,000 images/s
    assert found({"most_actors": 40}, fast).num_streams == 1  # 4,000
    assert found({"most_actors": 1}, fast._replace(images_per_second_per_cpu=20_000)).num_streams == 1


def test_what_the_gpu_nodes_make_themselves_needs_no_cpu_nodes() -> None:
    made = found(gpu={"cpus": 96})  # 91 CPUs make 9100 images/s
    assert (made.cpu_nodes, made.dollars["cpu"]) == (0, 0)
    assert made.augment_actors == (40, 48)
    assert made.gpu_node_gbit == pytest.approx(4000 * 100_000 * 8 / 1e9)  # encoded images alone


def test_crops_from_other_nodes_and_images_of_its_own_actors_come_into_a_gpu_node() -> None:
    local = 1900 / 4800
    a_second = 4000 * ((1 - local) * 500_000 + local * 100_000)
    assert found().gpu_node_gbit == pytest.approx(a_second * 8 / 1e9)
    assert found().gpu_node_gbit == pytest.approx(10.93, abs=0.01)


def test_nodes_exchange_gradients_and_one_node_does_not() -> None:
    one, two = found(gpu={"cpus": 96}), found({"train_workers": 8}, gpu={"cpus": 96})
    # In a ring of eight each sends and receives 2 x 7/8 of what there is, and so do the two that stand between the
    # nodes: 8 steps a second. And of the 4000 images/s that each node trains on, the other has cropped half.
    gradients, crops = 8 * 1.75 * 100_000_000, 2000 * 500_000
    assert two.gpu_node_gbit == pytest.approx(one.gpu_node_gbit + (gradients + crops) * 8 / 1e9)


def test_a_ten_gbit_link_is_the_limit_when_crops_do_not_fit_it() -> None:
    assert carried(10, 522_240) == pytest.approx(1915, abs=1)
    made = found(gpu={"cpus": 5, "gbit": 10})  # nothing is made at home
    assert (made.bottleneck, made.images_per_second) == ("network", pytest.approx(2000))
    assert made.gpu_node_gbit == pytest.approx(8)
    assert "more than 10 Gbit/s" in made.remedy
    assert made.cpu_nodes == 2  # for 2400, not for the 4800 that could not get in


def test_a_cpu_node_is_held_by_the_link_that_its_crops_leave_by() -> None:
    node = plan(cpu={"gbit": 2.5}).cpu
    away = augmenting(node, 16, RUN, FIGURES, sends=True)
    assert away == (pytest.approx(500), "network", 16, pytest.approx(5))  # 5 of 16 CPUs busy
    assert augmenting(node, 16, RUN, FIGURES, sends=False).limit == "augmentation"
    # Photos larger than their crops fill it on their way in.
    photos = FIGURES._replace(bytes_per_image=1_000_000)
    assert augmenting(node, 16, RUN, photos, sends=True)[:2] == (pytest.approx(250), "network")


def test_requests_in_flight_bound_what_an_actor_fetches() -> None:
    slow = FIGURES._replace(latency_ms=400)  # 32 in flight, 80 a second
    away = augmenting(plan().cpu, 16, RUN, slow, sends=True)
    assert away[:2] == (pytest.approx(16 * 80), "S3 latency")
    rows = slow._replace(images_per_request=2)
    assert augmenting(plan().cpu, 16, RUN, rows, sends=True).limit == "augmentation"
    made = found({"most_actors": 20}, slow)
    assert (made.bottleneck, made.images_per_second) == ("S3 latency", pytest.approx(20 * 80))


def test_blocks_that_wait_must_fit_the_object_store() -> None:
    # 0.3 of 16 GiB holds 13 times three blocks of 125 MB.
    away = augmenting(plan(cpu={"memory_gib": 16}).cpu, 16, RUN, FIGURES, sends=True)
    assert away[:2] == (pytest.approx(1300), "object store")
    # Actors of four CPUs crop a block on four threads: a quarter of the blocks.
    wide = replace(RUN, cpus_per_augment_actor=4)
    assert augmenting(plan(cpu={"memory_gib": 16}).cpu, 16, wide, FIGURES, sends=True)[:3] == (
        pytest.approx(1600),
        "augmentation",
        4,
    )


def test_a_ceiling_on_augment_actors_makes_augmentation_the_bottleneck() -> None:
    made = found({"most_actors": 25})  # 19 at home, 6 on one more node
    assert (made.cpu_nodes, made.images_per_second) == (1, pytest.approx(2500))
    assert (made.bottleneck, made.augment_actors) == ("augmentation", (20, 25))
    assert "resources.augment_actors" in made.remedy


def test_time_is_training_and_pauses_and_the_start() -> None:
    made = found()
    assert (made.training_seconds, made.pause_seconds) == (1000, 0)
    assert made.startup_seconds == pytest.approx(2600)
    assert made.hours == pytest.approx(1)
    # Each evaluation embeds at the rate of 10 forwards for a step, 40000 images/s, if 24 CPUs decode as many.
    evaluated = found({"images_per_evaluation": 20_000}, FIGURES._replace(images_per_second_per_cpu=1e4))
    assert evaluated.pause_seconds == pytest.approx(2 * 20_000 / 40_000)
    assert found({"images_per_evaluation": 24_000}).pause_seconds == pytest.approx(2 * 10 * STREAM_SHARE)
    # A checkpoint is four times the gradients, at 500 MB a second.
    assert found({"checkpoints": 5}).pause_seconds == pytest.approx(5 * 0.8)
    by_time = {"checkpoints": 5, "checkpoint": CheckpointConfig(every_minutes=1)}
    assert found(by_time).pause_seconds == pytest.approx((5 + 1000 / 60) * 0.8)
    by_cost = {"checkpoint": CheckpointConfig(every_minutes="auto", failures_per_day=86_400 / 1000)}
    assert found(by_cost).pause_seconds == pytest.approx(1000 / (2 * 0.8 * 1000) ** 0.5 * 0.8)


def test_dollars_are_hours_by_price_and_requests() -> None:
    made = found()
    assert made.dollars == pytest.approx({"head": 1, "cpu": 2 * 2 * 0.5, "gpu": 10, "requests": 4 * 0.4})
    assert made.total_dollars == pytest.approx(14.6)
    packed = found(figures=FIGURES._replace(images_per_request=100))
    assert packed.dollars["requests"] == pytest.approx(0.016)
    assert made.crops_gb == 4_000_000 * 500_000 / 1e9


def test_on_one_machine_crops_and_steps_share_its_cores() -> None:
    figures = FIGURES._replace(images_per_second_per_cpu=500, images_per_second_per_gpu=125)
    run = replace(RUN, train_workers=2, most_actors=1)
    made = forecast_here(run, figures, plan(), cores=2)
    # 2 ms to crop and 8 ms to train on are 10 ms on either of two cores, a quarter of which is lost.
    assert (made.images_per_second, made.bottleneck) == (pytest.approx(150), "training step")
    assert (made.dollars, made.total_dollars) == ({}, 0)
    slow = figures._replace(images_per_second_per_cpu=125, images_per_second_per_gpu=500)
    held = forecast_here(run, slow, plan(), cores=8)
    assert (held.images_per_second, held.bottleneck) == (
        pytest.approx(125 * STREAM_SHARE),
        "augmentation",
    )  # one actor
    # Of the time on shared cores crops take four fifths: they are what would have to be faster, if actors are enough.
    many = forecast_here(replace(run, most_actors=8), slow, plan(), cores=8)
    assert (many.images_per_second, many.bottleneck) == (pytest.approx(600), "augmentation")


def test_nodes_too_small_for_what_stands_on_them_are_refused() -> None:
    with pytest.raises(ConfigError, match="cpus_per_train_worker=8 for each of 4 GPUs are more than the 24"):
        found({"cpus_per_train_worker": 8})
    with pytest.raises(ConfigError, match="cpus_per_augment_actor=32 is more than the 16 CPUs"):
        found({"cpus_per_augment_actor": 32})


# For all figures

positive = st.floats(1, 1e5)
figures = st.builds(Figures, positive, positive, st.floats(1e3, 1e7), st.floats(1, 1e3), st.floats(0, 1e3))
runs = st.builds(
    Run,
    total_steps=st.integers(1, 10**6),
    global_batch_size=st.just(1024),
    train_workers=st.sampled_from([1, 2, 4, 8, 16, 32]),
    crop_bytes=st.integers(10_000, 2_000_000),
    gradient_bytes=st.integers(10**6, 10**9),
    forwards_per_image=st.floats(2, 40),
    evaluations=st.integers(1, 1000),
    pausing_evaluations=st.integers(1, 1000),
    images_per_evaluation=st.integers(0, 60_000),
    checkpoints=st.integers(0, 1000),
    checkpoint=st.builds(CheckpointConfig, every_minutes=st.sampled_from([None, "auto", 0.5])),
    prefetch_batches=st.integers(0, 8),
    cpus_per_train_worker=st.sampled_from([0, 1, 2]),
    cpus_per_augment_actor=st.sampled_from([0.5, 1, 2, 4]),
    most_actors=st.none() | st.integers(1, 1000),
    fetch_concurrency=st.integers(16, 512),
)
types = {
    "cpu_node": st.sampled_from(PlanSettings().named(with_gpus=False)),
    "gpu_node": st.sampled_from(PlanSettings().named(with_gpus=True)),
}
plans = st.builds(PlanSettings, **types)


@given(runs, figures, plans)
def test_the_rate_is_above_nothing_and_at_most_what_the_gpus_train_on(
    run: Run, figures: Figures, plan: PlanSettings
) -> None:
    assume(plan.gpu.cpus > 1)
    made = forecast(run, figures, plan)
    assume(made.spare_cpus or made.cpu_nodes)
    assert 0 < made.images_per_second <= made.demand
    assert (made.bottleneck == "training step") is (made.images_per_second == made.demand)
    assert 0 < made.augment_actors[0] <= made.augment_actors[1] <= (run.most_actors or 10**9)
    used = made.gpu_node_gbit / plan.gpu.gbit
    assert used <= 0.8 * (1 + 1e-9)
    assert made.total_dollars == pytest.approx(sum(made.dollars.values()))
    assert all(dollars >= 0 for dollars in made.dollars.values())


@given(runs, figures, plans)
def test_more_gpus_take_no_longer_unless_the_network_holds_them(
    run: Run, figures: Figures, plan: PlanSettings
) -> None:
    run = replace(run, most_actors=None)
    fewer, more = (
        forecast(run, figures, plan),
        forecast(with_workers(run, 2 * run.train_workers), figures, plan),
    )
    assume(more.bottleneck != "network")
    assert more.training_seconds <= fewer.training_seconds * (1 + 1e-9)
    assert more.hours <= fewer.hours * (1 + 1e-9)


@given(runs, figures, plans, st.integers(1, 4))
def test_larger_nodes_are_never_more_nodes(
    run: Run, figures: Figures, plan: PlanSettings, times: int
) -> None:
    run = replace(run, most_actors=None)
    larger = plan.cpu.model_copy(update={"cpus": times * plan.cpu.cpus})
    grown = plan.model_copy(update={"prices": {**plan.prices, plan.cpu_node: larger}})
    assert forecast(run, figures, grown).cpu_nodes <= forecast(run, figures, plan).cpu_nodes


# The table


def test_the_table_has_what_ec2_says_of_its_types() -> None:
    moto = pytest.importorskip("moto")
    file = Path(moto.__file__).parent / "ec2" / "resources" / "instance_types.json.gz"
    known = json.loads(gzip.decompress(file.read_bytes()))
    for name, node in NODE_TYPES.items():
        said = known[name]
        cards = said["NetworkInfo"]["NetworkCards"]
        gpus = sum(gpu["Count"] for gpu in said.get("GpuInfo", {}).get("Gpus", []))
        assert (node.cpus, node.gpus) == (said["VCpuInfo"]["DefaultVCpus"], gpus), name
        of_gpus = [gpu["MemoryInfo"]["SizeInMiB"] / 1024 for gpu in said.get("GpuInfo", {}).get("Gpus", [])]
        assert [node.gpu_memory_gib] * bool(gpus) == pytest.approx(of_gpus, abs=0.01), name
        assert node.memory_gib == said["MemoryInfo"]["SizeInMiB"] / 1024, name
        # Of several cards the first alone carries what is not EFA.
        assert node.gbit == cards[0]["BaselineBandwidthInGbps"], name


def test_one_price_can_be_changed_and_a_type_added() -> None:
    given = {"g6e.12xlarge": {"hourly": 9.5}, "x1": {"hourly": 1, "cpus": 8, "gbit": 5, "memory_gib": 16}}
    changed = PlanSettings.model_validate({"prices": given, "cpu_node": "x1"})
    assert changed.gpu == NODE_TYPES["g6e.12xlarge"].model_copy(update={"hourly": 9.5})
    assert changed.cpu.cpus == 8
    assert changed.head == NODE_TYPES["m6id.2xlarge"]
