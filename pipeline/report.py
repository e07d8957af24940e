"""One self-contained HTML page about a run, from what lies in its directory at this moment.

Last in the flow, or any time before: a run without metrics has a page as well. Local or S3; no Ray here.
"""

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from models.settings import ConfigError
from pipeline.health import Verdict
from pipeline.report_feeding import cost_tiles, feeding
from pipeline.report_page import (
    Html,
    charts,
    details,
    escape,
    page,
    picture,
    section,
    table,
    tiles,
    warnings,
)
from pipeline.report_plots import Curve, Level, chart
from pipeline.report_quarantine import bad_images, nearness, share
from pipeline.report_records import Records, attention_figures, flat, read, read_mapping, read_records
from pipeline.report_settings import settings, versions
from pipeline.storage import Directory

NAME = "report.html"
_MAX_VERDICTS = 20
_HEALTH_CHARTS = {
    "Mutual information of image and prototype (nats)": ("mutual_information",),
    "Share of prototypes in use, of the commonest one": ("prototypes_used", "commonest_prototype"),
    "Centre: norm and drift": ("center_norm", "center_drift"),
    "Spread of features": ("feature_std",),
    "Share of feature dimensions that hardly vary": ("collapsed_dims",),
    "RankMe: effective rank of the features": ("rankme",),
}


def write_report(run: Directory) -> str:
    """Write report.html into the run directory and return its address. ConfigError when it is no run's directory."""
    run.write(NAME, build_report(run).encode())
    return run.join(NAME)


def build_report(run: Directory) -> str:
    """The page as text: the same for the same files."""
    config = read_mapping(run, "config.yaml")
    records = read_records(run)
    if not config and not len(records):
        raise ConfigError(f"{run.uri} is no run directory: it has neither config.yaml nor metrics.jsonl")
    values = flat(config)
    name = str(config.get("name") or run.uri.rpartition("/")[2])
    result, bad = read_mapping(run, "result.json"), share(records, values)
    return page(
        name,
        [
            _header(run, name, records, values, finished=bool(result)),
            warnings([*_troubles(records), *filter(None, [nearness(bad)])]),
            tiles([*_tiles(records, values), *cost_tiles(records)]),
            section(
                "Curves",
                charts(_curves(records, values)),
                note="Against steps; bands where points are merged.",
            ),
            section("Health", charts(_health(records)), _verdicts(records)),
            feeding(records),
            _attention(run),
            section(
                "Crops",
                picture(read(run, "crops.png"), "images and what is cut from them"),
                note="What the student and the teacher are fed.",
            ),
            bad_images(run, bad),
            section("Scores", *_scores(run, result)),
            settings(run, values),
            versions(run),
        ],
    )


def _header(run: Directory, name: str, records: Records, values: dict[str, Any], *, finished: bool) -> Html:
    step = records.last_step
    if step is None:
        state = "No metrics yet."
    else:
        state = f"Finished after {_count(step, 'step')}." if finished else f"Not finished: step {step}"
        epoch, epochs = records.series("epoch").last, values.get("train.epochs")
        if not finished:
            total = f" of {epochs:g}" if isinstance(epochs, int | float) else ""
            state += "." if math.isnan(epoch) else f", epoch {epoch:.1f}{total}."
    return Html(
        f'<h1>{escape(name)}</h1>\n<p class="address">{escape(run.uri)}</p>\n<p class="state">{escape(state)}</p>'
    )


def _troubles(records: Records) -> Iterator[str]:
    """One line for each thing that is wrong, worst first."""
    changes = records.verdicts()
    if changes and changes[-1][1] != Verdict.HEALTHY.value:
        step, verdict = changes[-1]
        yield f"{verdict} since step {step}{_remedy(verdict)}"
    elif any(verdict != Verdict.HEALTHY.value for _, verdict in changes):
        yield "The run was in trouble for a while and recovered; see Health."
    skipped = records.series("skipped_steps").last
    if skipped > 0:
        yield f"{_count(skipped, 'step')} skipped: loss or gradients were not finite."
    num_lost = int(np.isnan(records.series("loss").values).sum())
    if num_lost:
        yield f"The loss was not finite at {_count(num_lost, 'logged step')}."
    if records.num_damaged:
        yield f"{_count(records.num_damaged, 'line')} of metrics.jsonl cannot be read and left out here."


def _count(number: float, what: str) -> str:
    return f"{number:.0f} {what}{'' if number == 1 else 's'}"


def _remedy(verdict: str) -> str:
    try:
        return f": {Verdict(verdict).remedy}"
    except ValueError:  # of another version
        return ""


def _tiles(records: Records, values: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The newest of the numbers that matter."""
    loss = records.series("loss")
    if not math.isnan(loss.last):
        yield "loss", f"{loss.last:.3f}", f"{loss.values[np.isfinite(loss.values)][0]:.3f} at first"
    for name in records.names(r"knn_\d+")[-1:]:
        knn, majority = records.series(name), records.series("majority").last
        if not math.isnan(knn.last):
            guess = "" if math.isnan(majority) else f", majority {majority:.1%}"
            first = knn.values[np.isfinite(knn.values)][0]
            new = ", with calibrated batch norm" if records.names("calibration_images") else ""
            yield (
                f"k-NN, k={name.removeprefix('knn_')}",
                f"{knn.last:.1%}",
                f"{first:.1%} at first{new}{guess}",
            )
    ratio = records.series("entropy_ratio").last
    entropy, most = records.series("teacher_entropy").last, _uniform_entropy(records, values)
    if math.isnan(ratio) and most:
        ratio = entropy / most
    if not math.isnan(ratio):
        yield "teacher entropy", f"{ratio:.0%}", "of ln K; 100 % is uniform"
    for name, label, form, remark in (
        ("images_per_second", "images/s", ".0f", "newest reading"),
        ("data_wait", "data wait", ".0%", "of the time"),
        ("bad_images", "bad images", ".0f", "so far"),
    ):
        value = records.series(name).last
        if not math.isnan(value):
            yield label, format(value, form), remark


def _curves(records: Records, values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    most = _uniform_entropy(records, values)
    uniform = [Level(f"ln K = {most:.2f}: uniform", most)] if most else []
    knn = records.names(r"knn_\d+")[:4]
    majority = records.series("majority").last
    guess = [] if math.isnan(majority) else [Level("majority guess", majority)]
    yield from _drawn(records, "Loss and KL to the student (nats)", ("loss", "kl"))
    yield from _drawn(records, "Teacher entropy (nats)", ("teacher_entropy",), levels=uniform)
    yield from _drawn(records, "k-NN accuracy of the teacher", tuple(knn), levels=guess, percent=True)
    yield from _drawn(records, "Norm of the gradients", ("grad_norm",))
    yield from _drawn(records, "Learning rate", ("lr",))
    yield from _drawn(records, "Teacher temperature", ("teacher_temp",))
    yield from _drawn(records, "Teacher momentum", ("teacher_momentum",))


def _health(records: Records) -> Iterator[tuple[str, str]]:
    for title, names in _HEALTH_CHARTS.items():
        yield from _drawn(records, title, names)


def _drawn(
    records: Records,
    title: str,
    names: tuple[str, ...],
    *,
    levels: list[Level] | None = None,
    percent: bool = False,
) -> Iterator[tuple[str, str]]:
    """The chart, if there is anything to draw."""
    found = [(name, records.series(name)) for name in names]
    curves = [Curve(_label(name), s) for name, s in found if not math.isnan(s.last)]
    if curves:
        yield title, chart(curves, levels=levels or [], percent=percent)


def _label(name: str) -> str:
    if name.startswith("knn_"):
        return f"k = {name.removeprefix('knn_')}"
    return "KL" if name == "kl" else name.replace("_", " ")


def _uniform_entropy(records: Records, values: dict[str, Any]) -> float | None:
    """ln K: from the config, or where that says auto, from the metrics."""
    out_dim = values.get("head.out_dim")
    if isinstance(out_dim, int) and out_dim > 1:
        return math.log(out_dim)
    entropy, ratio = records.series("teacher_entropy").last, records.series("entropy_ratio").last
    return entropy / ratio if entropy > 0 and ratio > 0 else None


def _verdicts(records: Records) -> Html:
    changes = records.verdicts()
    return table([{"from step": step, "verdict": verdict} for step, verdict in changes[-_MAX_VERDICTS:]])


def _attention(run: Directory) -> Html:
    figures = (
        picture(read(run, name), f"after {_count(step, 'step')}") for step, name in attention_figures(run)
    )
    return section(
        "Where the teacher looks",
        *figures,
        note="Self-attention of the class token in the last block, on the same images each time.",
    )


def _scores(run: Directory, result: dict[str, Any]) -> Iterator[Html]:
    if result:
        yield table(
            [{"file": "result.json", **{k: v for k, v in flat(result).items() if "knn" in k or k == "steps"}}]
        )
    evaluations = [name for name in run.list() if name.startswith("evaluation_") and name.endswith(".json")]
    yield table([{"file": name, **read_mapping(run, name)} for name in evaluations])
    if result:
        yield details("result.json", json.dumps(result, indent=1, ensure_ascii=False))
