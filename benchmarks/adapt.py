"""Continuing from good weights: by the settings of a first training, and by the recipe `adapt`.

    python benchmarks/adapt.py [--seeds 0 1 2] [--pretrain 1500] [--steps 200] [--picture benchmarks/adapt.png]

A small ViT learns half of the demo's classes until its features serve the other half, too. Its backbone then continues
on that other half, without heads, as published weights come: naively (NAIVE) and with `adapt`. Each is classified by
k-NN on the other half. Without Ray. Prints a table for RESULTS.md, with the step at which `health.on_regression=stop`
would end a run, "-" for never; draws the curves, and exits with 1 unless in every seed the naive run is stopped, and
ends worse than its start by the guard's rule, and the recipe neither.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from collapse import batches
from matplotlib.figure import Figure
from numpy.typing import NDArray
from safetensors.torch import save_file

from dinoray.jobs.cli.config import load_config
from dinoray.pipeline.augment.multicrop import limit_threads
from dinoray.pipeline.data.decoding.decode import decode, eval_crop
from dinoray.pipeline.data.demo_images import PATTERNS, draw_demo_image
from dinoray.pipeline.evaluation.config import EvalConfig
from dinoray.pipeline.evaluation.features import Features, embed
from dinoray.pipeline.evaluation.knn import knn_accuracy
from dinoray.pipeline.tracking.start import is_worse, regression
from dinoray.pipeline.training.auto import resolve
from dinoray.pipeline.training.config import HealthConfig
from dinoray.pipeline.training.init_weights import load_initial_weights, read_weights
from dinoray.pipeline.training.state import TrainState, build_state
from dinoray.pipeline.training.step import train_step

CLASSES = sorted(PATTERNS)
FIRST, OTHERS = CLASSES[::2], CLASSES[1::2]
NUM_FIRST, NUM_TRAIN, NUM_VAL = 300, 180, 100
"""Images of a class: to learn first, to continue on, to classify."""
BATCH, SIZE, EVERY = 64, 64, 20
COMMON = [
    "data.path=none",
    "backbone.name=vit_tiny_patch16_224",
    "backbone.kwargs={embed_dim: 96, depth: 3, num_heads: 3}",
    "crops.global_crop_size=64",
    "crops.local_crop_size=32",
    "crops.local_crop_scale=[0.1, 0.4]",
    "crops.num_local_crops=2",
    "crops.saturation=0.8",
    "crops.hue=0.5",
    "crops.blur_sigma=[0.1, 0.6]",
    "head.out_dim=512",
    "head.hidden_dim=512",
    "head.bottleneck_dim=64",
    "head.use_bn=true",
    "loss.teacher_temp=0.03",
    f"train.global_batch_size={BATCH}",
]
"""The demo's settings of images, network and loss, for both recipes."""
NAIVE = ["head.use_bn=false", "teacher.teacher_momentum=0.98", "optim.base_lr=0.016"]
"""What people do who continue as they would begin: the published head, a teacher as fast as a small run wants it, and
a peak rate of 4e-3, which suits a batch four times as large. Milder, and at first unharmed: RESULTS.md."""

Images = list[tuple[str, NDArray[np.uint8]]]
Curve = list[tuple[int, float]]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pretrain", type=int, default=1500, help="steps of the first training")
    parser.add_argument("--steps", type=int, default=200, help="steps of each run that continues")
    parser.add_argument("--picture", type=Path, default=Path(__file__).parent / "adapt.png")
    arguments = parser.parse_args(argv)
    limit_threads()
    firsts, others = draw_images(FIRST, "train", NUM_FIRST), draw_images(OTHERS, "train", NUM_TRAIN)
    val = draw_images(OTHERS, "val", NUM_VAL)
    curves: dict[str, list[Curve]] = {"naive": [], "adapt": []}
    columns = [
        f"{name}, {what}" for name in curves for what in ("least", f"step {arguments.steps}", "stopped at")
    ]
    print(f"| seed | start | {' | '.join(columns)} |\n|---|---|{'---|' * len(columns)}")
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        for seed in arguments.seeds:
            first = begin("demo", firsts, arguments.pretrain, seed=seed)
            train(first, firsts)
            file = str(Path(scratch) / f"{seed}.safetensors")
            save_file(first.dino.teacher.backbone.state_dict(), file)
            cells = []
            for name, recipe, more in (("naive", "demo", NAIVE), ("adapt", "adapt", [])):
                state = begin(recipe, others, arguments.steps, *more, seed=seed, weights=file)
                curve = train(state, others, val)
                curves[name].append(curve)
                start, end, least = curve[0][1], curve[-1][1], min(score for _, score in curve)
                stop = stopped_at(curve, grace_steps=state.health.grace_steps, num_val=len(val))
                first_line, *_, last_line = lines_of(curve, len(val))
                is_beaten = bool(is_worse(first_line, last_line, from_weights=True))
                wrong += (is_beaten or bool(stop)) if name == "adapt" else not (is_beaten and stop)
                cells += [f"{least:.1%}", f"{end:.1%} ({100 * (end - start):+.1f})", str(stop or "-")]
            print(f"| {seed} | {start:.1%} | {' | '.join(cells)} |", flush=True)
    draw(curves).savefig(arguments.picture, dpi=110)
    print(f"\n{wrong} of {2 * len(arguments.seeds)} runs did otherwise than expected")
    sys.exit(1 if wrong else 0)


def draw_images(classes: Sequence[str], split: str, per_class: int) -> Images:
    """Return images by name; the class stands before the first dash."""
    return [
        (f"{label}-{split}-{i}", decode(draw_demo_image(label, split, i), max_pixels=10**8))
        for label in classes
        for i in range(per_class)
    ]


def begin(
    recipe: str, images: Images, steps: int, *more: str, seed: int, weights: str | None = None
) -> TrainState:
    """Return a new run of a recipe with `steps` steps; its backbone is that in the file `weights`, if any."""
    epochs = steps * BATCH / len(images)
    overrides = [
        *COMMON,
        f"train.epochs={epochs}",
        f"optim.warmup_epochs={epochs / 10}",
        f"train.seed={seed}",
        *more,
    ]
    algorithm = load_config(recipe, None, overrides).algorithm()
    state = build_state(resolve(algorithm, num_images=len(images)).config, num_images=len(images))
    if weights is not None:
        load_initial_weights(state, read_weights(weights), "backbone")
    return state


def train(state: TrainState, images: Images, val: Images | None = None) -> Curve:
    """Train to the end; return k-NN accuracy of the teacher by step, on `val` with the training images as voters."""
    curve = [(0, accuracy(state, images, val))] if val else []
    for batch in batches(images, state.config):
        train_step(state, batch)
        if val and state.step % EVERY == 0:
            curve.append((state.step, accuracy(state, images, val)))
        if state.step == state.schedule.total_steps:
            break
    return curve


def stopped_at(curve: Curve, *, grace_steps: int, num_val: int) -> int | None:
    """Return the step at which the guard would stop a run with this curve; None if it would not."""
    lines = lines_of(curve, num_val)
    persistence = HealthConfig().regression_persistence
    for i in range(1, len(lines) - 1):  # after the last step it only warns
        if regression(
            lines[0], lines[: i + 1], grace_steps=grace_steps, persistence=persistence, from_weights=True
        ):
            return curve[i][0]
    return None


def lines_of(curve: Curve, num_val: int) -> list[dict[str, float]]:
    """Return a curve as the lines of metrics.jsonl."""
    return [{"step": step, "knn_20": score, "num_val": num_val} for step, score in curve]


def accuracy(state: TrainState, train: Images, val: Images) -> float:
    backbone = state.dino.teacher.backbone

    def features(images: Images) -> Features:
        crops = np.stack([eval_crop(image, size=SIZE) for _, image in images])
        rows = embed(backbone, crops, state.config.crops, precision="fp32")
        return Features(rows, [name.partition("-")[0] for name, _ in images], 0)

    return knn_accuracy(features(train), features(val), EvalConfig(k=(20,)))["knn_20"]


def draw(curves: dict[str, list[Curve]]) -> Figure:
    """Plot accuracy over steps, one line per run, and the start of each."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    labels = {"naive": "naive: as a first training, at a high rate", "adapt": "recipe adapt"}
    for colour, (name, runs) in zip(("tab:red", "tab:blue"), curves.items(), strict=True):
        for i, curve in enumerate(runs):
            axes.plot(
                *zip(*curve, strict=True), color=colour, alpha=0.8, label=labels[name] if i == 0 else None
            )
    for i, curve in enumerate(curves["adapt"]):
        axes.axhline(curve[0][1], color="grey", lw=0.8, ls=":", label="start" if i == 0 else None)
    axes.set(xlabel="step", ylabel="k-NN accuracy of the teacher, k = 20")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    main(sys.argv[1:])
