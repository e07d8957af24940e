"""Loss curves of 1, 2 and 4 train workers, and of a run whose train workers follow its nodes: they are one curve.

    python benchmarks/elastic.py [--steps 1000] [--json FILE] [--picture benchmarks/elastic.png]

The demo's network and images on a Ray whose head has no room for train workers, and whose nodes, processes of this
machine, have room for one each. The run that changes begins with one node; a second one joins, then two more, and then
two are lost as machines are lost: each once the run trains with the nodes that it had. Prints the changes and the
largest differences from the curve of one worker.

Needs the extra `test`.
"""

import argparse
import contextlib
import json
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from jobs_processes import Job, Resume, losses, resumes, start_job
from ray_head import RayHead, RayNode, ray_head, ray_node

from dinoray.jobs.cli.main import run_main
from dinoray.models.errors import DinorayError

BATCH, CPUS_PER_NODE = 64, 3
_WORKERS = (1, 2, 4)


class Nodes(contextlib.ExitStack):
    """Nodes with room for one train worker each."""

    def __init__(self, head: RayHead) -> None:
        super().__init__()
        self._head, self._nodes = head, list[RayNode]()

    def join(self, number: int) -> None:
        """Add nodes, one after the other."""
        for _ in range(number):
            self._nodes.append(self.enter_context(ray_node(self._head, num_cpus=CPUS_PER_NODE)))
            self._nodes[-1].wait_until_up()

    def lose(self, number: int) -> None:
        """Lose nodes, as machines are lost."""
        for _ in range(number):
            self._nodes.pop().lose()


def start(
    head: RayHead, folder: Path, name: str, steps: int, workers: str
) -> contextlib.AbstractContextManager[Job]:
    """Start a run of the demo with this many train workers."""
    return start_job(
        "jobs.pretrain",
        *(f"name={name}", f"storage_path={folder}", f"train.epochs={steps * BATCH / 2160}"),
        *(f"train.global_batch_size={BATCH}", "train.max_batch_size_per_worker=16"),
        *(f"resources.train_workers={workers}", "resources.cpus_per_train_worker=2"),
        *("resources.augment_actors=1", "head.use_bn=false", "log.every_steps=1"),
        *("checkpoint.every_steps=20", "eval.every_steps=1000000", "eval.val_path=null"),
        env=head.env | {"RAY_ADDRESS": head.gcs},
    )


def curve_of(folder: Path, name: str) -> dict[int, float]:
    """Return the loss by step, of each step once."""
    return dict(losses((folder / name / "metrics.jsonl").read_bytes()))


def train_changing(head: RayHead, folder: Path, steps: int) -> list[Resume]:
    """Train the run whose nodes come and go; return its resumes."""
    with Nodes(head) as nodes:
        nodes.join(1)
        with start(head, folder, "changing", steps, "[1,4]") as job:
            # (share of the steps, what then happens)
            since = 0
            for change in (lambda: nodes.join(1), lambda: nodes.join(2), lambda: nodes.lose(2)):
                job.wait_until(lambda since=since: _step(job) >= since + steps // 16)
                num_resumes = len(resumes(job.output))
                change()
                job.wait_until(lambda number=num_resumes: len(resumes(job.output)) > number)
                since = resumes(job.output)[-1].from_step
            _end(job)
            return resumes(job.output)


def _end(job: Job) -> None:
    if job.wait():
        raise DinorayError(f"a run ended with {job.process.returncode}:\n{job.output[-3000:]}")


def _step(job: Job) -> int:
    return max(map(int, re.findall(r"^step (\d+)/", job.output, re.M)), default=0)


def draw(curves: dict[str, dict[int, float]], changes: list[Resume]) -> Figure:
    """Draw the curves, and what each differs from that of one worker."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    above, below = figure.subplots(1, 2)
    alone = np.array(list(curves["1"].values()))
    for number, (name, curve) in enumerate(curves.items()):
        label = "changing" if name == "changing" else f"{name} train workers"
        steps, values = np.array(list(curve)), np.array(list(curve.values()))
        above.plot(steps, values, label=label, linewidth=5 - 1.2 * number, alpha=0.8)
        if name != "1":
            below.semilogy(steps, np.maximum(np.abs(values - alone), 1e-8), label=label, color=f"C{number}")
    for change in changes:
        for axes in (above, below):
            axes.axvline(change.from_step, color="gray", linestyle=":")
        above.annotate(
            change.why, (change.from_step, 0.02), xycoords=("data", "axes fraction"), rotation=90, fontsize=7
        )
    above.set(title="loss", xlabel="step")
    below.set(
        title="difference from the loss of 1 train worker (none: 1e-8)", xlabel="step", ylim=(5e-9, 2e-4)
    )
    above.legend(loc="lower right")
    below.legend(loc="upper right")
    return figure


def main(argv: list[str]) -> None:
    """Train all runs, print and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    parser.add_argument(
        "--picture", type=Path, default=Path(__file__).parent / "elastic.png", metavar="FILE.png"
    )
    arguments = parser.parse_args(argv)
    curves = {}
    with tempfile.TemporaryDirectory() as name, ray_head(num_cpus=1) as head:
        folder = Path(name)
        with Nodes(head) as nodes:
            nodes.join(max(_WORKERS))
            for workers in _WORKERS:
                with start(head, folder, str(workers), arguments.steps, str(workers)) as job:
                    _end(job)
                curves[str(workers)] = curve_of(folder, str(workers))
        changes = train_changing(head, folder, arguments.steps)
        curves["changing"] = curve_of(folder, "changing")
    print("| change | after step | resumed from | s | steps repeated |\n|---|---|---|---|---|")
    print("\n".join(f"| {' | '.join(map(str, change))} |" for change in changes))
    alone = np.array([curves["1"][step + 1] for step in range(arguments.steps)])
    print("\n| train workers | largest difference of the loss: in 20 steps | in all |\n|---|---|---|")
    for title, curve in curves.items():
        difference = np.abs(np.array([curve[step + 1] for step in range(arguments.steps)]) - alone)
        print(f"| {title} | {difference[:20].max():.1e} | {difference.max():.1e} |")
    print(f"\nloss from {alone[0]:.3f} to {alone[-1]:.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"curves": curves, "resumes": changes}))
    draw(curves, changes).savefig(arguments.picture, dpi=110)


if __name__ == "__main__":
    run_main(main)
