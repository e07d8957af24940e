"""Group the names of a run's numbers for TensorBoard, MLflow and W&B: `train/loss`, `eval/knn_20`.

Each of these programs shows one section per word before a slash; TensorBoard also puts pictures there.
metrics.jsonl, the report and the gauges for Prometheus keep the plain names. No Ray here.
"""

import re
from collections.abc import Mapping

from dinoray.pipeline.augment.augmenter import STAGES

PUBLISHED = "published_"
"""Before a score of the start: measured with the preprocessing that its weights were published with."""
OF_START = "start_"
"""Before a score: that of the initial weights, the line to beat."""
BAD_IMAGES_OF = "bad_images_"
"""Before a status: how many images with that status were replaced."""

GROUPS: dict[str, tuple[str, ...]] = {
    # The programs sort names within a section: the loss comes first.
    "train": ("loss", "teacher_entropy"),
    "schedule": ("epoch", "lr", "weight_decay", "teacher_momentum", "teacher_temp"),
    "health": (
        *("kl", "kl_mean", "entropy_ratio", "mutual_information", "prototypes_used", "commonest_prototype"),
        *("center_norm", "center_drift", "feature_std", "collapsed_dims", "grad_norm"),
        *(
            "skipped_steps",
            "trained_images",
            "bad_images",
            rf"{BAD_IMAGES_OF}\w+",
            "unchecked_reads",
            "crops",
        ),
    ),
    "throughput": (
        *("images_per_second", "data_wait", "staged_bytes", "tflops", "mfu", "recompiled_graphs"),
        *(f"{stage}_cpu_ms" for stage in STAGES),
    ),
    "eval": (
        r"knn_\d+",
        rf"{OF_START}knn_\d+",
        "majority",
        "above_start",
        "num_val",
        "rankme",
        "lidar",
        "cluster_learnability",
        "intrinsic_dim",
        rf"{PUBLISHED}\w+",
        "calibration_images",
        "evaluations_under_way",
        "attention",
    ),
    "cluster": (
        *("nodes_head", "nodes_cpu", "nodes_gpu", "train_workers", "augment_actors", "augment_target"),
        "dollars",
    ),
}
"""Group -> its names, as regular expressions."""

_NO_CURVES = frozenset({"time"})
"""Values without a curve: the time of a line, which each of these programs records itself."""


def group_of(name: str) -> str | None:
    """Return the group of a number or picture, by its plain name; None if no group contains it."""
    return next((group for group, names in GROUPS.items() if re.fullmatch("|".join(names), name)), None)


def with_group(name: str) -> str:
    """Return the name prefixed with its group, or with train/ if no group contains it."""
    return f"{group_of(name) or 'train'}/{name}"


def grouped(values: Mapping[str, float]) -> dict[str, float]:
    """Return the numbers by their names with the group, without the values in `_NO_CURVES`."""
    return {with_group(name): value for name, value in values.items() if name not in _NO_CURVES}
