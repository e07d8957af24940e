"""What a study has found, for people: a page, a table and a picture in its directory, and a few lines for a terminal.

At any moment: of none, some or all of its trials, whatever their files hold. Local or S3; no Ray here.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dinoray.models.commands import command
from dinoray.models.counts import count
from dinoray.models.settings import flatten
from dinoray.pipeline.reporting.page import (
    Html,
    charts,
    contents,
    details,
    drawing,
    escape,
    facts,
    page,
    pair,
    section,
    sentences,
    table,
    tiles,
)
from dinoray.pipeline.reporting.settings import versions
from dinoray.pipeline.reporting.summary import duration
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.study.findings.regions import short
from dinoray.pipeline.study.findings.sentences import metric_name, result_text, score_text
from dinoray.pipeline.study.findings.summary import Findings, findings
from dinoray.pipeline.study.page.plots import (
    curve_charts,
    importance_bars,
    parallel_coordinates,
    study_picture,
)
from dinoray.pipeline.study.page.score_map import map_keys, score_map
from dinoray.pipeline.study.page.tables import (
    agreement_rows,
    aligned,
    candidate_row,
    collapsed_rows,
    csv_table,
    error_rows,
    trial_row,
)
from dinoray.pipeline.study.trials import BEST, TrialRecord, read_study, read_trials
from dinoray.pipeline.tracking.records import read

PAGE, TABLE, PICTURE = "study.html", "study.csv", "study.png"
_TOP = 10
_SETTINGS = (
    *("objective", "reason", "searcher", "scheduler", "trials", "total_steps", "grace_steps", "evaluations"),
    *("num_images", "out_dim", "seed", "confirm_top", "confirm_seeds"),
)


def write_study_report(study: Directory) -> None:
    """Write study.html, study.csv and study.png into the study's directory, over what was there."""
    tried, about = read_trials(study), _about(study)
    found = findings(tried, about)
    study.write(TABLE, csv_table(tried).encode("utf-8", "replace"))
    study.write(PICTURE, study_picture(tried, found, _name(study, about), _remark(found)))
    study.write(PAGE, _page(study, about, tried, found).encode())


def describe_study(study: Directory) -> str:
    """The same in plain text: the top candidates, the cost, and the words."""
    about = _about(study)
    found = findings(read_trials(study), about)
    lines = [f"study {_name(study, about)}", ""]
    if found.candidates:
        lines += [*aligned([candidate_row(c, found) for c in found.candidates[:_TOP]]), ""]
        more = len(found.candidates) - _TOP
        if more > 0:
            lines[-1:] = [f"and {more} more in {study.join(TABLE)}", ""]
    return "\n".join([*lines, *found.words, _cost(found)])


def _about(study: Directory) -> dict[str, Any]:
    """study.json; empty when it is damaged, since the trials say most of it."""
    try:
        about = read_study(study)
    except ValueError:
        return {}
    return about if isinstance(about, dict) else {}


def _name(study: Directory, about: Mapping[str, Any]) -> str:
    return str(about.get("name") or study.uri.rpartition("/")[2])


def _page(study: Directory, about: Mapping[str, Any], tried: Sequence[TrialRecord], found: Findings) -> str:
    name = _name(study, about)
    best = read(study, BEST)
    importance = section(
        "Importance of settings",
        drawing(importance_bars(found), width=400),
        note="Share of the variance in trial rank that each setting explains alone. Collapsed trials rank last; "
        "early-stopped trials count with their last score.",
    )
    agreement = section(
        "Agreement of metrics",
        table(list(agreement_rows(found))),
        note="Kendall's tau-b: 1 means the same order of trials, -1 the opposite order. A lower loss counts as better, "
        "so a positive tau always means agreement. A tau within the chance range may be chance. CLID is cluster "
        "learnability plus intrinsic dimension, each scaled over the trials.",
    )
    is_alone = not (importance or agreement)
    sections = [
        pair(
            section(
                "Map",
                drawing(score_map(tried, found, is_alone=is_alone), width=900 if is_alone else 640),
                note=_about_map(found),
            ),
            importance,
            agreement,
        ),
        section(
            "Curves",
            charts(curve_charts(tried, found)),
            note="The x-axis shows steps. Finished trials are coloured by score, and the best trial is outlined. "
            "Collapsed trials end in a cross. Early-stopped, failed and unfinished trials are dashed. The horizontal "
            "line is the mean score of the initial weights, before the first step.",
        ),
        section(
            "Parallel coordinates",
            drawing(parallel_coordinates(tried, found), width=max(740, 150 * (len(found.space) + 1))),
            note="Each line is one trial. Collapsed trials end at the bottom of the last axis. Early-stopped "
            "trials are dashed.",
        ),
        section(
            "Candidates",
            table([candidate_row(candidate, found) for candidate in found.candidates]),
            note="Mean ± standard deviation over seeds; above the start: points of k-NN accuracy. Ties and "
            "differences are reported only between candidates with several seeds. The first seed selected the "
            "candidates for reruns, so the means are biased upwards.",
        ),
        section("Collapsed trials", table(list(collapsed_rows(tried, found)))),
        section("Errors", table(list(error_rows(tried)))),
        section(
            "All trials",
            table([trial_row(one, found) for one in tried]),
            note=f"{TABLE} has all metrics.",
        ),
        section(
            "Best config",
            details(BEST, best.decode(errors="replace")) if best else Html(""),
            note=command("pretrain", "--from-study", study.uri),
        ),
        section("Settings", facts(_settings(about)), _space(found)),
        versions(study),
    ]
    return page(
        name,
        [
            Html(f'<h1>{escape(name)}</h1>\n<p class="address">{escape(study.uri)}</p>'),
            section("Findings", sentences(found.words)),
            contents(sections),
            tiles(list(_tiles(found))),
            *sections,
        ],
    )


def _about_map(found: Findings) -> str:
    keys = map_keys(found)
    ground = (
        " The background colour is interpolated from nearby trials, not measured." if len(keys) > 1 else ""
    )
    others = " Other settings also vary." if len(found.space) > len(keys) else ""
    return f"{metric_name(found.objective)} over {' and '.join(keys)}.{ground}{others}"


def _remark(found: Findings) -> str:
    """The result in half a line."""
    counts = found.counts
    parts = [
        count(counts["all"], "trial"),
        f"{counts['stopped']} {'replaced' if found.is_population else 'early-stopped'}",
        f"{counts['collapsed']} collapsed",
    ]
    if found.best:
        result = result_text(found.objective, found.best)
        parts = [f"best {metric_name(found.objective)} {result} (trial {found.best.name})", *parts]
    return ", ".join(parts)


def _tiles(found: Findings) -> Iterator[tuple[str, str, str]]:
    counts, saving = found.counts, found.saving
    if found.best:
        seeds = count(len(found.best.scores), "seed")
        spread = result_text(found.objective, found.best).partition(" ± ")[2].partition(" over ")[0]
        remark = (
            f"± {spread}, {seeds}, trial {found.best.name}" if spread else f"{seeds}, trial {found.best.name}"
        )
        yield f"best {metric_name(found.objective)}", score_text(found.objective, found.best.mean), remark
    ties = (
        f"{count(len(found.ties), 'tie')} with the best"
        if found.best and found.best.is_confirmed
        else "one seed each"
    )
    yield "candidates", str(len(found.candidates)), ties if found.candidates else "none yet"
    yield "collapsed", str(counts["collapsed"]), ", ".join(found.verdicts) or "trials end at detection"
    if found.is_population:
        yield "replaced", str(counts["stopped"]), "by copies of better trials"
    else:
        yield "early-stopped", str(counts["stopped"]), "behind other trials"
    yield "failed", str(counts["failed"]), "with an error"
    yield "saved", f"{saving.share:.0%}", "of all steps, by ending trials early"
    hours = found.cost.reserved
    yield "CPU-hours", f"{hours.cpu:.3g}", f"{saving.by_collapse.cpu + saving.by_stopping.cpu:.3g} saved"
    if hours.gpu:
        yield "GPU-hours", f"{hours.gpu:.3g}", f"{saving.by_collapse.gpu + saving.by_stopping.gpu:.3g} saved"
    if found.cost.seconds:
        yield (
            "wall time",
            duration(found.cost.seconds),
            f"start-up took {found.cost.start_share:.0%} of trial time",
        )


def _settings(about: Mapping[str, Any]) -> dict[str, Any]:
    plan = about.get("plan")
    return {k: about[k] for k in _SETTINGS if k in about} | (
        dict(flatten({"plan": plan})) if isinstance(plan, dict) else {}
    )


def _space(found: Findings) -> Html:
    rows = [
        {"setting": k, "scale": d.kind, "values": ", ".join(map(short, d.values))}
        for k, d in found.space.items()
    ]
    return table(rows)


def _cost(found: Findings) -> str:
    hours = found.cost.reserved
    gpu = f", {hours.gpu:.3g} GPU-hours" if hours.gpu else ""
    wall = f" in {duration(found.cost.seconds)}" if found.cost.seconds else ""
    return f"Reserved: {hours.cpu:.3g} CPU-hours{gpu}{wall}."
