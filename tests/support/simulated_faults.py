"""What goes wrong in a simulated run, drawn from a seed; what must hold all the same; and how often it came to that.

Most faults strike at a moment that is drawn from MOMENTS, because few of them are met by chance. After the last one
the run must come to its end.
"""

import random
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from lease_simulation import TIMEOUT_SECONDS, Fate
from simulated_modules import RUN, under_way
from simulated_run import Job, World
from simulated_store import LATE_SECONDS, Action
from simulated_time import Process

from dinoray.pipeline.ray_private.train import BadSnapshotError, listed
from dinoray.pipeline.storage.lease import Record
from dinoray.pipeline.storage.run_dir import (
    CHECKPOINTS,
    LEASE,
    META,
    RESULT,
    SNAPSHOT,
    STUDENT,
    TEACHER,
    TRAIN_STATE,
)

_FILES = (STUDENT, TEACHER, TRAIN_STATE, META)
_LIMIT_SECONDS = 6000.0
_HOSTS = "abc"
_LATE_WRITE_SECONDS = TIMEOUT_SECONDS + 0.2
"""How long after a takeover a worker may still send what it was about to write: it had looked at the lease before."""


class Moment(NamedTuple):
    """An action with a file at which a fault strikes."""

    phase: str
    operation: str
    file: str


MOMENTS = [
    Moment("sent", "delete", META),  # a save begins
    Moment("done", "put", STUDENT),  # in the middle of an upload
    Moment("sent", "put", META),
    Moment("done", "put", META),  # between upload and commit
    Moment("sent", "put", SNAPSHOT),
    Moment("torn", "put", SNAPSHOT),
    Moment("done", "put", SNAPSHOT),  # committed; old checkpoints are there still
    Moment("done", "delete", TEACHER),  # in the middle of the deletion of one
    Moment("sent", "put", LEASE),  # a renewal, or a lease is being taken
    Moment("done", "put", LEASE),
    Moment("sent", "get", STUDENT),  # a restore
    Moment("sent", "put", RESULT),
]


class Storm:
    """Simulates one run, with the faults of a seed."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self.world = World(self._chance)
        self.counts: Counter[str] = self.world.counts
        self._left = self._chance.randint(1, 4)
        """Faults that are still to come."""
        self._moment, self._skip = MOMENTS[0], 0
        self._next_fault()
        self._noise = self._chance.choice([0.0, 0.0, 0.02, 0.1])
        self._refused_until = 0.0
        self._cut_off: dict[str, float] = {}
        """Host -> until when the store gets none of its requests."""
        self._origin: dict[str, int | None] = {}
        """File of a checkpoint -> the process that wrote it; None for one that is torn or damaged."""
        self._committed: dict[str, int] = {}
        """Name -> path of the state that was committed last under it."""
        self._damaged: set[str] = set()
        self._renewing: set[Process] = set()
        self._deleting: set[Process] = set()
        self._taken: list[tuple[float, str]] = []
        """When drivers have taken the lease, and the lease's id."""
        self._is_done = False
        store = self.world.store
        store.watchers.append(self._watch)
        store.is_refused = self._is_refused
        self.world.fate = self._fate

    def run(self) -> Counter[str]:
        """Simulate the run to its end; return how often each dangerous state was reached. Raises AssertionError."""
        world = self.world
        with under_way(world):
            world.time.at(0.0, self._supervise)
            world.time.run(lambda: self._is_done, limit=_LIMIT_SECONDS)
        assert self._is_done, f"the run has not ended: {[job.ending for job in world.jobs]}"
        self._check_end()
        return self.counts

    # Drivers

    def _supervise(self) -> None:
        """Start the run again once no driver is there, and once more after it has ended."""
        world = self.world
        if not any(job.driver.is_alive for job in world.jobs):
            is_finished = f"{RUN}/{RESULT}" in world.store.objects
            if is_finished and world.jobs[-1].ending == "was finished":
                self._is_done = True
                return
            self._start(self._chance.choice(_HOSTS))
        world.time.at(world.time.now + self._chance.uniform(1, 30), self._supervise)

    def _start(self, host: str) -> None:
        self.world.start(host, self._chance.choice(self.world.settings.world_sizes()), lambda job: None)

    def _start_elsewhere(self, job: Job, within: float) -> None:
        """Have somebody start the run on another host."""
        host = self._chance.choice([one for one in _HOSTS if one != job.host])
        time = self.world.time
        time.at(time.now + self._chance.uniform(0, within), lambda: self._start(host))

    # Faults

    def _next_fault(self) -> None:
        self._moment, self._skip = self._chance.choice(MOMENTS), self._chance.choice([0, 0, 1, 3])

    def _strike(self, process: Process) -> None:
        """Let a fault happen to the job of a process."""
        job = self.world.job_of(process)
        kinds: list[Callable[[Job], None]] = [
            self._kill_driver,
            self._kill_driver,
            self._kill_machine,
            self._kill_worker,
            self._kill_another_rank,
            self._stop_driver,
            self._cut_off_host,
            self._start_another,
            self._refuse_writes,
            *[self._damage] * 3,
        ]
        self._chance.choice(kinds)(job)

    def _kill_driver(self, job: Job) -> None:
        """Ray's processes end when Ray has noticed."""
        self._count_kill(job)
        time = self.world.time
        time.kill(job.driver)
        time.at(time.now + self._chance.choice([0.1, 5.0, 40.0]), job.kill_ray)

    def _kill_machine(self, job: Job) -> None:
        self._count_kill(job)
        for process in list(job.processes):
            self.world.time.kill(process)

    def _kill_worker(self, job: Job) -> None:
        if job.workers is not None and job.worker is not None and job.worker.is_alive:
            self._count_upload(job, "a worker was killed")
            job.workers.have_failed = True
            self.world.time.kill(job.worker)

    def _kill_another_rank(self, job: Job) -> None:
        if job.workers is not None and job.workers.world_size > 1:
            job.workers.another_rank_died = True
            self.counts["another rank died"] += 1

    def _stop_driver(self, job: Job) -> None:
        job.driver.stopped_until = self.world.time.now + self._chance.uniform(20, 90)
        self._start_elsewhere(job, 5)

    def _cut_off_host(self, job: Job) -> None:
        self._cut_off[job.host] = self.world.time.now + self._chance.uniform(20, 90)
        self._start_elsewhere(job, 5)

    def _start_another(self, job: Job) -> None:
        for _ in range(2):
            self._start_elsewhere(job, 1)

    def _refuse_writes(self, job: Job) -> None:
        self._refused_until = self.world.time.now + self._chance.uniform(5, 60)

    def _damage(self, job: Job, tries: int = 20) -> None:
        """Damage the newest committed checkpoint once there is a whole one besides, and have the run resumed."""
        time, names = self.world.time, self._listed()
        if not job.driver.is_alive or not tries:
            return
        if len(names) < 2 or not all(map(self._is_whole, names[-2:])):
            time.at(time.now + 1.0, lambda: self._damage(job, tries - 1))
            return
        file, kind = (
            self._chance.choice(_FILES),
            self._chance.choice(["flipped", "flipped", "cut", "missing"]),
        )
        key, objects = f"{RUN}/{CHECKPOINTS}/{names[-1]}/{file}", self.world.store.objects
        data = bytearray(objects[key])
        if kind == "missing":
            del objects[key]
        elif kind == "cut":
            objects[key] = bytes(data[: self._chance.randrange(len(data))])
        else:  # the last bytes of weights are tensors, without which a file can be read all the same
            data[-self._chance.randint(1, 16 if file in (STUDENT, TEACHER) else len(data))] ^= 1
            objects[key] = bytes(data)
        self._origin[key] = None
        self._damaged.add(names[-1])
        self.counts[f"the newest checkpoint was damaged: {kind}"] += 1
        self._chance.choice([self._kill_machine, self._kill_worker])(job)

    def _fate(self, process: Process, operation: str, key: str) -> Fate:
        if self._cut_off.get(process.host, 0.0) > self.world.time.now:
            return Fate(is_lost=True)
        chance = self._chance
        if not self._left or chance.random() >= self._noise:
            return Fate(chance.uniform(0.02, 0.1), chance.uniform(0.02, 0.1))
        late = 50.0 if key.endswith(LEASE) else LATE_SECONDS
        return chance.choice(
            [
                Fate(is_lost=True),
                Fate(0.1, is_answer_lost=True),
                Fate(chance.uniform(0, late), 0.1),
                Fate(0.1, chance.uniform(0, 12)),
            ]
        )

    def _is_refused(self, process: Process, operation: str) -> bool:
        return operation in ("put", "delete") and self.world.time.now < self._refused_until

    # What must hold

    def _watch(self, action: Action) -> None:
        try:
            self._check_holders()
            self._note(action)
        except AssertionError as error:  # not to be caught by the code that sends the request
            self.world.time.fail(error)
        if self._left and self._is_at(action):
            if self._skip:
                self._skip -= 1
                return
            self._left -= 1
            self._next_fault()
            self.world.time.at(self.world.time.now, lambda: self._strike(action.process))

    def _is_at(self, action: Action) -> bool:
        return self._moment == (action.phase, action.operation, action.key.rpartition("/")[2])

    def _check_holders(self) -> None:
        now = self.world.time.now
        sure = [
            job
            for job in self.world.jobs
            if job.driver.is_alive
            and job.keeper is not None
            and job.keeper._lease.is_valid(job.driver.offset + job.driver.rate * now)
        ]
        assert len(sure) <= 1, "two drivers hold the lease at once"

    def _note(self, action: Action) -> None:
        process, operation, key, phase = action
        name, file = key.split("/")[-2:]
        if phase == "sent":
            self._note_sent(process, operation, key)
        elif phase == "torn":
            self._origin[key] = None
        elif operation == "put":
            self._origin[key] = process.pid
            meta = f"{RUN}/{CHECKPOINTS}/{name}/{META}"
            if file in _FILES:
                assert self._origin.get(meta, process.pid) in (process.pid, None), (
                    f"{META} is not that of {key}"
                )
            if file == META:
                self._damaged.discard(name)
                assert self._is_whole(name), f"{META} of {name} is there before the other files"
            if file == SNAPSHOT:
                self._note_commit(process)
            if file == LEASE:
                self._renewing.discard(process)
                self._note_lease()
        elif operation == "delete":
            self._origin.pop(key, None)

    def _note_sent(self, process: Process, operation: str, key: str) -> None:
        if operation == "put" and key.endswith(LEASE):
            self._renewing.add(process)
        if process.name == "controller":
            (self._deleting.add if operation == "delete" else self._deleting.discard)(process)
        if operation not in ("put", "delete") or process.name == "driver" or not self._taken:
            return
        since, holder = self._taken[-1]
        keeper = self.world.job_of(process).keeper
        assert keeper is not None
        if keeper.fence.id != holder:
            self.counts["a write after a takeover, that was about to be made"] += 1
            # Ray deletes a checkpoint with several requests, of which the first is guarded.
            is_bounded = process.name != "controller" or operation != "delete"
            late = self.world.time.now - since
            assert late < _LATE_WRITE_SECONDS or not is_bounded, (
                f"{process.name} {operation} {key}, {late:.0f} s after it was taken over"
            )

    def _note_commit(self, process: Process) -> None:
        names = self._listed()
        if process.name == "controller":
            # A list is also written again, once its checkpoint is committed and a fault has damaged it.
            is_whole = self._is_whole(names[-1]) or names[-1] in self._damaged
            assert is_whole, f"{names[-1]} is committed, and is not whole"
        for name in filter(self._is_whole, names):
            writer = self._origin[f"{RUN}/{CHECKPOINTS}/{name}/{META}"]
            self._committed[name] = self.world.written[f"{name} {writer}"]

    def _note_lease(self) -> None:
        record = Record.decode(self.world.store.objects[f"{RUN}/{LEASE}"])
        assert record is not None
        if self._taken and record.holder.id == self._taken[-1][1]:
            return
        for job in self.world.jobs:
            if job.keeper is not None and self._taken and job.keeper.fence.id == self._taken[-1][1]:
                self.counts["the lease was taken over while its holder lived"] += job.driver.is_alive
                others = any(process.is_alive for process in job.processes[1:])
                self.counts["the lease was taken over while its holder's workers lived"] += others
        self._taken.append((self.world.time.now, record.holder.id))

    def _listed(self) -> list[str]:
        """Names in Ray's list; [] if there is none."""
        try:
            return listed(self.world.store.objects[f"{RUN}/{CHECKPOINTS}/{SNAPSHOT}"])
        except (KeyError, BadSnapshotError):
            return []

    def _is_whole(self, name: str) -> bool:
        """Whether all files of a checkpoint are there, as one process wrote them."""
        origins = {self._origin.get(f"{RUN}/{CHECKPOINTS}/{name}/{file}") for file in _FILES}
        return len(origins) == 1 and None not in origins

    def _check_end(self) -> None:
        """Check the steps that led to the checkpoint that the run has ended with."""
        world = self.world
        starts = world.history.check_committed(self._committed[self._listed()[-1]])
        self.counts["resumed with another world size"] += len({start.world_size for start in starts}) > 1
        self.counts["resumed"] += len(starts) > 1

    # How often it came to that

    def _count_kill(self, job: Job) -> None:
        self._count_upload(job, "a driver was killed")
        if job.driver in self._renewing:
            self.counts["a driver was killed during a renewal"] += 1
        if any(process in self._deleting for process in job.processes):
            self.counts["a driver was killed during a deletion"] += 1

    def _count_upload(self, job: Job, what: str) -> None:
        worker = job.worker
        if worker is None or not worker.is_alive:
            return
        names = {key.split("/")[-2] for key, pid in self._origin.items() if pid == worker.pid}
        for name in names - set(self._listed()):
            whole = self._is_whole(name)
            self.counts[f"{what} {'between upload and commit' if whole else 'during an upload'}"] += 1
