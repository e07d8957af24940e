"""By what the trials of a study are ranked: one metric of their evaluations, as a score of which more is better.

The loss is entropy + KL: a sharper teacher lowers it for nothing, so runs whose temperatures or prototypes differ
cannot be compared by it, and a search that minimised it would walk into collapse. k-NN accuracy ranks wherever
there are labels; without any, the rank of the features does, once collapse is ruled out by the health of the run.
No Ray here.
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from models.errors import ConfigError

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
    """A metric's name in the records of evaluations, and why it was chosen."""

    metric: str
    reason: str

    def score(self, scores: Mapping[str, float]) -> float | None:
        """More is better; None when the metric is missing or not finite."""
        value = scores.get(self.metric)
        if not isinstance(value, int | float) or not math.isfinite(value):
            return None
        return -value if self.metric == "loss" else float(value)

    def worst(self, out_dim: int) -> float:
        """The score of a run that has collapsed: no better than guessing, one dimension, or a uniform target."""
        if self.metric == "loss":
            return -math.log(out_dim)
        return 0.0 if self.metric.startswith("knn") else 1.0


def choose(asked: str, *, keys: Iterable[str], labelled: bool, k: int) -> Objective:
    """The objective for a study over the settings `keys`; `asked` is auto or one of METRICS, `k` that of k-NN.

    ConfigError where it cannot rank such trials: k-NN without labels, and the loss where what varies is part of
    the loss itself.
    """
    varied = list(keys)
    if asked == "knn" and not labelled:
        raise ConfigError(
            "tune.objective=knn needs labels: set eval.val_path, and data.label_column or "
            "data.label_from_parent=true; or take tune.objective=rankme"
        )
    if asked == "loss":
        wrong = [key for key in varied if key in _CHANGE_THE_LOSS]
        if wrong:
            raise ConfigError(
                f"tune.objective=loss cannot rank trials that differ in {', '.join(wrong)}: the loss is entropy + "
                "KL, and these move the entropy whatever is learnt, towards collapse in the end; "
                "take tune.objective=knn with labels, or rankme without"
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
