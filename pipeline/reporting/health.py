"""The report's section on health: curves, verdicts in words, and what RankMe is worth. No Ray here."""

import math
from collections.abc import Iterator

import numpy as np

from dinoray.pipeline.reporting.charts import Chart, drawn
from dinoray.pipeline.reporting.page import Html, explained, section, table
from dinoray.pipeline.tracking.records import Records
from dinoray.pipeline.training.verdict import Verdict

_MAX_VERDICTS = 20
_CHARTS = (
    Chart("Mutual information of image and prototype (nats)", {"mutual_information": "mutual information"}),
    Chart(
        "Share of prototypes used, and share of the commonest prototype",
        {"prototypes_used": "prototypes used", "commonest_prototype": "commonest prototype"},
    ),
    Chart("RankMe: effective rank of the features", {"rankme": "RankMe"}),
    Chart("Standard deviation of the features", {"feature_std": "feature std"}),
    Chart(
        "Centre (running mean of the teacher's logits): norm and drift",
        {"center_norm": "center norm", "center_drift": "center drift"},
    ),
    Chart("Gradient norm", {"grad_norm": "grad norm"}),
    Chart("Share of nearly constant feature dimensions", {"collapsed_dims": "collapsed dims"}),
)
_MEANINGS = {
    Verdict.HEALTHY.value: (
        "no sign of collapse: the teacher's targets depend on the image; k-NN accuracy measures feature quality"
    ),
    Verdict.UNIFORM.value: "the teacher's targets are uniform for every image; the student learns nothing",
    Verdict.SINGLE.value: "the teacher gives every image the same prototype; the student learns nothing",
    Verdict.NON_FINITE.value: "loss or gradients were not finite; the affected steps were skipped",
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
    course = (
        "" if len(values) < 2 else f" RankMe in this run: first {values[0]:.1f}, latest {values[-1]:.1f}."
    )
    yield (
        "RankMe is the effective rank of the features: the number of dimensions that the evaluated images use. It "
        f"needs no labels.{course} RankMe often falls during successful training. An untrained network spreads its "
        "features at random; training keeps the dimensions that distinguish images. A lower RankMe therefore does "
        "not mean a worse network."
    )
    if any(not math.isnan(records.series(name).last) for name in records.names(r"knn_\d+")):
        yield (
            "The evaluation images have labels: judge this run by k-NN accuracy. A RankMe near 1, or a k-NN "
            "accuracy that falls together with RankMe, is a warning sign."
        )
    else:
        yield (
            "The evaluation images have no labels. A RankMe near 1 is a warning sign: all images then have nearly the "
            "same features. RankMe is comparable between runs with the same backbone and data. It separates collapse "
            "from learning, and shows little else."
        )
