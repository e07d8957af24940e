"""A seeded storm of faults over one run, which must end with the weights and the accounting of a calm run.

    python benchmarks/chaos.py [--seed 0 ...] [--mtbf-seconds 40] [--steps 6000] [--only REGEX] [--json FILE]

Several seeds are as many storms, after one calm run.

The cluster is a Ray head that has no room for train workers and two nodes that have room for one each, all of them
processes of this machine; images and run are in a real S3 store (SeaweedFS) behind the proxy of the tests. Faults come
at random times, on average `--mtbf-seconds` apart, while the run makes steps: SIGKILL of each kind of process, a node
or the whole head lost, a train worker stopped (its peers then wait in a collective that does not return), augment
actors stopped for a while, a store that is down, refuses writes, cuts its answers or flips bytes in them. A run whose
driver is killed, or that ends with exit code 3 or 4, is started again by the same command; nothing else is done by
hand.

Exits with 1 unless the weights are equal bit for bit, each step was logged once, and each position was trained. Prints
a ledger for RESULTS.md: for each kind of fault how often it came, the steps repeated, and the seconds from the fault
until the run noticed it, until it resumed from a checkpoint, and until the first step after the one at which it came. A
run that is started again cannot know when its driver was lost: then only the last two are known.

Needs the extra `test`.
"""

import argparse
import contextlib
import json
import math
import random
import re
import signal
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from faults import FaultProxy, fault_proxy
from jobs_processes import TINY, Job, processes_with, start_job
from ray_head import RayHead, RayNode, ray_head, ray_node
from safetensors.torch import load
from servers import S3Server, aws_environment, s3_server

from dinoray.jobs.cli.arguments import CommandLine
from dinoray.jobs.cli.main import run_main
from dinoray.models.errors import DinorayError
from dinoray.pipeline.data.demo_images import PATTERNS, draw_demo_image
from dinoray.pipeline.storage.run_dir import METRICS, checkpoint_name

BUCKET, BATCH = "storm", 32
_STUCK_SECONDS = 300.0
"""Longest time without a step: the limits of the run that find a hang are far shorter."""
_STEP = re.compile(r"^step (\d+)/", re.M)
_RESUMED = re.compile(r"^.*resuming from step (\d+)(?: after (\d+) s)?.*$", re.M)
_WORKERS, _ACTORS = "RayTrainWorker", "MultiCropActor"


class Cluster:
    """A head and two nodes, each with room for a train worker and an augment actor."""

    def __init__(self, env: dict[str, str]) -> None:
        self._env, self._stack = env, contextlib.ExitStack()
        self.start()

    def start(self) -> None:
        """Start a new head and its nodes."""
        self.head: RayHead = self._stack.enter_context(ray_head(self._env, num_cpus=1))
        self.nodes: list[RayNode] = []
        for _ in range(2):
            self.join()
            self.nodes[-1].wait_until_up()

    def join(self) -> None:
        """Add a node."""
        self.nodes.append(self._stack.enter_context(ray_node(self.head, num_cpus=3)))

    def close(self) -> None:
        """End all of it."""
        self._stack.close()

    def processes(self, title: str) -> list[psutil.Process]:
        """Return the workers of all nodes whose title contains `title`, the oldest first."""
        found = []
        for parent in {*processes_with(str(self.head.temp_dir)), *processes_with(self.head.gcs)}:
            with contextlib.suppress(psutil.Error):
                found += [child for child in parent.children() if title in " ".join(child.cmdline())]
        return sorted(found, key=lambda process: process.pid)


@dataclass
class Hit:
    """A fault that came."""

    kind: str
    second: float
    """Since the storm began."""
    step: int
    """The last step that was printed before it."""
    noticed_seconds: float | None = None
    """From the fault until the run noticed a loss, as far as it says so."""
    resumed_seconds: float | None = None
    """From the fault until the run resumed from a checkpoint; None: it did not have to."""
    recovered_seconds: float | None = None
    """From the fault to the next step that was printed; None: none came."""
    steps_repeated: int = 0


class Storm:
    """The run, its cluster and its store, and what happens to them."""

    def __init__(
        self,
        arguments: list[str],
        cluster: Cluster,
        proxy: FaultProxy,
        *,
        seed: int,
        mtbf_seconds: float,
        only: str = "",
    ) -> None:
        """`mtbf_seconds`: mean time between two faults; 0: none come. `only`: which kinds."""
        self._arguments, self._cluster, self._proxy = arguments, cluster, proxy
        self._random, self._mtbf = random.Random(seed), mtbf_seconds
        self._kinds = {kind: hit for kind, hit in self._faults().items() if re.search(only, kind)}
        self._began = time.monotonic()
        self._due: list[tuple[float, Callable[[], object]]] = []
        self._job: Job | None = None
        self._step, self._step_at, self._resumed = 0, self._began, 0
        self.hits: list[Hit] = []
        self.starts = 0

    def _faults(self) -> dict[str, Callable[[], bool]]:
        """By kind, what makes one; False if there is nothing to hit at the moment."""
        return {
            "augment actor killed": lambda: self._signal(_ACTORS, signal.SIGKILL),
            "train worker killed": lambda: self._signal(_WORKERS, signal.SIGKILL),
            "stream coordinator killed": lambda: self._signal("SplitCoordinator", signal.SIGKILL),
            "train controller killed": lambda: self._signal("TrainController", signal.SIGKILL),
            "train worker stopped": lambda: self._signal(_WORKERS, signal.SIGSTOP),
            "augment actor stopped for 20 s": lambda: self._signal(_ACTORS, signal.SIGSTOP, 20),
            "driver killed": self._kill_driver,
            "node lost, another in 10 s": self._lose_node,
            "head lost": self._lose_head,
            "store down for 10 s": self._store_down,
            "store refuses writes for 10 s": lambda: self._spoil("slow_down", "^(PUT|POST) ", 1.0),
            "one of 5 answers cut for 10 s": lambda: self._spoil("truncate", "^GET ", 0.2),
            "one of 5 answers with a flipped byte for 10 s": lambda: self._spoil(
                "corrupt", "^GET .*images/", 0.2
            ),
        }

    def _signal(self, title: str, number: signal.Signals, seconds: float | None = None) -> bool:
        found = self._cluster.processes(title)
        if not found:
            return False
        process = self._random.choice(found)
        process.send_signal(number)
        if seconds is not None:
            self._later(seconds, lambda: process.send_signal(signal.SIGCONT))
        return True

    def _kill_driver(self) -> bool:
        assert self._job is not None
        self._job.process.kill()
        return True

    def _lose_node(self) -> bool:
        self._cluster.nodes.pop(self._random.randrange(len(self._cluster.nodes))).lose()
        self._later(10, self._cluster.join)
        return True

    def _lose_head(self) -> bool:
        self._cluster.close()
        self._due = [(at, act) for at, act in self._due if act != self._cluster.join]
        self._cluster.start()
        return True

    def _store_down(self) -> bool:
        if any(act == self._proxy.come_up for _, act in self._due):
            return False  # it is
        self._proxy.go_down()
        self._later(10, self._proxy.come_up)
        return True

    def _spoil(self, kind: str, pattern: str, share: float) -> bool:
        self._proxy.fail(kind, pattern=pattern, times=10**9, share=share)
        self._later(10, self._proxy.heal)
        return True

    def _later(self, seconds: float, act: Callable[[], object]) -> None:
        self._due.append((time.monotonic() + seconds, act))

    def run(self) -> float:
        """Bring the run to its end, through all that happens; return the seconds that it took.

        Raises DinorayError if it ends otherwise than the promise is, or makes no step for long.
        """
        next_hit = self._next_hit()
        while True:
            self.starts += 1
            env = self._cluster.head.env | {"RAY_ADDRESS": self._cluster.head.gcs}
            with start_job("jobs.pretrain", *self._arguments, env=env) as self._job:
                self._resumed, trains = 0, False
                while self._job.process.poll() is None:
                    time.sleep(0.1)
                    self._do_what_is_due()
                    trains = self._follow() or trains
                    if trains and time.monotonic() >= next_hit and self._hit():
                        next_hit = self._next_hit()
                self._job.wait()
                self._follow()
                code, last = self._job.process.returncode, self._job.output.strip().splitlines()[-1:]
            if code == 0:
                for _, act in self._due:
                    with contextlib.suppress(psutil.Error):
                        act()
                return time.monotonic() - self._began
            print(f"{self._second():.0f} s: the run ended with {code}: {''.join(last)[:200]}", flush=True)
            if code not in (-signal.SIGKILL, 3, 4):
                raise DinorayError(
                    f"exit code {code} is none that the same command is a remedy for:\n{self._job.output[-6000:]}"
                )

    def _next_hit(self) -> float:
        return time.monotonic() + (self._random.expovariate(1 / self._mtbf) if self._mtbf else math.inf)

    def _hit(self) -> bool:
        kind = self._random.choice(list(self._kinds))
        hit = Hit(kind, self._second(), self._step)
        if not self._kinds[kind]():
            return False
        self.hits.append(hit)
        print(f"{hit.second:.0f} s: {kind} at step {hit.step}", flush=True)
        return True

    def _do_what_is_due(self) -> None:
        now = time.monotonic()
        due, self._due = (
            [act for at, act in self._due if at <= now],
            [one for one in self._due if one[0] > now],
        )
        for act in due:
            with contextlib.suppress(psutil.Error):
                act()

    def _follow(self) -> bool:
        """Read what the job has printed; return whether it has made a new step."""
        assert self._job is not None
        output, now = self._job.output, time.monotonic()
        resumed = list(_RESUMED.finditer(output))
        for match in resumed[self._resumed :]:
            step, waited = match.groups()
            print(f"{self._second():.0f} s: {match[0]}", flush=True)
            if self.hits:
                self.hits[-1].steps_repeated += max(0, self._step - int(step))
            for hit in self.hits:
                if hit.recovered_seconds is None:
                    hit.resumed_seconds = self._second() - hit.second
                    if waited:
                        hit.noticed_seconds = max(0, hit.resumed_seconds - int(waited))
        self._resumed = len(resumed)
        steps = [int(step) for step in _STEP.findall(output)]
        if steps and steps[-1] != self._step:
            self._step, self._step_at = steps[-1], now
            for hit in self.hits:
                if hit.recovered_seconds is None and self._step > hit.step:
                    hit.recovered_seconds = self._second() - hit.second
            return True
        if now - self._step_at > _STUCK_SECONDS:
            raise DinorayError(f"no step for {_STUCK_SECONDS:g} s after step {self._step}:\n{output[-3000:]}")
        return False

    def _second(self) -> float:
        return time.monotonic() - self._began


def ledger(hits: list[Hit]) -> str:
    """Return the table of a storm, the kinds of faults in alphabetical order."""
    of_kind: defaultdict[str, list[Hit]] = defaultdict(list)
    for hit in hits:
        of_kind[hit.kind].append(hit)
    lines = [
        "| fault | times | steps repeated | s until noticed | until resumed | until the next step: median | most |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, of in [*sorted(of_kind.items()), ("all", hits)]:
        recovered = [hit.recovered_seconds for hit in of]
        seconds = [
            _shown(statistics.median, [hit.noticed_seconds for hit in of]),
            _shown(statistics.median, [hit.resumed_seconds for hit in of]),
            _shown(statistics.median, recovered),
            _shown(max, recovered),
        ]
        lines.append(
            f"| {kind} | {len(of)} | {sum(hit.steps_repeated for hit in of)} | {' | '.join(seconds)} |"
        )
    return "\n".join(lines)


def _shown(of: Callable[[list[float]], float], seconds: list[float | None]) -> str:
    known = [one for one in seconds if one is not None]
    return f"{of(known):.0f}" if known else "-"


def differences(server: S3Server, calm: str, storm: str, steps: int) -> list[str]:
    """Return in what the run in the storm differs from the calm one, and what its log lacks."""

    def get(run: str, file: str) -> bytes:
        return server.client().get_object(Bucket=BUCKET, Key=f"runs/{run}/{file}")["Body"].read()

    found = []
    for file in ("student.safetensors", "teacher.safetensors"):
        one, other = (load(get(run, f"checkpoints/{checkpoint_name(steps)}/{file}")) for run in (calm, storm))
        differ = [name for name in one if not one[name].equal(other[name])]
        found += [f"{file}: {len(differ)} of {len(one)} tensors differ"] if differ else []
    lines = [json.loads(line) for line in get(storm, METRICS).splitlines()]
    trained = [line for line in lines if "loss" in line]
    if [line["step"] for line in trained] != list(range(1, steps + 1)):
        found.append(f"{METRICS} has {len(trained)} steps, not each of {steps} once")
    if trained[-1]["trained_images"] + trained[-1]["bad_images"] != steps * BATCH:
        found.append(f"of {steps * BATCH} positions {trained[-1]['trained_images']} were trained")
    if trained[-1]["bad_images"]:
        found.append(f"{trained[-1]['bad_images']} images count as bad, and all are good")
    return found


def run_arguments(name: str, steps: int, per_class: int) -> list[str]:
    """Return the settings of a run of two train workers on small drawings."""
    return [
        *TINY,
        *(f"name={name}", f"data.path=s3://{BUCKET}/images", f"storage_path=s3://{BUCKET}/runs"),
        *("eval.val_path=null", f"train.epochs={steps * BATCH / (4 * per_class)}"),
        *(
            f"train.global_batch_size={BATCH}",
            "resources.train_workers=2",
            "resources.cpus_per_train_worker=2",
        ),
        *("resources.augment_actors=2", "resources.hang_seconds=20", "checkpoint.every_steps=100"),
        *("eval.every_steps=1000000", "head.use_bn=false", "optim.warmup_epochs=0"),
    ]


@contextlib.contextmanager
def store(per_class: int) -> Iterator[tuple[S3Server, FaultProxy]]:
    """A store with images, and the proxy before it."""
    with s3_server() as server, fault_proxy(server.endpoint) as proxy:
        server.client().create_bucket(Bucket=BUCKET)
        for label in list(PATTERNS)[:4]:
            for number in range(per_class):
                body = draw_demo_image(label, "train", number)
                server.client().put_object(Bucket=BUCKET, Key=f"images/{label}/{number}.jpg", Body=body)
        yield server, proxy


def main(argv: list[str]) -> None:
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--mtbf-seconds", type=float, default=40.0, help="mean time between two faults")
    parser.add_argument("--steps", type=int, default=6000, help="a multiple of 100")
    parser.add_argument("--images-per-class", type=int, default=50)
    parser.add_argument("--only", default="", help="regular expression of the kinds of faults")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    arguments = parser.parse_args(argv)
    per_class, steps = arguments.images_per_class, arguments.steps
    hits: dict[int, list[Hit]] = {}
    found: list[str] = []
    with store(per_class) as (server, proxy):

        def train(name: str, seed: int, mtbf_seconds: float) -> list[Hit]:
            settings = run_arguments(name, steps, per_class)
            with contextlib.closing(Cluster(aws_environment(proxy.endpoint))) as cluster:
                storm = Storm(
                    settings, cluster, proxy, seed=seed, mtbf_seconds=mtbf_seconds, only=arguments.only
                )
                seconds = storm.run()
            print(f"{name}: {steps} steps in {seconds:.0f} s, {storm.starts} starts", flush=True)
            return storm.hits

        train("calm", 0, 0)
        for seed in arguments.seed:
            name = f"storm-{seed}"
            hits[seed] = train(name, seed, arguments.mtbf_seconds)
            print(f"\n{len(hits[seed])} faults, {arguments.mtbf_seconds:g} s between two on average\n")
            print(ledger(hits[seed]))
            differ = differences(server, "calm", name, steps)
            equal = "weights equal bit for bit, each step logged once, each position trained"
            print("\n" + ("\n".join(differ) or equal) + "\n", flush=True)
            found += differ
    if len(hits) > 1:
        print(f"all storms\n\n{ledger([hit for of_seed in hits.values() for hit in of_seed])}")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({seed: [asdict(hit) for hit in of_seed] for seed, of_seed in hits.items()})
        )
    if found:
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
