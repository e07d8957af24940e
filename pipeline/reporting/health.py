"""The report's section on health: curves, verdicts in words, and what RankMe is worth. No Ray here."""

import math
from collections.abc import Iterator

import numpy as np

from pipeline.reporting.charts import Chart, drawn
from pipeline.reporting.page import Html, explained, section, table
from pipeline.tracking.records import Records
from pipeline.training.verdict import Verdict

_MAX_VERDICTS = 20
_CHARTS = (
    Chart("Mutual information of image and prototype (nats)", {"mutual_information": "mutual information"}),
    Chart(
        "Share of prototypes in use, of the commonest one",
        {"prototypes_used": "prototypes used", "commonest_prototype": "commonest prototype"},
    ),
    Chart("RankMe: effective rank of the features", {"rankme": "RankMe"}),
    Chart("Spread of features", {"feature_std": "feature std"}),
    Chart("Centre: norm and drift", {"center_norm": "center norm", "center_drift": "center drift"}),
    Chart("Norm of the gradients", {"grad_norm": "grad norm"}),
    Chart("Share of feature dimensions that hardly vary", {"collapsed_dims": "collapsed dims"}),
)
_MEANINGS = {
    Verdict.HEALTHY.value: "no sign of collapse: targets depend on the image; k-NN measures how good features are",
    Verdict.UNIFORM.value: "every image gets the same, even targets; nothing is learnt",
    Verdict.SINGLE.value: "every image gets the same prototype; nothing is learnt",
    Verdict.NON_FINITE.value: "loss or gradients were not finite; those steps were skipped",
}


def health(records: Records) -> Html:
    """The section; nothing when none of it was logged."""
    changes = records.verdicts()[-_MAX_VERDICTS:]
    rows = [
        {"from step": step, "verdict": verdict, "meaning": _MEANINGS.get(verdict, "")}
        for step, verdict in changes
    ]
    return section(
        "Health", drawn(_CHARTS, records.series), table(rows), explained(list(_about_rankme(records)))
    )


def _about_rankme(records: Records) -> Iterator[str]:
    """What RankMe says and what it does not, with the run's own numbers."""
    values = records.series("rankme").values
    values = values[np.isfinite(values)]
    if not len(values):
        return
    course = "" if len(values) < 2 else f" It went from {values[0]:.1f} to {values[-1]:.1f} in this run."
    yield (
        "RankMe counts the directions that the features of the evaluated images spread over. It needs no labels."
        f"{course} It often falls while a run learns: the features of an untrained network spread at random, and "
        "training keeps the directions that tell images apart. A lower RankMe is therefore not a worse network."
    )
    if any(not math.isnan(records.series(name).last) for name in records.names(r"knn_\d+")):
        yield "This run has labels: judge it by k-NN. Worry when RankMe nears 1, or when k-NN falls along with it."
    else:
        yield (
            "This run has no labels. Worry when RankMe nears 1: all images then have nearly the same features. "
            "Between runs of the same backbone and data it tells collapse from learning, and little more."
        )
