"""Does jobs.plan's forecast come true? A run is planned from short measurements, run, and held against its plan.

    python benchmarks/forecast.py [--recipe demo] [--rounds 3] [--seconds 5] [key=value ...]

Trains on the CPUs of this machine. Each round measures before the run and after it and forecasts from the mean, since
what else the machine does changes. Two things are compared:

    images/s    of the forecast, with all images over the time that training took: logged steps but for the first,
                which waits for the first block; evaluations and checkpoints are not in either
    seconds     of the whole command, its start and evaluations among them

A forecast is for a machine that does nothing else. So beside what the clock says stands what it would have said on the
CPU time that other programs left: by the clock, over one less the share of all CPUs that others took in that time. On
a quiet machine both are the same. Prints a table for RESULTS.md, with the median of the rounds.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import psutil
from stream import session_cpu

from dinoray.jobs.cli.arguments import CommandLine
from dinoray.jobs.cli.config import load
from dinoray.jobs.cli.main import run_main
from dinoray.jobs.cluster.measure import Measured, measure, run_of
from dinoray.jobs.cluster.plan_config import PlanConfig
from dinoray.models.errors import ConfigError, DinorayError
from dinoray.pipeline.data.demo_images import demo_folder, write_demo_images
from dinoray.pipeline.planning.forecast import Forecast, forecast_here
from dinoray.pipeline.planning.node_rates import Figures

_SAMPLE_SECONDS = 0.5


def say(text: str) -> None:
    """Print to stderr, because the table goes to a file."""
    print(text, file=sys.stderr, flush=True)


def plan(config: PlanConfig, before: Measured, after: Measured) -> Forecast:
    """Return the forecast from the mean of two measurements."""
    pairs = zip(before.figures, after.figures, strict=True)
    mean = before._replace(figures=Figures(*(statistics.mean(pair) for pair in pairs)))
    return forecast_here(run_of(config, mean), mean.figures, config.plan, cores=os.cpu_count() or 1)


class Ran(NamedTuple):
    """Result of a run: images/s and seconds by the clock, and the CPU shares of other programs."""

    rate: float
    seconds: float
    others_while_training: float
    others: float


def train(recipe: str, overrides: list[str], folder: Path) -> Ran:
    """Run the training and record CPU use by process."""
    command = [sys.executable, "-m", "jobs.pretrain", "--recipe", recipe, *overrides]
    begin = time.time()
    process = subprocess.Popen([*command, f"storage_path={folder}", "name=run"], stdout=sys.stderr)
    samples, own = [], {}
    while process.poll() is None:
        own |= {
            pid: seconds for pid, (_, seconds) in session_cpu(process.pid).items()
        }  # ended processes keep theirs
        used = psutil.cpu_times()
        samples.append((time.time(), sum(own.values()), used.user + used.nice + used.system))
        time.sleep(_SAMPLE_SECONDS)
    seconds = time.time() - begin
    if process.returncode:
        raise DinorayError(f"the run ended with exit code {process.returncode}")
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    # The meter excludes pauses, so its rates give the duration of the steps.
    counted = [(after["step"] - before["step"], after) for before, after in itertools.pairwise(steps)]
    took = sum(count / record["images_per_second"] for count, record in counted)
    within = [sample for sample in samples if steps[0]["time"] <= sample[0] <= steps[-1]["time"]]
    return Ran(
        sum(count for count, _ in counted) / took, seconds, share_of_others(within), share_of_others(samples)
    )


def share_of_others(samples: list[tuple[float, float, float]]) -> float:
    """Return the share of all CPUs used by other programs, from samples (time, own CPU s, all CPU s)."""
    (begin, own_before, all_before), (end, own_after, all_after) = samples[0], samples[-1]
    others = all_after - all_before - (own_after - own_before)
    return max(0.0, others) / (end - begin) / (os.cpu_count() or 1)


def main(argv: list[str]) -> None:
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each of the two measurements")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1:
        raise ConfigError(f"--rounds={arguments.rounds} must be at least 1")
    overrides = [*arguments.overrides, "resources.use_gpu=false"]
    config = load(PlanConfig, arguments.recipe, None, [*overrides, f"plan.seconds={arguments.seconds}"])
    if Path(config.data.path).is_relative_to(demo_folder()):
        write_demo_images(demo_folder())
    print(
        "| round | crops, images/s a CPU | step, images/s a CPU | others' share | forecast, images/s | by the clock "
        "| on what others left | error | forecast, s | by the clock | on what others left | error |"
    )
    print("|" + 12 * "---|")
    errors: dict[str, list[float]] = {"rate": [], "seconds": []}
    for number in range(1, arguments.rounds + 1):
        before = measure(config, say)
        with tempfile.TemporaryDirectory(prefix="dinoray-forecast-") as folder:
            ran = train(arguments.recipe, overrides, Path(folder))
        after = measure(config, say)
        found = plan(config, before, after)
        rate, seconds = ran.rate / (1 - ran.others_while_training), ran.seconds * (1 - ran.others)
        errors["rate"].append(found.images_per_second / rate - 1)
        errors["seconds"].append(3600 * found.hours / seconds - 1)
        crops, steps = (
            f"{getattr(before.figures, name):.0f}, {getattr(after.figures, name):.0f}"
            for name in ("images_per_second_per_cpu", "images_per_second_per_gpu")
        )
        print(
            f"| {number} | {crops} | {steps} | {ran.others_while_training:.0%} "
            f"| {found.images_per_second:.0f} | {ran.rate:.0f} | {rate:.0f} | {errors['rate'][-1]:+.0%} "
            f"| {3600 * found.hours:.0f} | {ran.seconds:.0f} | {seconds:.0f} | {errors['seconds'][-1]:+.0%} |",
            flush=True,
        )
    medians = [statistics.median(errors[name]) for name in ("rate", "seconds")]
    print(f"\nmedian error: images/s {medians[0]:+.0%}, seconds {medians[1]:+.0%}")


if __name__ == "__main__":
    run_main(main)
