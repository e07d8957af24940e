"""The names of a run's numbers by subject, as TensorBoard, MLflow and W&B show them: `train/loss`, `eval/knn_20`.

Each of these programs makes one section of all names with the same word before a slash; TensorBoard has the pictures
there as well. metrics.jsonl, the report and the gauges for Prometheus keep the plain names. No Ray here.
"""

import re
from collections.abc import Mapping

from pipeline.augment.augmenter import STAGES

GROUPS: dict[str, tuple[str, ...]] = {
    # Names are sorted within a section: the loss comes first.
    "train": ("loss", "teacher_entropy"),
    "schedule": ("epoch", "lr", "weight_decay", "teacher_momentum", "teacher_temp"),
    "health": (
        *("kl", "kl_mean", "entropy_ratio", "mutual_information", "prototypes_used", "commonest_prototype"),
        *("center_norm", "center_drift", "feature_std", "collapsed_dims", "grad_norm"),
        *("skipped_steps", "bad_images", "crops"),
    ),
    "throughput": ("images_per_second", "data_wait", *(f"{stage}_cpu_ms" for stage in STAGES)),
    "eval": (r"knn_\d+", "majority", "rankme", "lidar", "calibration_images", "attention"),
    "cluster": ("nodes_head", "nodes_cpu", "nodes_gpu", "augment_actors", "augment_target", "dollars"),
}
"""Group -> the names in it, as regular expressions."""

_NO_CURVES = frozenset({"time"})
"""When a line was written: each of these programs notes that by itself."""


def group_of(name: str) -> str | None:
    """The group of a number or picture, by its plain name; None for a name that no group has."""
    return next((group for group, names in GROUPS.items() if re.fullmatch("|".join(names), name)), None)


def with_group(name: str) -> str:
    """The name behind its group; behind train/ where no group has it."""
    return f"{group_of(name) or 'train'}/{name}"


def grouped(values: Mapping[str, float]) -> dict[str, float]:
    """Numbers by their names with the group; what is no curve is left out."""
    return {with_group(name): value for name, value in values.items() if name not in _NO_CURVES}
