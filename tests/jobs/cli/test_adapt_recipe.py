"""Good weights continued naively fall below their start, and the guard stops that; by the recipe adapt they do not."""

from typing import Any

import numpy as np
import pytest
from collapse import batches
from fitted_weights import fitted_weights
from jobs_processes import TINY
from numpy.typing import NDArray
from torch import Tensor

from dinoray.jobs.cli.config import load_config
from dinoray.pipeline.data.decoding.decode import decode, eval_crop
from dinoray.pipeline.data.demo_images import PATTERNS, draw_demo_image
from dinoray.pipeline.evaluation.config import EvalConfig
from dinoray.pipeline.evaluation.features import Features, embed
from dinoray.pipeline.evaluation.knn import knn_accuracy
from dinoray.pipeline.tracking.start import is_worse, regression
from dinoray.pipeline.training.auto import resolve
from dinoray.pipeline.training.config import DINOConfig, HealthConfig
from dinoray.pipeline.training.state import TrainState, build_state
from dinoray.pipeline.training.step import train_step

Images = list[tuple[str, NDArray[np.uint8]]]
STEPS, EVERY = 40, 4
COMMON = [
    *(word for word in TINY if not word.startswith("recipe=")),
    "name=tiny",
    "data.path=none",
    "head.use_bn=false",
    "train.global_batch_size=24",
    f"train.epochs={STEPS}",
    "teacher.teacher_momentum=0.9",  # a teacher of 0.999 would not leave the start within these steps
]


def images(split: str, per_label: int) -> Images:
    return [
        (f"{label}-{i}", decode(draw_demo_image(label, split, i), max_pixels=10**6))
        for label in list(PATTERNS)[:3]
        for i in range(per_label)
    ]


TRAIN, VAL = images("train", 8), images("val", 16)


def config_of(recipe: str, *settings: str) -> DINOConfig:
    algorithm = load_config(recipe, None, [*COMMON, *settings]).algorithm()
    return resolve(algorithm, num_images=len(TRAIN)).config


@pytest.fixture(scope="module")
def good() -> dict[str, Tensor]:
    both = [*TRAIN, *VAL]
    labels = [name.partition("-")[0] for name, _ in both]
    return fitted_weights(config_of("demo"), [image for _, image in both], labels)


def scores(state: TrainState) -> dict[str, Any]:
    """A line of metrics.jsonl."""

    def features(images: Images) -> Features:
        crops = np.stack([eval_crop(image, size=32) for _, image in images])
        rows = embed(state.dino.teacher.backbone, crops, state.config.crops, precision="fp32")
        return Features(rows, [name.partition("-")[0] for name, _ in images], 0)

    knn = knn_accuracy(features(TRAIN), features(VAL), EvalConfig(k=(10,)))
    return {"step": state.step, "knn_10": knn["knn_10"], "num_val": len(VAL)}


def continued(config: DINOConfig, good: dict[str, Tensor]) -> tuple[list[dict[str, Any]], Any]:
    """Continue from good weights to the end; return the evaluations, and what the guard finds by its defaults."""
    state = build_state(config, num_images=len(TRAIN))
    for network in (state.dino.student, state.dino.teacher):
        network.backbone.load_state_dict(good)
    lines = [scores(state)]
    for batch in batches(TRAIN, config):
        train_step(state, batch)
        if state.step % EVERY == 0:
            lines.append(scores(state))
        if state.step == STEPS:
            break
    grace, persistence = state.health.grace_steps, HealthConfig().regression_persistence
    return lines, regression(lines[0], lines, grace_steps=grace, persistence=persistence, from_weights=True)


def test_naive_continuation_falls_below_its_start_and_the_guard_stops_it(good: dict[str, Tensor]) -> None:
    lines, found = continued(config_of("demo", "optim.base_lr=0.1"), good)
    assert lines[0]["knn_10"] == 1.0
    assert lines[-1]["knn_10"] < 0.9
    assert found is not None
    assert found.since <= STEPS / 2


def test_the_recipe_adapt_stays_at_its_start(good: dict[str, Tensor]) -> None:
    lines, found = continued(config_of("adapt", "init.from=good.pth", "init.freeze_steps=8"), good)
    assert [is_worse(lines[0], line, from_weights=True) for line in lines] == [""] * len(lines)
    assert found is None
