"""k-NN accuracy before and after pretraining, over several seeds.

    python benchmarks/knn_seeds.py [--recipe demo] [--seeds 0 1 2] [key=value ...]

Each seed is a whole run of `jobs.pretrain` in a process of its own, named `<recipe>-seed<n>`; a run that is
already finished is read, not repeated. Prints a table for RESULTS.md.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

from dinoray.jobs.cli.config import load_config
from dinoray.jobs.cli.main import run_main
from dinoray.pipeline.storage.files import Directory


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args(argv)
    config = load_config(arguments.recipe, None, arguments.overrides)
    k = f"knn_{config.eval.k[-1]}"
    print(
        f"| recipe {config.recipe} | {k} before | {k} after | majority | steps | seconds | images/s | data wait "
        "| verdict |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    gains = []
    for seed in arguments.seeds:
        name = f"{config.recipe}-seed{seed}"
        begin = time.monotonic()
        command = ["-m", "jobs.pretrain", "--recipe", config.recipe, f"train.seed={seed}", f"name={name}"]
        subprocess.run([sys.executable, *command, *arguments.overrides], check=True, stdout=sys.stderr)
        seconds = time.monotonic() - begin
        run = Directory(config.storage_path).child(name)
        result = json.loads(run.read("result.json"))
        steps = [json.loads(line) for line in run.read("metrics.jsonl").splitlines()]
        rates = [s["images_per_second"] for s in steps if "loss" in s]
        waits = [s["data_wait"] for s in steps if "loss" in s]
        before, after = result["before"][k], result["after"][k]
        gains.append(after - before)
        print(
            f"| seed {seed} | {before:.1%} | {after:.1%} | {result['after']['majority']:.1%} | {result['steps']} "
            f"| {seconds:.0f} | {statistics.median(rates):.0f} | {statistics.median(waits):.0%} "
            f"| {result['last']['verdict']} |",
            flush=True,
        )
    print(f"\ngain: {statistics.mean(gains) * 100:.1f} points on average, {min(gains) * 100:.1f} at least")


if __name__ == "__main__":
    run_main(main)
