"""Fifty training steps against the independent reference of dino_reference.py, in float64 and in float32."""

import dataclasses
from typing import Any, Literal

import pytest
import torch
from dino_reference import Arguments, run, vit
from side_by_side import (
    CONFIGURATIONS,
    EXACT,
    FREE,
    NUM_STEPS,
    QUANTITIES,
    SCHEDULES,
    STEP_BY_STEP,
    Ours,
    arguments,
    configuration,
    crop_list,
    deviations,
    keys_bias,
    step_deviations,
)
from tiny import tiny_batch

from dinoray.models.backbone import build_backbone
from dinoray.models.config import BackboneConfig

SHAPES = ("patch_size", "num_heads", "steps_per_epoch")
CONFIGURATION = pytest.mark.parametrize("name", CONFIGURATIONS)

# What float32 reaches, with a margin of some five. One step rounds a gradient by up to 4e-4 of its largest entry, for
# logits are divided by a temperature of 0.04; run freely, later steps multiply that, and Adam's first step on a
# parameter goes by the sign of a gradient, however small that is.
ROUNDING = {"loss": 1e-5, "center": 1e-5, "grads": 2e-3, "clipped": 2e-3, "student": 2e-4, "teacher": 2e-4}
# How much of it adds up depends on the processor, whose widest instructions decide the order of sums.
DRIFT = {"loss": 5e-5, "center": 2e-4, "grads": 2e-3, "clipped": 2e-3, "student": 1e-3, "teacher": 5e-4}


def assert_within(apart: dict[str, float], limits: dict[str, float]) -> None:
    assert apart.keys() == set(QUANTITIES)
    far = {name: value for name, value in apart.items() if not value <= limits.get(name, 1e-12)}
    assert not far


@CONFIGURATION
def test_with_doubles_for_floats_fifty_steps_are_the_published_ones(name: str) -> None:
    assert_within(deviations(name)[EXACT], {q: 1e-9 for q in QUANTITIES if q not in SCHEDULES})


@CONFIGURATION
def test_in_float32_each_step_is_the_published_one_but_for_rounding(name: str) -> None:
    assert_within(deviations(name)[STEP_BY_STEP], ROUNDING)


@CONFIGURATION
def test_in_float32_fifty_steps_stay_beside_the_published_ones(name: str) -> None:
    assert_within(deviations(name)[FREE], DRIFT)


def test_the_fifty_steps_pass_through_every_phase() -> None:
    config = configuration("AdamW")
    now = [Ours(config).state.schedule.at(step) for step in range(NUM_STEPS)]
    assert [now[0].lr, now[9].lr] == pytest.approx([0, 1e-3])
    assert {round(n.teacher_temp, 4) for n in now} == {0.04, 0.055, 0.07}
    assert [n.freeze_last_layer for n in now] == [True] * 20 + [False] * 30
    assert now[-1].weight_decay > 0.39
    assert now[-1].teacher_momentum > 0.999


OTHERWISE: dict[str, Any] = {
    "optimizer": "sgd",
    "pos_embed": "official",
    "norm_last_layer": False,
    "epochs": 6,
    "global_batch_size": 5,
    "warmup_epochs": 2,
    "warmup_teacher_temp_epochs": 2,
    "freeze_last_layer": 1,
    "clip_grad": 0.0,
    "min_lr": 1e-5,
}
"""Another value of each setting; of the others, one that is a thousandth larger."""


@pytest.mark.parametrize(
    "field", [f.name for f in dataclasses.fields(Arguments) if f.name not in SHAPES], ids=str
)
def test_a_reference_that_is_told_otherwise_parts_from_ours(field: str) -> None:
    config = configuration("AdamW")
    told = arguments(config)
    other: Any = OTHERWISE[field] if field in OTHERWISE else 1.001 * getattr(told, field)
    ours = Ours(config, exact=True)
    batches = [tiny_batch(config, seed=seed) for seed in range(12)]
    references = run(ours.weights(), map(crop_list, batches), dataclasses.replace(told, **{field: other}))
    apart = (
        max(step_deviations(ours.step(batch), reference).values())
        for batch, reference in zip(batches, references, strict=True)
    )
    assert any(value > 1e-6 for value in apart)


@pytest.mark.parametrize("size", [224, 96, 112, 480])
@pytest.mark.parametrize("rule", ["official", "timm"])
def test_position_embeddings_are_resized_by_the_rule_at_the_published_sizes(
    rule: Literal["official", "timm"], size: int
) -> None:
    config = configuration("AdamW")
    kwargs = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    backbone: Any = build_backbone(
        BackboneConfig(name="vit_tiny_patch16_224", pos_embed=rule, kwargs=kwargs),
        crop_sizes=(224, size),
        drop_path_rate=0.0,
    )
    generator = torch.Generator().manual_seed(0)
    backbone.pos_embed.data.normal_(generator=generator)
    pixels = torch.randn(2, 3, size, size, generator=generator)
    weights = {f"backbone.{name}": x.double() for name, x in backbone.state_dict().items()}
    told = dataclasses.replace(arguments(config), patch_size=16, num_heads=2, pos_embed=rule)
    expected = vit(weights, pixels.double(), told)
    torch.testing.assert_close(backbone(pixels).double(), expected, rtol=1e-4, atol=1e-5)


def test_no_output_depends_on_what_the_comparison_leaves_out() -> None:
    config = configuration("LARS, batch norm in the head, learnt magnitude")
    ours = Ours(config, exact=True)
    gradients = ours.step(tiny_batch(config)).grads
    largest = max(float(grad.abs().max()) for grad in gradients.values())
    left_out = [gradients[name] for name in ("backbone.norm.bias", "head.mlp.0.bias", "head.mlp.3.bias")]
    left_out += [grad[keys_bias(grad)] for name, grad in gradients.items() if name.endswith("qkv.bias")]
    assert len(left_out) == 5
    assert max(float(grad.abs().max()) for grad in left_out) < 1e-12 * largest
