"""The memory model beside what torch's allocator gives out during a step on a CPU."""

from typing import Any

import pytest
import torch
from tiny import NUM_IMAGES, tiny_batch, tiny_config
from torch.profiler import ProfilerActivity, profile

from dinoray.pipeline.planning.memory import Vit, memory_of
from dinoray.pipeline.training.config import DINOConfig
from dinoray.pipeline.training.state import build_state
from dinoray.pipeline.training.step import train_step

TOLERANCE = 0.1
"""Of the peak beyond what is held: the model counts no tensors of a few numbers for each token or row."""


def config_of(**changes: dict[str, Any]) -> DINOConfig:
    """A step of some 20 MB, most of it activations."""
    tree: dict[str, dict[str, Any]] = {
        "crops": {"global_crop_size": 64, "local_crop_size": 32},
        "backbone": {"kwargs": {"patch_size": 8, "embed_dim": 64, "depth": 6, "num_heads": 2}},
        "head": {"out_dim": 1024},
        "train": {"global_batch_size": 8},
    }
    return tiny_config(**{s: {**tree.get(s, {}), **changes.get(s, {})} for s in tree | changes})


def measured(config: DINOConfig) -> int:
    """The bytes that the third step takes at its peak, beyond networks and moments."""
    state = build_state(config, num_images=NUM_IMAGES)
    batch = tiny_batch(config, num_images=config.train.global_batch_size)
    for _ in range(2):
        train_step(state, batch)
    state.optimizer.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        train_step(state, batch)
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


CASES: dict[str, dict[str, Any]] = {
    "activations": {},
    "selective": {"train": {"activation_checkpointing": "selective"}},
    "full": {"train": {"activation_checkpointing": "full"}},
    "microbatches": {"train": {"accumulate_steps": 4, "global_batch_size": 16}},
    "logits": {"head": {"out_dim": 16384, "bottleneck_dim": 32}},
    "parameters": {"train": {"global_batch_size": 1}, "head": {"out_dim": 32, "hidden_dim": 1024}},
    "last_n": {"backbone": {"train": "last_n(2)"}},
    "lora": {"backbone": {"train": "lora(8)"}},
}


@pytest.mark.parametrize("name", CASES)
def test_the_peak_of_a_step_is_as_computed(name: str) -> None:
    config = config_of(**CASES[name])
    found = memory_of(config, num_images=NUM_IMAGES, train_workers=1, bf16=False)
    assert found is not None
    assert found.total - found.held == pytest.approx(measured(config), rel=TOLERANCE)


@pytest.mark.parametrize("train", ["all", "last_n(2)", "lora(8)"])
def test_what_is_held_is_the_networks_and_the_moments(train: str) -> None:
    state = build_state(config_of(backbone={"train": train}), num_images=NUM_IMAGES)
    train_step(state, tiny_batch(state.config, num_images=8))
    moments = [x for one in state.optimizer.state_dict()["state"].values() for x in one.values() if x.ndim]
    held = sum(x.nbytes for x in (*state.dino.parameters(), *moments))  # what is shared counts once
    found = memory_of(state.config, num_images=NUM_IMAGES, train_workers=1, bf16=False)
    assert found is not None
    assert found.held == pytest.approx(held, rel=0.02)  # without the frozen magnitudes' moments


@pytest.mark.parametrize("name", ["vit_small_patch16_224", "vit_giant_patch14_224"])
def test_parameters_are_those_of_timm(name: str) -> None:
    import timm

    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    vit = Vit.of(tiny_config(backbone={"name": name, "kwargs": {}}))
    assert vit is not None
    assert vit.num_parameters(224) == sum(p.numel() for p in model.parameters())


def test_of_other_networks_nothing_is_said() -> None:
    for backbone in ({"name": "resnet50", "kwargs": {}}, {"kwargs": {"init_values": 1.0}}):
        config = tiny_config(backbone=backbone)
        assert memory_of(config, num_images=NUM_IMAGES, train_workers=1, bf16=True) is None


def test_more_workers_hold_gradients_and_share_activations() -> None:
    one, two = (memory_of(config_of(), num_images=NUM_IMAGES, train_workers=n, bf16=True) for n in (1, 2))
    assert one is not None
    assert two is not None
    assert two.held > one.held
    assert two.activations < one.activations
