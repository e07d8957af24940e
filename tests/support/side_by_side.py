"""Our training step beside dino_reference.py: the same weights, the same crops, and how far the two part.

Ours runs thrice. In "float64" every number of it is a double, so that what remains is the algorithm; in "float32" as it
trains; in "float32, step by step" each step starts from the reference's networks and centre, so that what one step
rounds is not mixed with what later steps make of it.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import fields
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from dino_reference import Arguments, Step, Weights, run
from numpy.typing import NDArray
from tiny import NUM_IMAGES, Batch, tiny_batch, tiny_config
from torch import Tensor

from dinoray.pipeline.training.config import DINOConfig
from dinoray.pipeline.training.state import build_state
from dinoray.pipeline.training.step import train_step

NUM_STEPS = 50
STEPS_PER_EPOCH = 10
MODES = EXACT, STEP_BY_STEP, FREE = "float64", "float32, step by step", "float32"
SCHEDULES = ("lr", "weight_decay", "teacher_momentum", "teacher_temp")
TENSORS = ("center", "grads", "clipped", "student", "teacher")
QUANTITIES = (*SCHEDULES, "loss", *TENSORS)

SMALLEST = 1e-6
"""A tensor's scale is its own largest entry, but at least this share of the largest of all tensors of its kind."""

BEFORE_BATCH_NORM = {"backbone.norm.bias", "head.mlp.0.bias", "head.mlp.3.bias"}

Changes = dict[str, dict[str, Any]]

BASIS: Changes = {
    "head": {
        "out_dim": 64,
        "hidden_dim": 64,
        "bottleneck_dim": 256,
    },  # wide: else all logits are near 1 at first
    "loss": {"teacher_temp": 0.07, "warmup_teacher_temp": 0.04, "warmup_teacher_temp_epochs": 3},
    "teacher": {"teacher_momentum": 0.9},
    "optim": {"warmup_epochs": 1, "freeze_last_layer_epochs": 2},
    "train": {"epochs": NUM_STEPS // STEPS_PER_EPOCH},
}
"""Warm-ups of 10 and 30 steps, a freeze of 20, then what is left of 50; AdamW, gradients clipped to 3."""

CONFIGURATIONS: dict[str, Changes] = {
    "AdamW": {},
    "AdamW, no clipping": {"optim": {"clip_grad": 0.0}},
    "AdamW, clip 0.3, learnt magnitude": {"optim": {"clip_grad": 0.3}, "head": {"norm_last_layer": False}},
    "SGD": {"optim": {"name": "sgd", "base_lr": 0.64}},
    "LARS, batch norm in the head, learnt magnitude": {
        "optim": {"name": "lars", "base_lr": 0.64},
        "head": {"use_bn": True, "norm_last_layer": False},
    },
    "AdamW, no local crops": {"crops": {"num_local_crops": 0}},
    "AdamW, local crops of the global size": {"crops": {"local_crop_size": 16}},
    "AdamW, official position embeddings": {
        "crops": {"num_local_crops": 3, "local_crop_size": 12},
        "backbone": {"pos_embed": "official"},
    },
}


def configuration(name: str) -> DINOConfig:
    """The basis with what `name` changes in it."""
    changes = CONFIGURATIONS[name]
    return tiny_config(
        **{
            section: {**BASIS.get(section, {}), **changes.get(section, {})}
            for section in {**BASIS, **changes}
        }
    )


class Ours:
    """`build_state` and `train_step`, watched: what they leave behind is told in the reference's terms."""

    def __init__(self, config: DINOConfig, weights: Weights | None = None, *, exact: bool = False) -> None:
        self.exact = exact
        with self._arithmetic():
            self.state = build_state(config, num_images=NUM_IMAGES)
        if weights is not None:
            self.state.dino.student.load_state_dict(weights)
            self.state.dino.teacher.load_state_dict(weights)
        self._grads: Weights = {}
        self._clipped: Weights = {}
        self._names = {p: name for name, p in self.state.dino.student.named_parameters()}
        for p in self._names:
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(self._note_grad)
        self.state.optimizer.register_step_pre_hook(self._note_clipped)

    def weights(self) -> Weights:
        """A copy of the student's."""
        return copies(self.state.dino.student.state_dict())

    def follow(self, step: Step) -> None:
        """Take the networks and the centre that the reference has after `step`."""
        self.state.dino.student.load_state_dict(step.student)
        self.state.dino.teacher.load_state_dict(step.teacher)
        self.state.dino.center.copy_(step.center)

    def step(self, batch: Batch) -> Step:
        """One `train_step`."""
        self._grads, self._clipped = {}, {}
        with self._arithmetic():
            metrics = {name: float(value) for name, value in train_step(self.state, batch).items()}
        return Step(
            loss=metrics["loss"],
            **{name: metrics[name] for name in SCHEDULES},
            grads=self._grads,
            clipped=self._clipped,
            student=self.weights(),
            teacher=copies(self.state.dino.teacher.state_dict()),
            center=self.state.dino.center.clone(),
        )

    def _note_grad(self, p: Tensor) -> None:
        assert p.grad is not None
        self._grads[self._names[p]] = p.grad.clone()  # type: ignore[index]

    def _note_clipped(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._clipped[self._names[p]] = p.grad.clone()

    @contextlib.contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """With `exact`, new tensors are doubles and `.float()` means double, and all else is the code as it stands."""
        if not self.exact:
            yield
            return
        single = Tensor.float
        Tensor.float = Tensor.double  # type: ignore[method-assign]
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            Tensor.float = single  # type: ignore[method-assign]
            torch.set_default_dtype(torch.float32)


def copies(weights: Weights) -> Weights:
    return {name: x.detach().clone() for name, x in weights.items()}


def arguments(config: DINOConfig) -> Arguments:
    """The same settings as the published script takes them."""
    c = config
    values: dict[str, Any] = {
        "patch_size": c.backbone.kwargs["patch_size"],
        "num_heads": c.backbone.kwargs["num_heads"],
        "pos_embed": c.backbone.pos_embed,
        "norm_last_layer": c.head.norm_last_layer,
        "epochs": int(c.train.epochs),
        "steps_per_epoch": STEPS_PER_EPOCH,
        "global_batch_size": c.train.global_batch_size,
        "optimizer": c.optim.name,
        "lr": c.optim.base_lr,
        "min_lr": c.optim.min_lr,
        "warmup_epochs": int(c.optim.warmup_epochs),
        "weight_decay": c.optim.weight_decay,
        "weight_decay_end": c.optim.final_weight_decay,
        "momentum_teacher": c.teacher.teacher_momentum,
        "momentum_teacher_end": c.teacher.final_teacher_momentum,
        "student_temp": c.loss.student_temp,
        "teacher_temp": c.loss.teacher_temp,
        "warmup_teacher_temp": c.loss.warmup_teacher_temp,
        "warmup_teacher_temp_epochs": c.loss.warmup_teacher_temp_epochs,
        "center_momentum": c.loss.center_momentum,
        "clip_grad": c.optim.clip_grad,
        "freeze_last_layer": int(c.optim.freeze_last_layer_epochs),
    }
    assert set(values) == {field.name for field in fields(Arguments)}
    return Arguments(**values)


def crop_list(batch: Batch) -> list[NDArray[np.uint8]]:
    """Rows per image -> one array per crop, globals first."""
    return [
        column[:, i]
        for column in (batch["global_crops"], batch["local_crops"])
        for i in range(column.shape[1])
    ]


@lru_cache
def deviations(name: str) -> dict[str, dict[str, float]]:
    """Mode -> quantity -> the largest relative deviation from the reference in 50 steps of a configuration."""
    config = configuration(name)
    single = Ours(config)
    weights = single.weights()
    ours = dict(zip(MODES, (Ours(config, weights, exact=True), Ours(config, weights), single), strict=True))
    largest = {mode: dict.fromkeys(QUANTITIES, 0.0) for mode in MODES}
    batches = [tiny_batch(config, seed=seed) for seed in range(NUM_STEPS)]
    references = run(weights, map(crop_list, batches), arguments(config))
    for batch, reference in zip(batches, references, strict=True):
        for mode in MODES:
            for quantity, apart in step_deviations(ours[mode].step(batch), reference).items():
                largest[mode][quantity] = max(largest[mode][quantity], apart)
        ours[STEP_BY_STEP].follow(reference)
    return largest


def step_deviations(ours: Step, reference: Step) -> dict[str, float]:
    """The relative deviation of each quantity after one step: a number's by itself, a tensor's by its scale."""
    apart = {
        name: abs(getattr(ours, name) - getattr(reference, name)) / max(abs(getattr(reference, name)), 1e-12)
        for name in (*SCHEDULES, "loss")
    }
    for name in TENSORS:
        a, b = getattr(ours, name), getattr(reference, name)
        apart[name] = tensor_deviation(a, b) if isinstance(b, dict) else tensor_deviation({"": a}, {"": b})
    return apart


def tensor_deviation(ours: Weights, reference: Weights) -> float:
    """max |a - b| / max |b| of the worst tensor; infinite where one of the two has a tensor that the other lacks."""
    if ours.keys() != reference.keys():
        return float("inf")
    ours, reference = felt(ours), felt(reference)
    scales = {name: float(b.detach().abs().max()) for name, b in reference.items()}
    least = SMALLEST * max(scales.values())
    return max(
        float((ours[name].double() - b).detach().abs().max()) / max(scales[name], least)
        for name, b in reference.items()
    )


def felt(tensors: Weights) -> Weights:
    """Without what no output depends on: the keys' bias, which a softmax takes out, and constants before a batch norm.

    Their gradients are zero but for rounding, and Adam, which divides by their size, makes steps of that noise.
    """
    batch_normed = "head.mlp.1.weight" in tensors
    return {
        name: x[~keys_bias(x)] if name.endswith("attn.qkv.bias") else x
        for name, x in tensors.items()
        if x.is_floating_point() and not (batch_normed and name in BEFORE_BATCH_NORM)
    }


def keys_bias(bias: Tensor) -> Tensor:
    """Which entries of the bias of q, k and v are k's."""
    third = len(bias) // 3
    return (torch.arange(len(bias)) >= third) & (torch.arange(len(bias)) < 2 * third)
