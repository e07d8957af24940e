"""Continuing from good weights: by the settings of a first training, and by the recipe `adapt`.

    python benchmarks/adapt.py [--seeds 0 1 2] [--pretrain 400] [--steps 200] [--picture benchmarks/adapt.png]

A small ViT learns half of the demo's classes. Its backbone then continues on the other half, without heads, as
published weights come: naively, with the demo recipe that it learnt with, and with `adapt`. Each is classified by k-NN
on the other half, whose images and labels no network has trained on before. Without Ray. Prints a table for RESULTS.md,
draws the curves, and exits with 1 unless in every seed the naive run ends below its start and the recipe does not.
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
from dinoray.pipeline.data.decode import decode, eval_crop
from dinoray.pipeline.data.demo_images import PATTERNS, draw_demo_image
from dinoray.pipeline.evaluation.config import EvalConfig
from dinoray.pipeline.evaluation.features import Features, embed
from dinoray.pipeline.evaluation.knn import knn_accuracy
from dinoray.pipeline.training.auto import resolve
from dinoray.pipeline.training.init_weights import load_initial_weights, read_weights
from dinoray.pipeline.training.state import TrainState, build_state
from dinoray.pipeline.training.step import train_step

CLASSES = sorted(PATTERNS)
FIRST, OTHERS = CLASSES[::2], CLASSES[1::2]
NUM_TRAIN, NUM_VAL = 180, 150
BATCH, SIZE, EVERY = 64, 64, 25
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

Images = list[tuple[str, NDArray[np.uint8]]]
Curve = list[tuple[int, float]]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pretrain", type=int, default=400, help="steps of the first training")
    parser.add_argument("--steps", type=int, default=200, help="steps of each run that continues")
    parser.add_argument("--picture", type=Path, default=Path(__file__).parent / "adapt.png")
    arguments = parser.parse_args(argv)
    limit_threads()
    images = {half[0]: draw_images(half, "train", NUM_TRAIN) for half in (FIRST, OTHERS)}
    other, val = images[OTHERS[0]], draw_images(OTHERS, "val", NUM_VAL)
    curves: dict[str, list[Curve]] = {"naive": [], "adapt": []}
    print(f"| seed | start | naive, least | naive, step {arguments.steps} | adapt, least | adapt, end |")
    print("|---|---|---|---|---|---|")
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        for seed in arguments.seeds:
            first = begin("demo", images[FIRST[0]], arguments.pretrain, seed=seed)
            train(first, images[FIRST[0]])
            file = str(Path(scratch) / f"{seed}.safetensors")
            save_file(first.dino.teacher.backbone.state_dict(), file)
            cells = []
            for name, recipe in (("naive", "demo"), ("adapt", "adapt")):
                state = begin(recipe, other, arguments.steps, seed=seed, weights=file)
                curve = train(state, other, val)
                curves[name].append(curve)
                start, end, least = curve[0][1], curve[-1][1], min(score for _, score in curve)
                wrong += end < start if name == "adapt" else end >= start
                cells += [f"{least:.1%}", f"{end:.1%} ({100 * (end - start):+.1f})"]
            print(f"| {seed} | {start:.1%} | {' | '.join(cells)} |", flush=True)
    draw(curves).savefig(arguments.picture, dpi=110)
    print(f"\n{wrong} of {2 * len(arguments.seeds)} runs ended on the other side of their start")
    sys.exit(1 if wrong else 0)


def draw_images(classes: Sequence[str], split: str, per_class: int) -> Images:
    """Return images by name; the class stands before the first dash."""
    return [
        (f"{label}-{split}-{i}", decode(draw_demo_image(label, split, i), max_pixels=10**8))
        for label in classes
        for i in range(per_class)
    ]


def begin(recipe: str, images: Images, steps: int, *, seed: int, weights: str | None = None) -> TrainState:
    """Return a new run of a recipe with `steps` steps; its backbone is that in the file `weights`, if any."""
    epochs = steps * BATCH / len(images)
    overrides = [
        *COMMON,
        f"train.epochs={epochs}",
        f"optim.warmup_epochs={epochs / 10}",
        f"train.seed={seed}",
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
    labels = {"naive": "naive: the settings of a first training", "adapt": "recipe adapt"}
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
