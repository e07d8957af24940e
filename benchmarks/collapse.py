"""Why DINO needs centring and sharpening, and whether the verdicts on a run's health tell its two collapses apart.

    python benchmarks/collapse.py [--seeds 0 1 2 3 4] [--steps 300] [--picture benchmarks/collapse.png]

The paper's experiment (arXiv 2104.14294, section 5.3) at toy scale, on the demo's images and without Ray: centring
alone, sharpening alone, both; every other setting is the same. Prints a table for RESULTS.md and draws the course
of teacher entropy and KL. Exits with 1 when a verdict is wrong: both collapses must be called by their names in
every seed, and the healthy run must never be called anything else.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dinoray.jobs.cli.recipes import demo
from dinoray.models.errors import ConfigError
from dinoray.pipeline.augment.multicrop import crop_rng, limit_threads, multi_crop
from dinoray.pipeline.data.decoding.decode import decode
from dinoray.pipeline.data.demo_images import write_demo_images
from dinoray.pipeline.training.config import DINOConfig
from dinoray.pipeline.training.state import build_state
from dinoray.pipeline.training.step import train_step
from dinoray.pipeline.training.verdict import Verdict

EXPERIMENTS: dict[str, tuple[dict[str, Any], Verdict]] = {
    "centring alone": ({"centering": "center", "teacher_temp": 0.1}, Verdict.UNIFORM),
    "sharpening alone": ({"centering": "none", "teacher_temp": 0.03}, Verdict.SINGLE),
    "both": ({"centering": "center", "teacher_temp": 0.03}, Verdict.HEALTHY),
}
"""Loss settings by name (student_temp is 0.1: equal to it, nothing is sharpened), and the true verdict."""

LOG_EVERY = 5
Reading = dict[str, Any]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--picture", type=Path, default=Path(__file__).parent / "collapse.png")
    arguments = parser.parse_args(argv)
    limit_threads()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "images")
        write_demo_images(folder)
        paths = sorted(path for path in (folder / "train").rglob("*") if path.is_file())
        images = [(path.name, decode(path.read_bytes(), max_pixels=10**8)) for path in paths]
    print("| | seed | entropy / ln K at the end | KL | prototypes used | verdict | first at step |")
    print("|---|---|---|---|---|---|---|")
    courses: dict[str, list[list[Reading]]] = {}
    wrong = 0
    for name, (loss, truth) in EXPERIMENTS.items():
        for seed in arguments.seeds:
            course = run(images, loss, seed=seed, steps=arguments.steps)
            courses.setdefault(name, []).append(course)
            found = [r for r in course if r["verdict"] != Verdict.HEALTHY.value]
            verdicts = {r["verdict"] for r in found} or {Verdict.HEALTHY.value}
            wrong += verdicts != {truth.value}
            last = course[-1]
            print(
                f"| {name} | {seed} | {last['entropy_ratio']:.3f} | {last['kl_mean']:.3f} "
                f"| {last['prototypes_used']:.1%} | {', '.join(sorted(verdicts))} "
                f"| {found[0]['step'] if found else '-'} |",
                flush=True,
            )
    draw(courses).savefig(arguments.picture, dpi=110)
    print(f"\n{wrong} of {len(EXPERIMENTS) * len(arguments.seeds)} runs got a wrong verdict")
    sys.exit(1 if wrong else 0)


def config(loss: dict[str, Any], *, seed: int, steps: int, num_images: int) -> DINOConfig:
    """Return the config of a network of 4 small blocks on 32 px crops, 32 images per step."""
    batch = 32
    return DINOConfig.model_validate(
        {
            "crops": demo()["crops"]
            | {"global_crop_size": 32, "local_crop_size": 16, "num_local_crops": 2, "blur_sigma": [0.1, 0.4]},
            "backbone": {
                "name": "vit_tiny_patch16_224",
                "drop_path_rate": 0.0,
                "kwargs": {"patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2},
            },
            "head": {"out_dim": 256, "hidden_dim": 128, "bottleneck_dim": 32, "use_bn": True},
            "loss": loss,
            "teacher": {"teacher_momentum": 0.96, "final_teacher_momentum": 0.99},
            "optim": {
                "base_lr": 2e-3,
                "warmup_epochs": 20 * batch / num_images,
                "final_weight_decay": 0.04,
                "freeze_last_layer_epochs": 0,
            },
            "train": {"epochs": steps * batch / num_images, "global_batch_size": batch, "seed": seed},
        }
    )


def run(
    images: list[tuple[str, NDArray[np.uint8]]], loss: dict[str, Any], *, seed: int, steps: int
) -> list[Reading]:
    """Return readings of a run's health, every `LOG_EVERY` steps."""
    settings = config(loss, seed=seed, steps=steps, num_images=len(images))
    state = build_state(settings, num_images=len(images))
    course = []
    for batch in batches(images, settings):
        train_step(state, batch)
        if state.step % LOG_EVERY == 0:
            course.append({"step": state.step, **state.health.read(state.step, state.dino.center)})
        if state.step == state.schedule.total_steps:
            return course
    raise ConfigError(f"--steps={steps}: the stream of batches ended first")


def batches(
    images: list[tuple[str, NDArray[np.uint8]]], settings: DINOConfig
) -> Iterator[dict[str, NDArray[np.uint8]]]:
    """Yield endless batches of crops, made on two threads."""
    seed, size = settings.train.seed, settings.train.global_batch_size
    order = np.random.default_rng(seed)
    with ThreadPoolExecutor(2) as pool:
        for epoch in range(10**6):
            shuffled = order.permutation(len(images))
            for start in range(0, len(images) - size + 1, size):
                rows = [images[i] for i in shuffled[start : start + size]]
                crops = list(
                    pool.map(
                        lambda row, epoch=epoch: multi_crop(
                            row[1], crop_rng(seed, epoch, row[0]), settings.crops
                        ),
                        rows,
                    )
                )
                yield {
                    "global_crops": np.stack([c.global_crops for c in crops]),
                    "local_crops": np.stack([c.local_crops for c in crops]),
                }


def draw(courses: dict[str, list[list[Reading]]]) -> Figure:
    """Plot entropy and KL over steps, one line per run."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots(1, 2)
    for color, (name, runs) in zip(("tab:orange", "tab:red", "tab:blue"), courses.items(), strict=True):
        for i, course in enumerate(runs):
            steps = [r["step"] for r in course]
            label = name if i == 0 else None
            axes[0].plot(steps, [r["entropy_ratio"] for r in course], color=color, alpha=0.7, label=label)
            axes[1].plot(steps, [r["kl_mean"] for r in course], color=color, alpha=0.7, label=label)
            called = next((r for r in course if r["verdict"] != Verdict.HEALTHY.value), None)
            if called:
                axes[0].plot(called["step"], called["entropy_ratio"], "x", color="black", zorder=5)
    axes[0].plot([], [], "x", color="black", label="verdict: collapse")
    axes[0].set(xlabel="step", ylabel="teacher entropy / ln K", ylim=(-0.03, 1.03))
    axes[1].set(xlabel="step", ylabel="KL(teacher || student), nats", ylim=(0, None))
    figure.legend(frameon=False, loc="outside upper center", ncols=4)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    main(sys.argv[1:])
