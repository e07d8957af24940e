"""What else a step can do: batches in parts, Sinkhorn, KoLeo, a start from published weights; what it refuses."""

from typing import Any

import numpy as np
import pytest
import torch
from tiny import NUM_IMAGES, tiny_batch, tiny_config
from tiny_states import after, same, tiny_state, weights

from dinoray.models.errors import ConfigError, ResourceError
from dinoray.models.loss import koleo
from dinoray.pipeline.augment.kernels.torch_colour import finished
from dinoray.pipeline.training.pixels import pixels
from dinoray.pipeline.training.state import build_state
from dinoray.pipeline.training.step import train_step


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
        state.dino.update_teacher = lambda momentum, _, moves=moves: moves.append(momentum)  # type: ignore[method-assign]
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


@pytest.mark.parametrize("num_parts", [1, 2])
def test_colours_made_in_the_step_train_as_those_that_came_with_the_crops(num_parts: int) -> None:
    states = []
    for where in ("cpu", "device"):
        config = tiny_config(crops={"photometric": where}, train={"accumulate_steps": num_parts})
        batches = [
            tiny_batch(tiny_config(crops={"photometric": "device"}), num_images=4, seed=n) for n in range(2)
        ]
        states.append(build_state(config, num_images=NUM_IMAGES))
        for batch in batches:
            train_step(states[-1], finished(batch, config.crops) if where == "cpu" else batch)
    assert same(weights(states[0]), weights(states[1]))


def test_crops_without_what_their_setting_needs_are_refused() -> None:
    device, cpu = (tiny_config(crops={"photometric": where}) for where in ("device", "cpu"))
    with pytest.raises(
        ConfigError, match=r"batch\['global_photometric'\] is missing, it must be float32 \[B, 2, 11\]"
    ):
        train_step(build_state(device, num_images=NUM_IMAGES), tiny_batch(cpu))
    with pytest.raises(ConfigError, match=r"batch has 'global_photometric'"):
        train_step(build_state(cpu, num_images=NUM_IMAGES), tiny_batch(device))


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


def test_local_crops_that_are_not_cut_need_no_size_that_fits() -> None:
    tiny_state(tiny_config(crops={"num_local_crops": 0, "local_crop_size": 9}))


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
