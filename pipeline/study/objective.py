"""The objective of a study: one metric of the trials' evaluations, as a score where larger is better.

The loss is entropy + KL: a sharper teacher lowers it without better features. So the loss cannot compare runs
with different temperatures or prototypes, and a search that minimised it would end in collapse. k-NN accuracy
ranks trials if there are labels. Without labels the rank of the features does, once the health check has
excluded collapse. No Ray here.
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from dinoray.models.errors import ConfigError

METRICS = ("knn", "rankme", "lidar", "loss")
_CHANGE_THE_LOSS = (
    "loss.teacher_temp",
    "loss.warmup_teacher_temp",
    "loss.warmup_teacher_temp_epochs",
    "loss.student_temp",
    "loss.centering",
    "loss.koleo_weight",
    "head.out_dim",
)
_CHANGE_WHAT_RANKME_SEES = ("optim.", "crops.", "teacher.")


class Objective(NamedTuple):
    """Name of a metric in the records of evaluations, and the reason for its choice."""

    metric: str
    reason: str

    def score(self, scores: Mapping[str, float]) -> float | None:
        """Return the score, larger is better; None if the metric is missing or not finite."""
        value = scores.get(self.metric)
        if not isinstance(value, int | float) or not math.isfinite(value):
            return None
        return -value if self.metric == "loss" else float(value)

    def worst(self, out_dim: int) -> float:
        """Return the score of a collapsed run: chance accuracy, one dimension, or a uniform target."""
        if self.metric == "loss":
            return -math.log(out_dim)
        return 0.0 if self.metric.startswith("knn") else 1.0


def choose(asked: str, *, keys: Iterable[str], labelled: bool, k: int) -> Objective:
    """Return the objective of a study over the settings `keys`; `asked` is auto or in METRICS; `k` is k-NN's.

    Raises ConfigError if the objective cannot rank such trials: k-NN without labels, and the loss if a
    searched setting is part of the loss itself.
    """
    varied = list(keys)
    if asked == "knn" and not labelled:
        raise ConfigError(
            "tune.objective=knn needs labels: set eval.val_path, and data.label_column or "
            "data.label_from_parent=true; or set tune.objective=rankme"
        )
    if asked == "loss":
        wrong = [key for key in varied if key in _CHANGE_THE_LOSS]
        if wrong:
            raise ConfigError(
                f"tune.objective=loss cannot rank trials that differ in {', '.join(wrong)}: the loss is entropy + "
                "KL, and these move the entropy whatever is learnt, towards collapse in the end; "
                "set tune.objective=knn with labels, or rankme without"
            )
        return Objective("loss", "asked for; nothing that varies is part of the loss itself")
    if asked in ("rankme", "lidar"):
        return Objective(asked, "asked for")
    if asked == "knn" or labelled:
        return Objective(f"knn_{k}", f"accuracy of {k} nearest neighbours on labelled images")
    moved = [key for key in varied if key.startswith(_CHANGE_WHAT_RANKME_SEES)]
    if moved:
        return Objective(
            "lidar",
            f"no labels, and {', '.join(moved)} varies, by which RankMe is misled: LiDAR looks at augmented views",
        )
    return Objective("rankme", "no labels: the rank of the features, where the run has not collapsed")
