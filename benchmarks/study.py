"""Studies on the demo's images: where collapse lies, what ending trials early saves, which metric ranks like k-NN.

    python benchmarks/study.py [--studies to-the-end halved] [key=value ...]

`to-the-end` spreads 16 trials evenly over teacher temperature and centre momentum, far into both collapses, and ends
none but those that collapse; `halved` is the default search, TPE and ASHA, with 12 trials over the same space. Their
best (three, one) are run again with other seeds. Each is a `jobs.tune` of its own, continued where it stands: one that
is finished is read, not repeated. Prints tables for RESULTS.md; study.html, study.csv and study.png lie in the
directories named.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence

from dinoray.jobs.cli.config import load
from dinoray.jobs.cli.main import run_main
from dinoray.jobs.studies.config import StudyConfig
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.study.findings.agreement import agreement as correlate
from dinoray.pipeline.study.findings.ranking import searched
from dinoray.pipeline.study.findings.summary import Findings, findings
from dinoray.pipeline.study.trials import TrialRecord, read_study, read_trials

SPACE = "{loss.teacher_temp: {uniform: [0.02, 0.12]}, loss.center_momentum: {one_minus_log: [0.5, 0.999]}}"
SETTINGS = [
    *("resources.train_workers=1", f"tune.space={SPACE}"),
    *("tune.trials=16", "tune.epochs=10", "tune.evaluations=6"),
]
STUDIES = {
    "to-the-end": ["tune.searcher=quasi", "tune.scheduler=none"],
    "halved": ["tune.trials=12", "tune.confirm_top=1", "tune.grace=0.25"],
}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--studies", nargs="+", choices=list(STUDIES), default=list(STUDIES))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args(argv)
    found = {}
    for name in arguments.studies:
        overrides = [f"name={name}", *SETTINGS, *STUDIES[name], *arguments.overrides]
        command = [sys.executable, "-m", "jobs.tune", "--recipe", "demo", *overrides]
        subprocess.run(command, check=True, stdout=sys.stderr)
        config = load(StudyConfig, "demo", None, overrides)
        directory = Directory(config.storage_path).child(name)
        tried = read_trials(directory)
        found[name] = (tried, findings(tried, read_study(directory)))
    for rows in (outcomes(found), cost(found), agreement(found), confirmed(found)):
        print("\n".join(rows), end="\n\n")


Found = dict[str, tuple[list[TrialRecord], Findings]]


def outcomes(found: Found) -> Iterator[str]:
    """Yield how trials ended, and the best score against the median of all tried parameters."""
    yield "| study | trials | finished | given up | collapsed | failed | median k-NN | best, over its seeds | ties |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for name, (tried, result) in found.items():
        base = searched(tried)
        by = {s: sum(t.status == s for t in base) for s in ("finished", "stopped", "collapsed", "failed")}
        knn = [t.outcome.scores[result.objective] for t in base if t.outcome and t.outcome.scores]
        best = "none"
        if result.best is not None:
            spread = f" ± {result.best.std:.1%}" if result.best.std is not None else ""
            best = (
                f"{result.best.mean:.1%}{spread} ({len(result.best.scores)} seeds, trial {result.best.name})"
            )
        yield (
            f"| {name} | {len(base)} | {by['finished']} | {by['stopped']} | {by['collapsed']} | {by['failed']} "
            f"| {statistics.median(knn):.1%} | {best} | {len(result.ties)} |"
        )


def cost(found: Found) -> Iterator[str]:
    """Yield the cost of the searches, and the cost of running every trial to its end."""
    yield "| study | steps trained | of all | CPU-hours | saved by collapse | by giving up | start of a trial | wall |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, (tried, result) in found.items():
        starts = [t.outcome.start_seconds for t in tried if t.outcome and t.outcome.start_seconds]
        saving = result.saving
        yield (
            f"| {name} | {saving.steps_trained} | {1 - saving.share:.0%} | {result.cost.reserved.cpu:.2f} "
            f"| {saving.by_collapse.cpu:.2f} | {saving.by_stopping.cpu:.2f} "
            f"| {statistics.median(starts):.0f} s | {result.cost.seconds / 60:.0f} min |"
        )


def agreement(found: Found) -> Iterator[str]:
    """Yield Kendall's tau of metrics with k-NN, per study and over all trials, which were trained alike."""
    yield "| study | metric | collapsed trials | tau with k-NN | trials |"
    yield "|---|---|---|---|---|"
    together = [t for tried, _ in found.values() for t in tried]
    measured = {name: result.kendall for name, (_, result) in found.items()}
    objective = next(iter(found.values()))[1].objective
    for name, agreements in [*measured.items(), ("all", correlate(together, objective))]:
        for one in agreements:
            counted = "left out" if not one.with_collapsed else "as the worst" if one.gated else "as measured"
            tau = "-" if one.tau is None else f"{one.tau:+.2f}"
            yield f"| {name} | {one.metric} | {counted} | {tau} | {one.num_trials} |"


def confirmed(found: Found) -> Iterator[str]:
    """Yield the candidates that were run with several seeds."""
    yield "| study | trial | parameters | k-NN by seed | standing |"
    yield "|---|---|---|---|---|"
    for name, (_, result) in found.items():
        for one in result.candidates:
            if len(one.scores) > 1:
                params = ", ".join(f"{key.partition('.')[2]} {value:g}" for key, value in one.params.items())
                scores = ", ".join(f"{score:.1%}" for score in one.scores)
                yield f"| {name} | {one.name} | {params} | {scores} | {one.standing} |"


if __name__ == "__main__":
    run_main(main)
