"""The report's section on health: curves, verdicts in words, and what RankMe is worth. No Ray here."""

import math
from collections.abc import Iterator

import numpy as np

from dinoray.pipeline.reporting.charts import Chart, drawn, with_start
from dinoray.pipeline.reporting.page import Html, explained, section, table
from dinoray.pipeline.tracking.rankings import CLID, clid, kendall
from dinoray.pipeline.tracking.records import Records
from dinoray.pipeline.tracking.scores import scores_of
from dinoray.pipeline.tracking.start import LABEL_FREE_NAMES, start_of
from dinoray.pipeline.training.verdict import Verdict

_MAX_VERDICTS = 20
_LEAST_EVALUATIONS = 4
"""For Kendall's tau of two metrics."""
_CHARTS = (
    Chart("Mutual information of image and prototype (nats)", {"mutual_information": "mutual information"}),
    Chart(
        "Share of prototypes used, and share of the commonest prototype",
        {"prototypes_used": "prototypes used", "commonest_prototype": "commonest prototype"},
    ),
    Chart("RankMe: effective rank of the features", {"rankme": "RankMe"}),
    Chart("LiDAR: effective rank between images", {"lidar": "LiDAR"}),
    Chart(
        "Cluster learnability, half of CLID", {"cluster_learnability": "cluster learnability"}, percent=True
    ),
    Chart("Intrinsic dimension, half of CLID", {"intrinsic_dim": "intrinsic dimension"}),
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
    Verdict.WORSE.value: "evaluations were worse than that of the initial weights, by more than noise",
}


def health(records: Records) -> Html:
    """The section; nothing when none of it was logged."""
    changes = records.verdicts()[-_MAX_VERDICTS:]
    rows = [
        {"from step": step, "verdict": verdict, "meaning": _MEANINGS.get(verdict, "")}
        for step, verdict in changes
    ]
    return section(
        "Health",
        drawn([with_start(chart, start_of(records.lines)) for chart in _CHARTS], records.series),
        table(rows),
        explained([*_about_rankme(records), *_about_clid(records)]),
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
            "The evaluation images have labels: judge this run by k-NN accuracy. RankMe need not follow it: it may "
            "fall while k-NN rises. A RankMe near 1, or a k-NN accuracy that falls together with RankMe, is a warning "
            "sign."
        )
    else:
        yield (
            "The evaluation images have no labels. A RankMe near 1 is a warning sign: all images then have nearly the "
            "same features. RankMe is comparable between runs with the same backbone and data. It separates collapse "
            "from learning, and shows little else."
        )


def _about_clid(records: Records) -> Iterator[str]:
    """What CLID is, and how the metrics without labels agreed with k-NN in this run."""
    if not all(records.names(name) for name in CLID):
        return
    yield (
        "CLID needs no labels either. It is the sum of two parts, each scaled over the networks that are compared: "
        "cluster learnability (how often the nearest neighbour of an image is in its cluster) and intrinsic dimension "
        "(in how many directions neighbours differ). Equal features are learnable but have no dimension; noise has a "
        "high dimension and little to learn. Better features raise one without lowering the other."
    )
    knn = scores_of(records.lines)
    taus = [
        f"{name} {tau:+.2f}"
        for name, values in _by_step(records).items()
        if len(both := [step for step in values if step in knn.by_step]) >= _LEAST_EVALUATIONS
        and (tau := kendall([knn.by_step[s] for s in both], [values[s] for s in both])) is not None
    ]
    if knn.metric.startswith("knn_") and taus:
        yield (
            f"Agreement with k-NN over the evaluations of this run (Kendall's tau): {', '.join(taus)}. 1 means that "
            "the metric ranks them as k-NN does, -1 the opposite order."
        )


def _by_step(records: Records) -> dict[str, dict[int, float]]:
    """Name -> step -> value, of the metrics without labels; CLID compares the evaluations with one another."""
    found = {name: _finite(records, name) for name in LABEL_FREE_NAMES if name not in CLID}
    learnability, dimension = (_finite(records, name) for name in CLID)
    steps = [step for step in learnability if step in dimension]
    sums = clid([learnability[step] for step in steps], [dimension[step] for step in steps])
    named = {LABEL_FREE_NAMES[name]: values for name, values in found.items()}
    return {**named, "CLID": dict(zip(steps, sums, strict=True))}


def _finite(records: Records, name: str) -> dict[int, float]:
    steps, values = records.series(name)
    return {int(s): v for s, v in zip(steps.tolist(), values.tolist(), strict=True) if math.isfinite(v)}
