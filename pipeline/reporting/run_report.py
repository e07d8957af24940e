"""One self-contained HTML page about a run, from what lies in its directory at this moment.

Last in the flow, or any time before: a run without metrics has a page as well. Local or S3; no Ray here.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dinoray.models.counts import count
from dinoray.models.errors import ConfigError
from dinoray.models.settings import flatten
from dinoray.pipeline.reporting.bad_images import bad_images, near_limit_warning, share
from dinoray.pipeline.reporting.charts import Chart, drawn, with_start
from dinoray.pipeline.reporting.health import health
from dinoray.pipeline.reporting.page import (
    Html,
    contents,
    details,
    page,
    picture,
    section,
    table,
    tiles,
    warnings,
)
from dinoray.pipeline.reporting.plots import Level
from dinoray.pipeline.reporting.settings import settings, versions
from dinoray.pipeline.reporting.summary import course, header, next_commands
from dinoray.pipeline.reporting.throughput import cost_tiles, throughput_section
from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.tracking.records import (
    Records,
    attention_figures,
    read,
    read_mapping,
    read_records,
)
from dinoray.pipeline.tracking.start import start_of
from dinoray.pipeline.training.verdict import Verdict

_MAX_FIGURES = 6


def write_report(run: Directory, *, ending: str = "") -> str:
    """Write report.html into the run directory and return its address; see `build_report`."""
    run.write(run_dir.REPORT, build_report(run, ending=ending).encode())
    return run.join(run_dir.REPORT)


class LiveReport:
    """A page that is written again while its run goes on, in at most a twentieth of the time."""

    def __init__(self, run: Directory, clock: Callable[[], float] = time.monotonic) -> None:
        self._run, self._clock = run, clock
        self._next = -math.inf

    def update(self) -> None:
        """Write it, unless it was written a short time ago."""
        began = self._clock()
        if began < self._next:
            return
        write_report(self._run)
        ended = self._clock()
        self._next = ended + 19 * (ended - began)


def build_report(run: Directory, *, ending: str = "") -> str:
    """The page as text: the same for the same files. `ending`: the error that has ended the run, if one has.

    ConfigError when it is no run's directory.
    """
    config = read_mapping(run, run_dir.CONFIG)
    records = read_records(run)
    if not config and not len(records):
        raise ConfigError(
            f"{run.uri} is not a run directory: it has neither config.yaml nor metrics.jsonl; give the directory that "
            "the run printed"
        )
    values = dict(flatten(config))
    name = str(config.get("name") or run.uri.rpartition("/")[2])
    result, bad = read_mapping(run, run_dir.RESULT), share(records, values)
    found = course(run, records, values, ending=ending)
    sections = [
        section(
            "Curves",
            _curves(records, values),
            note="The x-axis shows steps. Bands show the minimum and maximum of merged points.",
        ),
        health(records),
        next_commands(run, found, records, values),
        throughput_section(records),
        _attention(run),
        section(
            "Crops",
            picture(read(run, run_dir.CROPS), "images and their crops"),
            note="Crops that the student and the teacher receive as input.",
        ),
        bad_images(run, bad),
        section("Scores", *_scores(run, result)),
        settings(run, values),
        versions(run),
    ]
    return page(
        name,
        [
            header(name, run, found, records),
            warnings([*_troubles(records), *filter(None, [near_limit_warning(bad)])]),
            contents(sections),
            tiles([*_tiles(records, values), *cost_tiles(records)]),
            *sections,
        ],
    )


def _troubles(records: Records) -> Iterator[str]:
    """One line for each thing that is wrong, worst first."""
    changes = records.verdicts()
    if changes and changes[-1][1] != Verdict.HEALTHY.value:
        step, verdict = changes[-1]
        yield f"{verdict} since step {step}{_remedy(verdict)}"
    elif any(verdict != Verdict.HEALTHY.value for _, verdict in changes):
        yield "The run had an unhealthy verdict and recovered; see Health."
    skipped = records.series("skipped_steps").last
    if skipped > 0:
        yield f"{count(skipped, 'step')} skipped: loss or gradients were not finite."
    num_lost = int(np.isnan(records.series("loss").values).sum())
    if num_lost:
        yield f"The loss was not finite at {count(num_lost, 'logged step')}."
    if records.num_damaged:
        yield f"Unreadable lines in metrics.jsonl: {records.num_damaged}; this page omits them."


def _remedy(verdict: str) -> str:
    try:
        return f": {Verdict(verdict).remedy}"
    except ValueError:  # of another version
        return ""


def _tiles(records: Records, values: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The newest of the numbers that matter."""
    loss = records.series("loss")
    if not math.isnan(loss.last):
        yield "loss", f"{loss.last:.3f}", f"initially {loss.values[np.isfinite(loss.values)][0]:.3f}"
    for name in records.names(r"knn_\d+")[-1:]:
        knn, majority = records.series(name), records.series("majority").last
        if not math.isnan(knn.last):
            guess = "" if math.isnan(majority) else f", majority guess {majority:.1%}"
            first = knn.values[np.isfinite(knn.values)][0]
            new = ", with calibrated batch norm" if records.names("calibration_images") else ""
            yield (
                f"k-NN, k={name.removeprefix('knn_')}",
                f"{knn.last:.1%}",
                f"initially {first:.1%}{new}{guess}",
            )
    ratio = records.series("entropy_ratio").last
    entropy, most = records.series("teacher_entropy").last, _uniform_entropy(records, values)
    if math.isnan(ratio) and most:
        ratio = entropy / most
    if not math.isnan(ratio):
        yield "teacher entropy", f"{ratio:.0%}", "of ln K; 100 % means uniform targets"
    for name, label, form, remark in (
        ("images_per_second", "images/s", ".0f", _free_data(records)),
        ("data_wait", "data wait", ".0%", "of elapsed time"),
        ("bad_images", "bad images", ".0f", "so far"),
    ):
        value = records.series(name).last
        if not math.isnan(value):
            yield label, format(value, form), remark


def _free_data(records: Records) -> str:
    """What the images/s would be if training did not wait; that share of the time is the stream's."""
    rate, wait = (records.series(name).last for name in ("images_per_second", "data_wait"))
    if not 0 <= wait < 1:
        return "latest value"
    return f"latest value; with free data it would be {rate / (1 - wait):.0f}"


def _curves(records: Records, values: dict[str, Any]) -> Html:
    most = _uniform_entropy(records, values)
    uniform = (Level(f"uniform: ln K = {most:.2f}", most),) if most else ()
    knn = records.names(r"knn_\d+")[:4]
    majority = records.series("majority").last
    guess = () if math.isnan(majority) else (Level("majority guess", majority),)
    wanted = [
        Chart(
            "Loss, and KL divergence of teacher and student (nats)", {"loss": "loss", "kl": "KL"}, always=True
        ),
        Chart(
            "k-NN accuracy of the teacher",
            {name: f"k = {name.removeprefix('knn_')}" for name in knn},
            percent=True,
            levels=guess,
            always=True,
        ),
        Chart("Teacher entropy (nats)", {"teacher_entropy": "teacher entropy"}, levels=uniform, always=True),
        Chart("Learning rate", {"lr": "lr"}),
        Chart("Teacher momentum", {"teacher_momentum": "teacher momentum"}),
        Chart("Teacher temperature", {"teacher_temp": "teacher temp"}),
    ]
    start = start_of(records.lines)
    return drawn([with_start(one, start) for one in wanted], records.series)


def _uniform_entropy(records: Records, values: dict[str, Any]) -> float | None:
    """ln K: from the config, or where that says auto, from the metrics."""
    out_dim = values.get("head.out_dim")
    if isinstance(out_dim, int) and out_dim > 1:
        return math.log(out_dim)
    entropy, ratio = records.series("teacher_entropy").last, records.series("entropy_ratio").last
    return entropy / ratio if entropy > 0 and ratio > 0 else None


def _attention(run: Directory) -> Html:
    """The newest figure, and of the others the first and some between, folded away."""
    *earlier, newest = attention_figures(run) or [(0, "")]
    some = earlier
    if len(earlier) >= _MAX_FIGURES:
        some = [earlier[round(i)] for i in np.linspace(0, len(earlier) - 1, _MAX_FIGURES - 1)]
    folded = Html("\n".join(_figure(run, *one) for one in some))
    title = ("" if some is earlier else f"{len(some)} of ") + count(len(earlier), "earlier figure")
    return section(
        "Attention maps",
        _figure(run, *newest) if newest[1] else Html(""),
        details(title, folded) if folded else Html(""),
        note="The teacher's class-token self-attention in the last block. Every figure shows the same images.",
    )


def _figure(run: Directory, step: int, name: str) -> Html:
    return picture(read(run, name), f"after {count(step, 'step')}")


def _scores(run: Directory, result: dict[str, Any]) -> Iterator[Html]:
    if result:
        yield table(
            [
                {
                    "file": run_dir.RESULT,
                    **{k: v for k, v in flatten(result) if "knn" in k or k == "steps"},
                }
            ]
        )
    evaluations = run_dir.evaluation_names(run)
    found = {name: read_mapping(run, name) for name in evaluations}
    tables = ("by_class", "confusions")
    yield table(
        [{"file": n, **{k: v for k, v in one.items() if k not in tables}} for n, one in found.items()]
    )
    for name, one in found.items():
        for key, title in (("by_class", "by class"), ("confusions", "most confused pairs")):
            if isinstance(rows := one.get(key), list) and all(isinstance(row, dict) for row in rows):
                yield details(f"{name}: k-NN {title}", table(rows)) if rows else Html("")
    if result:
        yield details(run_dir.RESULT, json.dumps(result, indent=1, ensure_ascii=False))
