"""The training step against one written out by hand, alone and over processes; schedules in steps; the loop."""

import copy
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from oracles import WrittenOutRun
from paths import ROOT
from ranks import NUM_STEPS, run_steps, training_config, two_ranks
from ray_files import RAY_FILES
from tiny import NUM_IMAGES, TINY_RESNET, Batch, tiny_batch, tiny_config
from torch import Tensor, nn

from dinoray.models.errors import ConfigError, ResourceError
from dinoray.models.loss import koleo
from dinoray.pipeline.training.config import DINOConfig, Schedule
from dinoray.pipeline.training.step import TrainState, autocast, build_state, pixels, train, train_step

METRICS = {
    "loss",
    "teacher_entropy",
    "kl",
    "grad_norm",
    "lr",
    "weight_decay",
    "teacher_momentum",
    "teacher_temp",
}


def tiny_state(config: DINOConfig | None = None) -> TrainState:
    return build_state(config or tiny_config(), num_images=NUM_IMAGES)


def weights(state: TrainState) -> dict[str, Tensor]:
    """Everything learnt: student, teacher, centre."""
    return {name: x.clone() for name, x in state.dino.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def run(state: TrainState, *, num_steps: int = 3) -> list[dict[str, float]]:
    """Steps on batches that only the step's number decides."""
    metrics = []
    for _ in range(num_steps):
        batch = tiny_batch(state.config, num_images=state.config.train.global_batch_size, seed=state.step)
        metrics.append({name: float(value) for name, value in train_step(state, batch).items()})
    return metrics


def assert_close_parameters(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=f"{name} differs")


# One step


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"crops": {"num_local_crops": 0}},
        {"crops": {"num_global_crops": 1, "global_blur_prob": [1], "global_solarize_prob": [0]}},
        {"head": {"norm_last_layer": False}, "optim": {"clip_grad": 0.0, "base_lr": 0.064}},
        {"optim": {"freeze_last_layer_epochs": 0.2}},
    ],
    ids=["default", "no local crops", "one global crop", "learnt magnitude", "frozen last layer"],
)
def test_steps_equal_those_written_out_by_hand(changes: dict[str, dict[str, Any]]) -> None:
    changes = {**changes, "optim": {"name": "sgd", "base_lr": 0.64, **changes.get("optim", {})}}
    changes["loss"] = {"teacher_temp": 0.07, "warmup_teacher_temp": 0.04, "warmup_teacher_temp_epochs": 1}
    config = tiny_config(**changes, teacher={"teacher_momentum": 0.9})
    state, twin = tiny_state(config), tiny_state(config)
    written_out = WrittenOutRun(twin.dino.student, twin.dino.teacher, config)
    for step in range(4):
        batch = tiny_batch(config, seed=step)
        expected = written_out.step(batch, state.schedule.at(step))
        loss = float(train_step(state, batch)["loss"])
        assert loss == pytest.approx(expected, abs=1e-4)
    torch.testing.assert_close(state.dino.center, written_out.center, rtol=1e-3, atol=1e-5)
    assert_close_parameters(state.dino.student, twin.dino.student)
    assert_close_parameters(state.dino.teacher, twin.dino.teacher)


def test_the_same_seed_gives_the_same_weights_bit_for_bit() -> None:
    config = tiny_config(backbone={"drop_path_rate": 0.5})
    first, second = tiny_state(config), tiny_state(config)
    assert same(weights(first), weights(second))
    run(first)
    torch.rand(7)  # what else the process draws does not matter
    run(second)
    assert same(weights(first), weights(second))


def test_another_seed_gives_other_weights_and_other_stochastic_depth() -> None:
    def config(seed: int) -> DINOConfig:
        return tiny_config(backbone={"drop_path_rate": 0.5}, train={"seed": seed})

    first, second = tiny_state(config(0)), tiny_state(config(1))
    assert not same(weights(first), weights(second))
    second.dino.load_state_dict(first.dino.state_dict())
    assert run(first, num_steps=1)[0]["loss"] != run(second, num_steps=1)[0]["loss"]


@pytest.mark.parametrize("seed", [2**31, 2**32 - 1, 10**12])
def test_a_large_seed_is_a_seed(seed: int) -> None:
    run(tiny_state(tiny_config(train={"seed": seed})), num_steps=1)


def test_stochastic_depth_is_drawn_anew_at_each_step() -> None:
    config = tiny_config(backbone={"drop_path_rate": 0.5}, optim={"base_lr": 1e-20})
    state = tiny_state(config)
    state.dino.center.zero_()
    losses = set()
    for _ in range(4):
        losses.add(float(train_step(state, tiny_batch(config))["loss"]))
        state.dino.center.zero_()
    assert len(losses) == 4


def test_a_step_reports_all_metrics_and_they_are_finite() -> None:
    state = tiny_state()
    for metrics in run(state):
        assert metrics.keys() == METRICS
        assert all(math.isfinite(value) for value in metrics.values())
        assert metrics["kl"] == pytest.approx(metrics["loss"] - metrics["teacher_entropy"], abs=1e-6)
        assert metrics["grad_norm"] > 0
    assert state.step == 3


def test_a_step_reports_the_settings_it_ran_with() -> None:
    state = tiny_state()
    for step, metrics in enumerate(run(state)):
        now = state.schedule.at(step)
        assert (metrics["lr"], metrics["teacher_temp"]) == (now.lr, now.teacher_temp)
        assert (metrics["weight_decay"], metrics["teacher_momentum"]) == (
            now.weight_decay,
            now.teacher_momentum,
        )


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_a_read_only_batch_is_read_and_not_written_to() -> None:
    state, batch = tiny_state(), tiny_batch(tiny_config())
    before = {name: column.copy() for name, column in batch.items()}
    for column in batch.values():
        column.setflags(write=False)
    train_step(state, batch)
    assert all(np.array_equal(batch[name], before[name]) for name in batch)


def test_a_writable_batch_is_not_written_to_either() -> None:
    config = tiny_config(crops={"num_global_crops": 1, "global_blur_prob": [1], "global_solarize_prob": [0]})
    batch = tiny_batch(config)
    before = {name: column.copy() for name, column in batch.items()}
    train_step(
        tiny_state(config), {name: torch.from_numpy(batch[name]) for name in ("global_crops", "local_crops")}
    )
    assert all(np.array_equal(batch[name], before[name]) for name in batch)


def test_pixels_are_normalised_and_ordered_by_crop() -> None:
    crops = np.zeros((3, 2, 8, 8, 3), np.uint8)
    for b in range(3):
        for c in range(2):
            crops[b, c] = (100 * c + 10 * b, 0, 255)
    x = pixels(crops, tiny_config().crops, torch.device("cpu"))
    assert x.dtype == torch.float32
    reds = [((100 * c + 10 * b) / 255 - 0.485) / 0.229 for c in range(2) for b in range(3)]
    torch.testing.assert_close(x[:, 0, 5, 6], torch.tensor(reds))
    torch.testing.assert_close(x[:, 1, 0, 0], torch.full((6,), -0.456 / 0.224))
    torch.testing.assert_close(x[:, 2, 0, 0], torch.full((6,), (1 - 0.406) / 0.225))


def test_images_are_paired_with_their_own_crops() -> None:
    # Each image is of one grey and all its crops alike: a teacher and a student that see the same image agree.
    config = tiny_config(loss={"center_momentum": 0.0})
    greys = np.array([0, 80, 160, 255], np.uint8)[:, None, None, None, None]
    batch = {
        "global_crops": np.broadcast_to(greys, (4, 2, 16, 16, 3)),
        "local_crops": np.broadcast_to(greys, (4, 2, 8, 8, 3)),
    }
    mixed = {
        name: np.stack([np.roll(column[:, i], i, axis=0) for i in range(2)], 1)
        for name, column in batch.items()
    }
    state, other = tiny_state(config), tiny_state(config)
    for twin in (state, other):
        twin.dino.center.copy_(
            twin.dino.teacher_output(pixels(batch["global_crops"], config.crops, twin.device)).logits.mean(0)
        )
    assert float(train_step(state, batch)["loss"]) < float(train_step(other, mixed)["loss"]) - 0.5


def test_the_center_of_a_step_is_the_one_from_before_it() -> None:
    config = tiny_config(loss={"center_momentum": 0.0})
    batch = tiny_batch(config)
    from_zero, from_ten = tiny_state(config), tiny_state(config)
    from_ten.dino.center[0] = -10.0  # the teacher then names prototype 0 alone
    losses = [float(train_step(state, batch)["loss"]) for state in (from_zero, from_ten)]
    assert losses[0] != losses[1]
    torch.testing.assert_close(
        from_zero.dino.center, from_ten.dino.center
    )  # afterwards it is the batch's mean
    assert from_zero.dino.center.any()


def test_the_last_layer_waits_until_its_freeze_ends() -> None:
    state = tiny_state(tiny_config(optim={"freeze_last_layer_epochs": 0.2}))  # 2 of 10 steps an epoch
    parameters = dict(state.dino.student.named_parameters())
    last_layer, other = parameters["head.last_layer.weight_v"], parameters["backbone.pos_embed"]
    before, other_before = last_layer.detach().clone(), other.detach().clone()
    run(state, num_steps=2)
    assert torch.equal(last_layer, before)
    assert not torch.equal(other, other_before)
    run(state, num_steps=1)
    assert not torch.equal(last_layer, before)


def test_the_teacher_follows_after_the_students_step() -> None:
    state = tiny_state(tiny_config(teacher={"teacher_momentum": 0.0, "final_teacher_momentum": 0.0}))
    run(state, num_steps=1)
    student, teacher = state.dino.student.state_dict(), state.dino.teacher.state_dict()
    assert same(student, teacher)
    assert not same(student, tiny_state().dino.student.state_dict())


def test_loss_falls_towards_the_entropy_of_a_teacher_that_stays() -> None:
    config = tiny_config(
        teacher={"teacher_momentum": 1.0},
        loss={"teacher_temp": 0.1, "center_momentum": 0.0},
        train={"epochs": 4},
    )
    state, batch = tiny_state(config), tiny_batch(config, num_images=8)
    metrics = [{k: float(v) for k, v in train_step(state, batch).items()} for _ in range(30)]
    # From the second step on the centre is the mean over the batch, and so the targets are always the same.
    entropies, kl = ([m[name] for m in metrics[1:]] for name in ("teacher_entropy", "kl"))
    assert entropies == pytest.approx([entropies[0]] * 29)
    assert kl[-1] < 0.2 * kl[0]


def test_bf16_is_autocast_where_it_is_asked_for() -> None:
    config = tiny_config(train={"precision": "bf16"})
    state, exact = tiny_state(config), tiny_state()
    loss, exact_loss = (run(s, num_steps=1)[0]["loss"] for s in (state, exact))
    assert loss != exact_loss
    assert loss == pytest.approx(exact_loss, rel=0.1, abs=0.05)
    assert all(x.dtype == torch.float32 for x in weights(state).values() if x.is_floating_point())
    assert state.dino.center.dtype == torch.float32


@pytest.mark.parametrize(
    ("precision", "device", "casts"),
    [("auto", "cpu", False), ("fp32", "cpu", False), ("bf16", "cpu", True), ("fp32", "cuda", False)],
)
def test_precision_auto_is_bf16_on_a_gpu_alone(precision: str, device: str, casts: bool) -> None:
    with autocast(precision, torch.device(device)):
        assert torch.is_autocast_enabled(device) is casts


# Several processes, one result


def test_two_processes_of_four_equal_one_of_eight() -> None:
    state = tiny_state(training_config())
    metrics, centers = run_steps(state, rows=slice(None))
    assert len(metrics) == NUM_STEPS
    for rank in two_ranks():
        for ours, theirs in zip(rank.metrics, metrics, strict=True):
            for name in ("loss", "teacher_entropy", "kl"):
                assert ours[name] == pytest.approx(theirs[name], abs=1e-4)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        torch.testing.assert_close(rank.centers, centers, rtol=0, atol=1e-5)


def test_all_processes_end_with_the_same_weights() -> None:
    first, second = two_ranks()
    assert same(first.student, second.student)
    assert same(first.teacher, second.teacher)
    assert torch.equal(first.centers, second.centers)
    assert first.metrics == second.metrics


def test_each_process_draws_its_own_stochastic_depth() -> None:
    first, second = two_ranks()
    assert not torch.equal(first.drop_path_logits, second.drop_path_logits)


# Schedules in steps


def schedule(**changes: dict[str, Any]) -> Schedule:
    """1000 images by batches of 100: ten steps an epoch."""
    train_section = {"epochs": 10, "global_batch_size": 100} | changes.pop("train", {})
    return Schedule(tiny_config(train=train_section, **changes), num_images=1000)


def test_epochs_become_steps() -> None:
    s = schedule(optim={"warmup_epochs": 2, "freeze_last_layer_epochs": 1.5})
    assert (s.total_steps, s.warmup_steps, s.freeze_steps) == (100, 20, 15)
    assert [s.epoch(step) for step in (0, 9, 10, 99, 100)] == [0, 0, 1, 9, 10]
    assert [s.at(step).freeze_last_layer for step in (0, 14, 15)] == [True, True, False]


def test_an_epoch_that_ends_within_a_step_belongs_to_the_steps_first_image() -> None:
    s = Schedule(tiny_config(train={"epochs": 3, "global_batch_size": 4}), num_images=10)
    assert s.total_steps == 7  # 30 images, the last two of which make no batch
    assert [s.epoch(step) for step in range(7)] == [0, 0, 0, 1, 1, 2, 2]


def test_a_run_has_at_least_one_step() -> None:
    assert (
        Schedule(tiny_config(train={"epochs": 0.01, "global_batch_size": 4}), num_images=10).total_steps == 1
    )


def test_learning_rate_peaks_at_the_scaled_rate_and_ends_at_the_unscaled_least() -> None:
    s = schedule(optim={"base_lr": 0.256, "min_lr": 1e-3, "warmup_epochs": 2})
    rates = [s.at(step).lr for step in (0, 19, 20, 60, 100, 1000)]
    assert rates == pytest.approx([0, 0.1, 0.1, (0.1 + 1e-3) / 2, 1e-3, 1e-3])


def test_weight_decay_and_teacher_momentum_run_the_whole_length() -> None:
    s = schedule(optim={"weight_decay": 0.04, "final_weight_decay": 0.4}, teacher={"teacher_momentum": 0.996})
    assert [s.at(step).weight_decay for step in (0, 50, 100)] == pytest.approx([0.04, 0.22, 0.4])
    assert [s.at(step).teacher_momentum for step in (0, 50, 100)] == pytest.approx([0.996, 0.998, 1.0])


def test_teacher_temperature_climbs_a_stair_per_epoch() -> None:
    s = schedule(loss={"teacher_temp": 0.07, "warmup_teacher_temp": 0.04, "warmup_teacher_temp_epochs": 4})
    temps = [s.at(step).teacher_temp for step in (0, 9, 10, 29, 30, 99)]
    assert temps == pytest.approx([0.04, 0.04, 0.05, 0.06, 0.07, 0.07])


def test_warmups_longer_than_the_run_are_cut() -> None:
    s = schedule(
        optim={"warmup_epochs": 50},
        loss={"teacher_temp": 0.07, "warmup_teacher_temp": 0.04, "warmup_teacher_temp_epochs": 30},
    )
    assert (s.warmup_steps, s.warmup_temp_epochs) == (30, 3)


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_a_length_that_is_no_length_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="epochs"):
        tiny_config(train={"epochs": value})


def test_local_crops_that_are_not_cut_need_no_size_that_fits() -> None:
    tiny_state(tiny_config(crops={"num_local_crops": 0, "local_crop_size": 9}))


# The loop


def test_the_loop_steps_once_per_batch_and_tells_of_each() -> None:
    state = tiny_state()
    batches = [tiny_batch(state.config, seed=seed) for seed in range(3)]
    told: list[tuple[int, int, float]] = []

    def on_step(batch: Any, metrics: dict[str, Any], wait_seconds: float) -> None:
        assert metrics.keys() == METRICS
        told.append((state.step, int(batch["position"][0]), wait_seconds))

    train(state, batches, on_step=on_step)
    assert [(step, position) for step, position, _ in told] == [(1, 0), (2, 4), (3, 8)]


def busy(seconds: float) -> float:
    """Let the clock run, and say for how long it did."""
    since = time.perf_counter()
    while time.perf_counter() - since < seconds:
        pass
    return time.perf_counter() - since


def test_the_wait_for_a_batch_is_measured_and_not_the_step() -> None:
    state = tiny_state()
    fetching: list[float] = []
    since = time.perf_counter()

    def slow_forward(*_: Any) -> None:
        busy(0.02)

    def slow_stream() -> Iterator[Batch]:
        for seed in range(3):
            fetching.append(busy(0.01 * seed))
            yield tiny_batch(state.config, seed=seed)

    def on_step(batch: Any, metrics: dict[str, Any], wait_seconds: float) -> None:
        nonlocal since
        assert fetching[-1] <= wait_seconds <= time.perf_counter() - since - 0.02
        since = time.perf_counter()

    state.student.register_forward_hook(slow_forward)
    train(state, slow_stream(), on_step=on_step)
    assert state.step == 3


def test_the_loop_of_an_empty_stream_does_nothing() -> None:
    state = tiny_state()
    before = weights(state)
    train(state, [], on_step=lambda *_: pytest.fail("there was no step"))
    assert same(weights(state), before)


# Without Ray

WITHOUT_RAY = """
import sys

class NoRay:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ray":
            raise ImportError(f"{name} must not be imported here")

sys.meta_path.insert(0, NoRay())
try:
    import ray
except ImportError:
    pass
else:
    raise SystemExit("the finder does not work")

import importlib
for name in sys.argv[1:]:
    importlib.import_module(name)

from dinoray.pipeline.training.step import build_state, train_step
from tiny import tiny_batch, tiny_config

state = build_state(tiny_config(), num_images=40)
print("loss", float(train_step(state, tiny_batch(tiny_config()))["loss"]))
assert not any(name.partition(".")[0] == "ray" for name in sys.modules)
"""


def test_a_step_runs_and_all_but_the_ray_modules_import_where_ray_is_missing() -> None:
    root = ROOT
    files = [path for layer in ("models", "pipeline") for path in (root / layer).rglob("*.py")]
    names = {file.relative_to(root).as_posix() for file in files if file.stem != "__init__"}
    pure = sorted("dinoray." + name.removesuffix(".py").replace("/", ".") for name in names - RAY_FILES)
    assert "dinoray.pipeline.training.step" in pure
    path = os.pathsep.join([str(root), str(root / "tests" / "support")])
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_RAY, *pure],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("loss ")


# Options of the field


def after(steps: int, **changes: dict[str, Any]) -> TrainState:
    """A run after some steps on the same images."""
    config = tiny_config(**changes)
    state = build_state(config, num_images=NUM_IMAGES)
    for seed in range(steps):
        train_step(state, tiny_batch(config, seed=seed))
    return state


@pytest.mark.parametrize("num_parts", [2, 4])
def test_a_batch_in_parts_equals_the_batch_whole(num_parts: int) -> None:
    sgd = {"name": "sgd", "base_lr": 6.4, "warmup_epochs": 0}
    whole = after(5, loss={"center_momentum": 0.5}, optim=sgd)
    parts = after(5, loss={"center_momentum": 0.5}, optim=sgd, train={"accumulate_steps": num_parts})
    assert parts.step == whole.step
    torch.testing.assert_close(parts.dino.center, whole.dino.center, rtol=1e-4, atol=1e-6)
    for (name, a), b in zip(parts.dino.named_parameters(), whole.dino.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5, msg=name)


def test_centre_and_teacher_move_once_per_step_however_many_parts_there_are() -> None:
    moves = []
    for num_parts in (1, 4):
        config = tiny_config(train={"accumulate_steps": num_parts})
        state = build_state(config, num_images=NUM_IMAGES)
        state.dino.update_teacher = lambda momentum, moves=moves: moves.append(momentum)  # type: ignore[method-assign]
        train_step(state, tiny_batch(config))
    assert moves == [0.996, 0.996]


def test_parts_that_are_not_equal_are_refused() -> None:
    config = tiny_config(train={"accumulate_steps": 3})
    with pytest.raises(ConfigError, match=r"accumulate_steps=3 must divide each worker's 4 images"):
        train_step(build_state(config, num_images=NUM_IMAGES), tiny_batch(config))


def test_sinkhorn_trains_without_a_center() -> None:
    state = after(3, loss={"centering": "sinkhorn_knopp"})
    assert not state.dino.center.any()
    assert not torch.equal(next(state.dino.student.parameters()), next(after(0).dino.student.parameters()))


def test_koleo_adds_its_weight_times_the_spread_of_each_global_crop() -> None:
    config, batch = tiny_config(), tiny_batch(tiny_config())
    state = build_state(config, num_images=NUM_IMAGES)
    features = state.dino.student([pixels(batch["global_crops"], config.crops, state.device)]).features
    spread = sum(float(koleo(crop.detach())) for crop in features.chunk(2))
    plain = float(train_step(state, batch)["loss"])
    other = build_state(tiny_config(loss={"koleo_weight": 0.5}), num_images=NUM_IMAGES)
    metrics = train_step(other, batch)
    assert float(metrics["loss"]) == pytest.approx(plain + 0.5 * spread, rel=1e-5)
    assert float(metrics["kl"] + metrics["teacher_entropy"]) == pytest.approx(plain, rel=1e-5)


def test_a_constant_schedule_keeps_rate_decay_and_momentum_after_the_warmup() -> None:
    config = tiny_config(train={"schedule": "constant"}, optim={"warmup_epochs": 0.5, "weight_decay": 0.04})
    schedule = Schedule(config, num_images=NUM_IMAGES)
    assert schedule.at(0).lr == 0
    first, last = schedule.at(5), schedule.at(10**7)
    assert (first.lr, first.weight_decay, first.teacher_momentum) == pytest.approx((1e-3, 0.04, 0.996))
    assert (last.lr, last.weight_decay, last.teacher_momentum) == (
        first.lr,
        first.weight_decay,
        first.teacher_momentum,
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"global_crops": np.zeros((4, 2, 16, 16, 3), np.float32)},
            r"float32 \[4, 2, 16, 16, 3\], it must be uint8",
        ),
        ({"global_crops": np.zeros((4, 2, 3, 16, 16), np.uint8)}, r"must be uint8 \[B, 2, 16, 16, 3\]"),
        ({"local_crops": np.zeros((4, 3, 8, 8, 3), np.uint8)}, r"must be uint8 \[B, 2, 8, 8, 3\]"),
        ({"local_crops": None}, r"batch\['local_crops'\] is missing"),
        ({"local_crops": np.zeros((3, 2, 8, 8, 3), np.uint8)}, "4 rows of global crops and 3 of local ones"),
    ],
)
def test_crops_that_are_not_those_of_the_config_are_refused(wrong: dict[str, Any], message: str) -> None:
    state = build_state(tiny_config(), num_images=NUM_IMAGES)
    with pytest.raises(ConfigError, match=message):
        train_step(state, tiny_batch(state.config) | wrong)
    assert state.step == 0


def test_a_batch_that_does_not_fit_the_gpu_is_one_line_that_says_what_to_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forward(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    state = tiny_state()
    monkeypatch.setattr(state.student, "forward", forward)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA L4")
    with pytest.raises(
        ResourceError, match=r"^4 images a step, train\.accumulate_steps=1, do not fit NVIDIA L4; raise .+$"
    ):
        train_step(state, tiny_batch(state.config))

    state = after(1)  # it did fit, so it is for Ray to start the worker again
    monkeypatch.setattr(state.student, "forward", forward)
    with pytest.raises(torch.OutOfMemoryError):
        train_step(state, tiny_batch(state.config))


# Steps that are not finite


def poisoned(state: TrainState) -> None:
    """A weight that makes every output of the student NaN."""
    with torch.no_grad():
        state.dino.student.head.last_layer.weight_v[0, 0] = float("nan")


def everything(state: TrainState) -> dict[str, Any]:
    """A copy of all that a step may change."""
    return copy.deepcopy(
        {"dino": state.dino.state_dict(), "optimizer": state.optimizer.state_dict()["state"]}
    )


@pytest.mark.parametrize("backbone", [{}, TINY_RESNET], ids=["vit", "resnet"])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counts(backbone: dict[str, Any]) -> None:
    changes = {"backbone": backbone} if backbone else {}
    state = after(2, **changes)
    poisoned(state)
    before = everything(state)
    metrics = train_step(state, tiny_batch(state.config, seed=7))
    assert not torch.isfinite(torch.as_tensor(metrics["loss"]))
    for (name, a), b in zip(everything(state)["dino"].items(), before["dino"].values(), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), name
    for number, moments in everything(state)["optimizer"].items():
        for name, a in moments.items():
            assert torch.equal(a, before["optimizer"][number][name]), (number, name)
    assert (state.step, state.skipped, state.skipped_in_a_row) == (3, 1, 1)


def test_a_gradient_that_is_not_finite_under_a_finite_loss_is_skipped_too() -> None:
    state = after(1)
    next(state.dino.student.parameters()).register_hook(lambda grad: grad * float("inf"))
    before = everything(state)["dino"]
    metrics = train_step(state, tiny_batch(state.config, seed=7))
    assert torch.isfinite(torch.as_tensor(metrics["loss"]))
    assert all(torch.equal(a, before[k]) for k, a in state.dino.state_dict().items())
    assert state.skipped == 1


def test_schedules_wait_while_steps_are_skipped() -> None:
    state = after(1, optim={"warmup_epochs": 1})
    weight = state.dino.student.head.last_layer.weight_v
    whole = weight.detach().clone()
    poisoned(state)
    skipped = train_step(state, tiny_batch(state.config, seed=1))
    with torch.no_grad():
        weight.copy_(whole)
    retried = train_step(state, tiny_batch(state.config, seed=2))
    assert retried["lr"] == skipped["lr"] == Schedule(state.config, num_images=NUM_IMAGES).at(1).lr
    assert (state.step, state.skipped, state.skipped_in_a_row) == (3, 1, 0)


# From an official state dict


def test_networks_start_from_an_official_state_dict_and_its_centre() -> None:
    donor = after(3)
    official = {
        "student": {f"module.{k}": v for k, v in donor.dino.student.state_dict().items()},
        "teacher": donor.dino.teacher.state_dict(),
        "dino_loss": {"center": donor.dino.center[None]},
    }
    state = build_state(tiny_config(train={"seed": 9}), num_images=NUM_IMAGES, official=official)
    assert state.step == 0
    assert state.config.backbone.pos_embed == "official"
    assert all(torch.equal(v, donor.dino.state_dict()[k]) for k, v in state.dino.state_dict().items())
    train_step(state, tiny_batch(state.config))
