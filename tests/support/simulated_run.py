"""A whole run of dinoray in milliseconds: drivers, workers and their store, on a simulated clock and without Ray.

A driver takes the lease, mends Ray's list and starts Ray, whose controller starts workers. These restore, train,
save and report. All that dinoray itself does with leases, files, checkpoints and the order of images is the product's
code; Ray is simulated_ray.py, the network simulated_training.py, and faults come from simulated_faults.py.
"""

import contextlib
import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from lease_simulation import Fate
from simulated_modules import PATIENCE_SECONDS, RUN, Checkpoint
from simulated_ray import (
    BrokenListError,
    Files,
    RayCheckpoints,
    TrainingFailedError,
    Workers,
    control,
)
from simulated_store import SimulatedStore
from simulated_time import Event, Process, Time, join
from simulated_training import Agreed, History, StandIn, batches

from dinoray.models.errors import DinorayError
from dinoray.pipeline.data.order import Order
from dinoray.pipeline.data.partition import lay_out
from dinoray.pipeline.storage.files import Directory, MissingObject
from dinoray.pipeline.storage.lease import TIMING
from dinoray.pipeline.storage.lease_keeper import LeaseKeeper
from dinoray.pipeline.storage.run_dir import (
    CHECKPOINTS,
    LEASE,
    META,
    RESULT,
    checkpoint_name,
    mend_snapshot,
    remove_leftovers,
)
from dinoray.pipeline.training.bad_images import Quarantine
from dinoray.pipeline.training.config import CheckpointConfig
from dinoray.pipeline.worker.cadence import Cadence
from dinoray.pipeline.worker.restoring import RefusedCheckpointError, post_refusal, restore, take_refusal
from dinoray.pipeline.worker.saving import Saver
from dinoray.pipeline.worker.spec import WorkerSpec

_TIMING = TIMING._replace(renew=6.0, poll=2.0)
"""Fewer requests than usual, so that more runs can be simulated."""


class Settings(NamedTuple):
    """Of a run; the world size differs from driver to driver."""

    num_images: int
    global_batch_size: int
    total_steps: int
    checkpoint_every: int
    num_to_keep: int | None
    max_failures: int
    rows_per_block: int
    order: str
    is_torn: bool
    """The store shows files that are being written, as a disk does."""

    def world_sizes(self) -> list[int]:
        return [n for n in range(1, self.global_batch_size + 1) if self.global_batch_size % n == 0]


def draw(chance: random.Random) -> Settings:
    """Settings of a run."""
    return Settings(
        num_images=chance.randint(7, 30),
        global_batch_size=chance.choice([2, 4, 6, 8, 12]),
        total_steps=chance.randint(3, 8),
        checkpoint_every=chance.choice([1, 2, 2, 3]),
        num_to_keep=chance.choice([1, 2, 2, 3, None]),
        max_failures=chance.choice([0, 1, 3]),
        rows_per_block=chance.choice([1, 4, 12, 30]),
        order=chance.choice(["images", "windows", "groups"]),
        is_torn=chance.random() < 0.5,
    )


def order_of(settings: Settings, chance: random.Random) -> Order:
    """The order of a run's images."""
    options: dict[str, Any] = {}
    if settings.order != "images":
        sizes = np.full(-(-settings.num_images // 4), 4, np.int64)
        sizes[-1] = settings.num_images - 4 * (len(sizes) - 1)
        options = {"group_sizes": sizes}
        options |= {"window_groups": 2} if settings.order == "windows" else {"rows_per_group": 4}
    return Order(settings.num_images, seed=chance.randrange(1000), **options)


class AnotherRankDied(Exception):  # noqa: N818
    """A collective fails."""


class Channel:
    """In place of a RunChannel."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.fatal: DinorayError | None = None

    def put(self, name: str, value: Any) -> None:
        self.values[name] = value

    def get(self, name: str) -> Any:
        return self.values.get(name)

    def post(self, *_: object, **__: object) -> None: ...

    def post_fatal(self, error: DinorayError) -> None:
        self.fatal = self.fatal or error


class World:
    """A store, a run in it, and its drivers, one after the other or at once."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.settings = draw(chance)
        self.time = Time()
        self.store = SimulatedStore(self.time, lambda *request: self.fate(*request))
        self.store.is_torn = self._is_written_in_place
        self.fate: Callable[[Process, str, str], Fate] = lambda *_: Fate(0.05, 0.05)
        self.history = History(
            order_of(self.settings, chance),
            global_batch_size=self.settings.global_batch_size,
            total_steps=self.settings.total_steps,
        )
        self.run = Directory(f"s3://bucket/{RUN}")
        self.jobs: list[Job] = []
        self.written: dict[str, int] = {}
        """Name of a checkpoint and number of its process -> its state's path."""
        self.counts: Counter[str] = Counter()
        """How often each dangerous state was reached."""

    def start(self, host: str, world_size: int, ended: Callable[["Job"], object]) -> "Job":
        """Start a driver; `ended(job)` is called once it has ended by itself."""
        job = Job(self, host, world_size, ended)
        self.jobs.append(job)
        return job

    def job_of(self, process: Process) -> "Job":
        return next(job for job in self.jobs if process in job.processes)

    def _is_written_in_place(self, key: str) -> bool:
        return self.settings.is_torn and not key.endswith((META, LEASE, RESULT))


class Job:
    """A driver, and what it has started in Ray."""

    def __init__(self, world: World, host: str, world_size: int, ended: Callable[["Job"], object]) -> None:
        self.world, self.host, self.world_size, self._ended = world, host, world_size, ended
        rate = world.chance.uniform(0.985, 1.015)
        self.driver = world.time.process("driver", host, rate=rate, offset=world.chance.uniform(0, 1e6))
        self.processes = [self.driver]
        self.workers: Workers | None = None
        self.worker: Process | None = None
        self.keeper: LeaseKeeper | None = None
        self.ending: str | None = None
        world.time.spawn(self.driver, self._main)

    def kill_ray(self) -> None:
        """Kill the controller and the workers."""
        for process in self.processes[1:]:
            self.world.time.kill(process)

    def _main(self) -> None:
        try:
            self.ending = self._drive()
        except (DinorayError, BrokenListError, TrainingFailedError) as error:
            self.ending = type(error).__name__
            self.world.counts[f"ended by {self.ending}"] += 1
        self.world.time.kill(self.driver)
        self._ended(self)

    def _drive(self) -> str:
        """What jobs/pretrain.py does."""
        world = self.world
        self.keeper = LeaseKeeper(world.run, tell=lambda line: None, timing=_TIMING)
        self.keeper.await_free()
        if world.run.exists(RESULT):
            return "was finished"
        world.time.sleep(world.chance.uniform(0, 4))  # PyTorch is loaded
        with self.keeper:
            self._train(self.keeper)
            self.keeper.fence.check()
            world.run.patient(PATIENCE_SECONDS).write(RESULT, b"{}")
        return "finished"

    def _train(self, keeper: LeaseKeeper) -> None:
        """What pipeline/worker/driver.py does."""
        world, channel = self.world, Channel()
        if mend_snapshot(world.run) is not None:
            world.counts["a list was mended"] += 1
        else:
            remove_leftovers(world.run)
        spec: Any = SimpleNamespace(
            run=world.run.patient(PATIENCE_SECONDS),
            channel=channel,
            num_images=world.settings.num_images,
            fence=keeper.fence,
            checkpoint=CheckpointConfig(num_to_keep=world.settings.num_to_keep or 1000, num_best_to_keep=0),
        )
        spec.check_fence = partial(WorkerSpec.check_fence, spec)
        outcome: list[Exception | None] = []
        world.time.sleep(world.chance.uniform(3, 6))  # Ray starts

        def fit() -> None:
            try:
                self._fit_once(spec)
                while take_refusal(spec) is not None:
                    world.counts["fell back from a refused checkpoint"] += 1
                    self._fit_once(spec)
                outcome.append(None)
            except Exception as error:
                outcome.append(error)

        world.time.spawn(self.driver, fit)
        try:
            while not outcome:
                keeper.check()
                if channel.fatal is not None:
                    raise channel.fatal
                world.time.sleep(2.0)
        finally:
            if self.driver.is_alive:
                self.kill_ray()
        if outcome[0] is not None:
            raise outcome[0]

    def _fit_once(self, spec: Any) -> None:
        world, errors = self.world, []
        controller = self._process("controller")
        is_over = Event(lambda: world.time)

        def run() -> None:
            try:
                settings = world.settings
                checkpoints = RayCheckpoints(self._files(spec), num_to_keep=None)
                control(
                    checkpoints,
                    lambda newest: self._start_workers(spec, newest),
                    self._end_workers,
                    sleep=world.time.sleep,
                    max_failures=settings.max_failures,
                    chance=world.chance.random,
                )
            except Exception as error:
                errors.append(error)
            is_over.set()

        world.time.spawn(controller, run)
        is_over.wait()
        if errors:
            raise errors[0]

    def _process(self, name: str) -> Process:
        process = self.world.time.process(name, self.host)
        self.processes.append(process)
        return process

    def _files(self, spec: Any) -> Files:
        """What storage/arrow_s3.py makes of Ray's requests."""
        checkpoints, guard = spec.run.child(CHECKPOINTS), partial(spec.fence.check, is_strict=True)

        def read(name: str) -> bytes | None:
            try:
                return bytes(checkpoints.read(name))
            except MissingObject:
                return None

        def delete(name: str) -> None:
            with contextlib.suppress(DinorayError):  # Ray logs what goes wrong
                guard()
                folder = checkpoints.child(name)
                for file in folder.list():
                    folder.delete(file)

        def exists(name: str) -> bool:
            return bool(checkpoints.child(name).list())

        return Files(read, checkpoints.guarded(guard).write, exists, delete)

    def _start_workers(self, spec: Any, newest: str | None) -> Workers:
        world = self.world
        world.time.sleep(world.chance.uniform(12, 20))
        self.workers = workers = Workers(self.world_size, newest)
        self.worker = process = self._process("worker")
        process.values["workers"] = workers
        world.time.spawn(process, lambda: self._work(spec, workers))
        return workers

    def _end_workers(self, workers: Workers) -> None:
        for process in self.processes:
            if process.values.get("workers") is workers:
                self.world.time.kill(process)

    def _work(self, spec: Any, workers: Workers) -> None:
        """What pipeline/worker/worker.py does."""
        if spec.channel.fatal is not None:
            workers.are_done = True
            return
        try:
            self._train_steps(spec, workers)
            workers.are_done = True
        except RefusedCheckpointError as refused:
            post_refusal(spec.channel, refused.refusal)
            workers.are_done = True
        except AssertionError:
            raise
        except Exception as error:
            if isinstance(error, DinorayError):
                spec.channel.post_fatal(error)
            elif not isinstance(error, AnotherRankDied | FileNotFoundError):
                raise
            workers.have_failed = True

    def _train_steps(self, spec: Any, workers: Workers) -> None:
        world, settings, history = self.world, self.world.settings, self.world.history
        state, quarantine = StandIn(settings.global_batch_size, settings.total_steps), Quarantine()
        if workers.newest is not None:
            meta = restore(state, spec.run, Checkpoint(f"bucket/{RUN}/{CHECKPOINTS}/{workers.newest}", None))
            quarantine = Quarantine.restored(meta)
        outputs = Outputs(world, spec)
        start = history.begin(state, workers.world_size)
        cadence = Cadence(
            settings.total_steps, log_every=1, eval_every=1000, save_every=(settings.checkpoint_every,)
        )
        agreement = Agreed()
        saver = Saver(state, quarantine, spec, outputs, agreement)  # type: ignore[arg-type]
        other = Saver(state, quarantine, spec, None, agreement.of_another_rank())  # type: ignore[arg-type]
        savers = [saver, other] if workers.world_size > 1 else [saver]
        layout = lay_out(
            range(state.step, settings.total_steps),
            world_size=workers.world_size,
            global_batch_size=settings.global_batch_size,
            image_bytes=(100 << 20) // settings.rows_per_block,
        )
        num_streams = 2 if workers.world_size % 2 == 0 else 1
        for step in batches(layout, num_streams, history.order):
            world.time.sleep(1.0)
            if workers.another_rank_died:
                raise AnotherRankDied
            history.trained(start, state.step, step)
            state.train(np.concatenate([batch.positions for batch in step]).tolist(), start)
            due = cadence.due(state.step)
            if due.saves:
                history.saved(state, start)
                world.written[f"{checkpoint_name(state.step)} {world.time.current.process.pid}"] = (
                    state.numbers[1]
                )
                for one in savers:
                    one.save(is_last=due.ends, waits_for_storage=due.ends)
                assert saver.saved_step == other.saved_step or len(savers) == 1, (
                    "one rank reports, another not"
                )
            for one in savers:
                one.check()
        saver.wait()
        for upload in workers.uploads:
            join(world.time, upload)


class Outputs:
    """In place of the worker's Outputs, as far as saving uses it."""

    def __init__(self, world: World, spec: Any) -> None:
        self._world, self._spec = world, spec
        self.scores = SimpleNamespace(by_step={})
        spec.check_fence()

    def sync_log(self) -> Callable[[], object]:
        self._spec.check_fence()
        return lambda: None

    def restart_meters(self) -> None: ...

    def note(self, text: str) -> None:
        if "is not written yet" in text:
            self._world.counts["a save was left out, as the one before was not written"] += 1
