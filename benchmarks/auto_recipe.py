"""The recipe auto against the best of a small study at equal budget: is it within the noise of seeds?

    python benchmarks/auto_recipe.py [--photos FOLDER] [--no-digits] [--trials 12] [--images 12000] [--seeds 0 1 2 3 4]
                                     [--threads 2]

Two sets of real images: photos, FOLDER/train and FOLDER/val with labels, and the 1,797 handwritten digits of
scikit-learn (`pip install 'dinoray[pb2]'`), enlarged four times, each fifth for validation. For each set auto chooses,
without a GPU, for a run of `--images` images. Trials are seeded random draws of learning rate, teacher temperature and
centre momentum around the other choices, each with the same budget. Auto and the best trial are then compared on
other seeds: a best of many is lucky, so the seed that chose it does not count. Training is here, without Ray.

Prints a table for RESULTS.md: k-NN (k=10) beside the untrained network, a colour histogram and small pixels. With the
defaults that is 42 runs, about 25 minutes on two cores.
"""

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from collapse import batches
from numpy.typing import NDArray
from PIL import Image

from dinoray.jobs.cli.auto_facts import Facts, choice_lines
from dinoray.jobs.cli.auto_recipe import as_tree, choose
from dinoray.jobs.cli.main import run_main
from dinoray.models.errors import ConfigError
from dinoray.pipeline.augment.multicrop import limit_threads
from dinoray.pipeline.data.config import DataConfig
from dinoray.pipeline.data.decoding.decode import decode, eval_crop
from dinoray.pipeline.data.manifests.manifest import build_manifest
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.evaluation.config import EvalConfig
from dinoray.pipeline.evaluation.features import Features, embed
from dinoray.pipeline.evaluation.knn import knn_accuracy
from dinoray.pipeline.training.config import DINOConfig
from dinoray.pipeline.training.state import TrainState, build_state
from dinoray.pipeline.training.step import train_step

Pixels = NDArray[np.uint8]
KNN = EvalConfig(k=(10,))
_LIMITS = {"optim.base_lr": (5e-4, 1.6e-2), "loss.teacher_temp": (0.02, 0.06), "center": (0.005, 0.2)}
"""Of what a trial draws: the rate and 1 - centre momentum in the logarithm, the temperature evenly."""
_HISTOGRAM_BINS, _PIXELS_SIDE, _BATCH = 4, 16, 256
_COLUMNS = "| {} | {} | {} | {} | {} | {} | {} |"


class ImageSet(NamedTuple):
    """Decoded images with keys, and their labels."""

    name: str
    train: list[tuple[str, Pixels]]
    train_labels: list[str]
    val: list[tuple[str, Pixels]]
    val_labels: list[str]

    def facts(self) -> Facts:
        """What the recipe is told: these images, and no GPU."""
        height, width = np.median([image.shape[:2] for _, image in self.train], axis=0).astype(int)
        gray = all((image == image[..., :1]).all() for _, image in self.train[:64])
        classes = len(set(self.train_labels))
        return Facts(len(self.train), int(width), int(height), 1 if gray else 3, classes, cpus=2)


class Ran(NamedTuple):
    """One training: k-NN accuracies in [0, 1], the teacher's entropy as a share of ln K, seconds."""

    before: float
    after: float
    entropy_ratio: float
    seconds: float


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, help="folder with labelled images in train and val")
    parser.add_argument("--no-digits", action="store_true")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--images", type=int, default=12_000, help="images that each training takes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--threads", type=int, default=2, help="threads of PyTorch, on an otherwise idle machine"
    )
    arguments = parser.parse_args(argv)
    limit_threads()
    torch.set_num_threads(arguments.threads)
    sets = [read_photos(arguments.photos)] if arguments.photos else []
    sets += [] if arguments.no_digits else [read_digits()]
    if not sets:
        raise ConfigError("--no-digits without --photos leaves no images; leave out one, or give the other")
    for images in sets:
        compare(images, arguments)


def compare(images: ImageSet, arguments: argparse.Namespace) -> None:
    """Print a table: auto, the trials, the repeats of the best of them, and whether auto is within the noise."""
    facts = images.facts()
    budget = {"train": {"epochs": arguments.images / facts.num_images}}
    choices = choose(facts, budget)
    print(f"## {images.name}: {facts.line}\n", "\n".join(choice_lines(choices)), "", sep="\n")
    for name, score in baselines(images).items():
        print(f"{name}: {score:.1%}")
    print()
    print(
        _COLUMNS.format("run", "base_lr", "teacher_temp", "center", "before", "k-NN 10", "entropy / ln K, s")
    )
    print("|---|---|---|---|---|---|---|")
    first, *others = arguments.seeds
    drawn = [draw(np.random.default_rng([7, trial])) for trial in range(arguments.trials)]
    tree = as_tree(choices)
    auto = [run_printed("auto", images, tree, {}, budget, seed=seed) for seed in arguments.seeds]
    tried = [
        run_printed(f"trial {i + 1}", images, tree, change, budget, seed=first)
        for i, change in enumerate(drawn)
    ]
    best = max(range(len(tried)), key=lambda i: tried[i].after)
    again = [run_printed("best trial", images, tree, drawn[best], budget, seed=seed) for seed in others]
    # On the same seeds, of which none has chosen the best trial.
    autos = [ran.after for ran in auto[1:] or auto]
    print(f"\n{verdict(autos, [ran.after for ran in again or [tried[best]]], tried[best].after)}")


def verdict(auto: list[float], again: list[float], luckiest: float) -> str:
    """Return whether the mean of auto is within two standard errors of that of the best trial's repeats."""
    spread = [statistics.stdev(scores) for scores in (auto, again) if len(scores) > 1]
    error = (sum(one**2 for one in spread) / max(1, len(spread))) ** 0.5
    error *= (1 / len(auto) + 1 / len(again)) ** 0.5
    difference = statistics.mean(auto) - statistics.mean(again)
    within = "within" if difference >= -2 * error else "below"
    return (
        f"auto {statistics.mean(auto):.1%}, best trial repeated {statistics.mean(again):.1%} (first {luckiest:.1%}): "
        f"{100 * difference:+.1f} points, two standard errors are {200 * error:.1f}: {within} the noise"
    )


def run_printed(
    name: str,
    images: ImageSet,
    chosen: Mapping[str, Any],
    change: Mapping[str, Any],
    budget: Mapping[str, Any],
    *,
    seed: int,
) -> Ran:
    """Train, print a row, and return the scores."""
    config = configure(chosen, budget, change, seed=seed)
    ran = train(images, config)
    print(
        _COLUMNS.format(
            f"{name}, seed {seed}",
            f"{config.optim.base_lr:.2g}",
            f"{config.loss.teacher_temp:.2g}",
            f"{config.loss.center_momentum:.3g}",
            f"{ran.before:.1%}",
            f"{ran.after:.1%}",
            f"{ran.entropy_ratio:.2f}, {ran.seconds:.0f}",
        ),
        flush=True,
    )
    return ran


def draw(rng: np.random.Generator) -> dict[str, Any]:
    """Return one point of the study."""

    def log(low: float, high: float) -> float:
        return float(np.exp(rng.uniform(np.log(low), np.log(high))))

    return {
        "optim": {"base_lr": log(*_LIMITS["optim.base_lr"])},
        "loss": {
            "teacher_temp": float(rng.uniform(*_LIMITS["loss.teacher_temp"])),
            "center_momentum": 1 - log(*_LIMITS["center"]),
        },
    }


def configure(*trees: Mapping[str, Any], seed: int) -> DINOConfig:
    """Return the algorithm's config of trees of settings, later ones first."""
    merged: dict[str, dict[str, Any]] = {name: {} for name in DINOConfig.model_fields if name != "data"}
    for tree in trees:
        for section, values in tree.items():
            if section in merged:
                merged[section] |= values
    merged["train"]["seed"] = seed
    return DINOConfig.model_validate(merged)


def train(images: ImageSet, config: DINOConfig) -> Ran:
    """Train to the end of the schedules, and score before and after."""
    state = build_state(config, num_images=len(images.train))
    before, begin = score(images, state), time.perf_counter()
    for batch in batches(images.train, config):
        train_step(state, batch)
        if state.step == state.schedule.total_steps:
            break
    seconds = time.perf_counter() - begin
    ratio = state.health.read(state.step, state.dino.center)["entropy_ratio"]
    return Ran(before, score(images, state), float(ratio), seconds)


def score(images: ImageSet, state: TrainState) -> float:
    """Return the teacher's k-NN accuracy."""
    backbone, crops = state.dino.teacher.backbone, state.config.crops
    was_training = backbone.training
    backbone.eval()

    def features(rows: list[tuple[str, Pixels]]) -> NDArray[np.float32]:
        cut = [eval_crop(image, size=crops.global_crop_size) for _, image in rows]
        parts = [np.stack(cut[i : i + _BATCH]) for i in range(0, len(cut), _BATCH)]
        return np.concatenate([embed(backbone, part, crops, precision="fp32") for part in parts])

    found = classify(images, features(images.train), features(images.val))
    backbone.train(was_training)
    return found


def classify(images: ImageSet, train: NDArray[np.float32], val: NDArray[np.float32]) -> float:
    """Return the accuracy of k-NN, by cosine, of features float32 [n, D]."""
    voters, queries = Features(train, images.train_labels, 0), Features(val, images.val_labels, 0)
    return knn_accuracy(voters, queries, KNN)["knn_10"]


def baselines(images: ImageSet) -> dict[str, float]:
    """Return the accuracies of what needs no training: a colour histogram, and small pixels."""

    def histogram(image: Pixels) -> NDArray[np.float32]:
        cells = (image.reshape(-1, 3) // (256 // _HISTOGRAM_BINS)).astype(int)
        index = (cells * [_HISTOGRAM_BINS**2, _HISTOGRAM_BINS, 1]).sum(axis=1)
        return np.sqrt(np.bincount(index, minlength=_HISTOGRAM_BINS**3) / len(index)).astype(np.float32)

    def pixels(image: Pixels) -> NDArray[np.float32]:
        small = Image.fromarray(eval_crop(image, size=min(image.shape[:2]))).resize((_PIXELS_SIDE,) * 2)
        values = np.asarray(small, np.float32).ravel()
        return values - values.mean()

    found = {}
    for name, of in (("colour histogram", histogram), ("pixels", pixels)):
        train, val = (np.stack([of(image) for _, image in rows]) for rows in (images.train, images.val))
        found[name] = classify(images, train, val)
    return found


def read_photos(folder: Path) -> ImageSet:
    """Read all labelled images of FOLDER/train and FOLDER/val, in any form that a run reads."""
    parts: list[Any] = []
    for part in ("train", "val"):
        config = DataConfig(path=str(folder / part))
        source = Source(config, build_manifest(config))
        fetched = [one for one in source.fetch(range(source.num_images)) if one.data is not None]
        parts.append([(one.key, decode(one.data or b"", max_pixels=config.max_pixels)) for one in fetched])
        parts.append([one.label or "" for one in fetched])
    return ImageSet(folder.name, *parts)


def read_digits() -> ImageSet:
    """Return scikit-learn's digits, gray images of 8 px, at 32 px."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError(
            "the digits are scikit-learn's: pip install 'dinoray[pb2]', or --no-digits"
        ) from error
    digits = load_digits()
    rows, labels = [], [str(label) for label in digits.target]
    for i, image in enumerate(digits.images):
        gray = Image.fromarray((image * (255 / 16)).astype(np.uint8)).resize(
            (32, 32), Image.Resampling.BICUBIC
        )
        rows.append((str(i), np.asarray(gray.convert("RGB"))))
    chosen = [i for i in range(len(rows)) if i % 5]
    held_out = range(0, len(rows), 5)
    return ImageSet(
        "digits of scikit-learn",
        *([rows[i] for i in chosen], [labels[i] for i in chosen]),
        *([rows[i] for i in held_out], [labels[i] for i in held_out]),
    )


if __name__ == "__main__":
    run_main(main)
