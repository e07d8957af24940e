"""Processes and threads on a simulated clock: one thread runs at a time, and the events alone decide which.

Code that blocks (sleeps, waits, sends requests) runs unchanged: what it blocks on is replaced by what is here. A run of
minutes takes milliseconds, and the same events give the same run. Threads are greenlets, which take turns in one real
thread.
"""

import heapq
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from greenlet import getcurrent, greenlet

_MAX_EVENTS = 200_000


class Killed(BaseException):
    """Raised in the threads of a process that was killed: they unwind, and what they do meanwhile has no effect."""


@dataclass(eq=False)
class Process:
    """A process of a host, with a clock of its own."""

    name: str
    host: str
    pid: int
    rate: float = 1.0
    offset: float = 0.0
    is_alive: bool = True
    stopped_until: float = 0.0
    """Until when it is stopped, as by SIGSTOP or a suspended machine."""
    values: dict[str, Any] = field(default_factory=dict)
    """What modules keep once a process."""


class Task:
    """A thread of a process."""

    def __init__(self, process: Process, run: Callable[[], object], hub: greenlet) -> None:
        self.process, self._run = process, run
        self.thread = greenlet(self._body, hub)
        self.is_over = False
        self.error: BaseException | None = None
        self.block = 0
        """Number of the block that it is in: an event that is to end another one does nothing."""
        self.waiting: list[Callable[..., None]] = []
        """Called when it is over."""
        self.is_joined = False
        """Whether its error is raised by a thread that waits for it."""

    def _body(self, _: object) -> None:
        try:
            if self.process.is_alive:
                self._run()
        except Killed:
            pass
        except BaseException as error:
            self.error = error
            if not self.is_joined:
                raise
        finally:
            self.is_over = True
            for call in self.waiting:
                call()


class Time:
    """The events of one simulation."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._order, self._blocks, self._pids = itertools.count(), itertools.count(1), itertools.count(100)
        self._hub = getcurrent()
        self._nobody = Task(Process("nobody", "none", 0), lambda: None, self._hub)
        self.current = self._nobody
        self._tasks: list[Task] = []

    def process(self, name: str, host: str, *, rate: float = 1.0, offset: float = 0.0) -> Process:
        """A new process without threads."""
        return Process(name, host, next(self._pids), rate, offset)

    def run(self, until: Callable[[], bool], *, limit: float) -> None:
        """Let events happen until `until()`, at most for `limit` seconds; then end all threads.

        Raises what a thread raised.
        """
        try:
            while not until() and self.now < limit:
                self.now, number, event = heapq.heappop(self._events)
                assert number < _MAX_EVENTS, "it does not come to an end"
                event()
        finally:
            for task in self._tasks:
                task.process.is_alive = False
            for task in self._tasks:
                if not task.is_over:
                    self._resume(task, None)

    def at(self, when: float, event: Callable[[], object]) -> None:
        """Call `event` at a time, between two actions of threads."""
        heapq.heappush(self._events, (when, next(self._order), event))

    def fail(self, error: BaseException) -> None:
        """End the simulation with an error, whatever thread is running."""

        def failed() -> None:
            raise error

        self.at(self.now, failed)

    def spawn(self, process: Process, run: Callable[[], object]) -> Task:
        """Start a thread of a process."""
        task = Task(process, run, self._hub)
        self._tasks.append(task)
        task.block = next(self._blocks)
        self._wake(self.now, task, task.block, None)
        return task

    def kill(self, process: Process) -> None:
        """Kill a process: its threads do nothing more. Requests that it has sent are on their way."""
        process.is_alive = False
        process.stopped_until = 0.0
        for task in self._tasks:
            if task.process is process and not task.is_over:
                self._wake(self.now, task, task.block, None)

    def block(self, arrange: Callable[[Callable[..., None]], object]) -> Any:
        """Block the current thread; return the value that `wake(value, after)` gets, `after` seconds later.

        `arrange(wake)` is called first, to have it called.
        """
        me = self.current
        if not me.process.is_alive:
            raise Killed
        number = me.block = next(self._blocks)

        def wake(value: Any = None, after: float = 0.0) -> None:
            self._wake(self.now + after, me, number, value)

        arrange(wake)
        value = self._hub.switch()
        if not me.process.is_alive:
            raise Killed
        return value

    def sleep(self, seconds: float) -> None:
        """Sleep, by the clock of the current process."""
        rate = self.current.process.rate
        self.block(lambda wake: wake(None, max(0.0, seconds) / rate))

    def clock(self) -> float:
        """What the clock of the current process shows."""
        process = self.current.process
        return process.offset + process.rate * self.now

    def _wake(self, when: float, task: Task, number: int, value: Any) -> None:
        def event() -> None:
            if task.is_over or task.block != number:
                return
            if task.process.stopped_until > self.now:
                self.at(task.process.stopped_until, event)
            else:
                self._resume(task, value)

        self.at(when, event)

    def _resume(self, task: Task, value: Any) -> None:
        self.current = task
        task.thread.switch(value)
        self.current = self._nobody


class Clocked:
    """In place of the modules `time` and `threading`, and of thread pools, in modules under test."""

    def __init__(self, time: Callable[[], Time]) -> None:
        """`time` returns the simulation under way."""
        self._time = time

    def sleep(self, seconds: float) -> None:
        self._time().sleep(seconds)

    def monotonic(self) -> float:
        return self._time().clock()

    time = monotonic

    def strftime(self, *_: object) -> str:
        return "12:00:00"

    def localtime(self, *_: object) -> None:
        return None

    def Event(self) -> "Event":  # noqa: N802
        return Event(self._time)

    def Thread(self, target: Callable[[], object], **_: object) -> "Thread":  # noqa: N802
        return Thread(self._time, target)

    def ThreadPoolExecutor(self, _: int) -> "Pool":  # noqa: N802
        return Pool(self._time)


class Event:
    """In place of threading.Event."""

    def __init__(self, time: Callable[[], Time]) -> None:
        self._time, self._is_set = time, False
        self._waiting: list[Callable[..., None]] = []

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        for wake in self._waiting:
            wake()
        self._waiting.clear()

    def clear(self) -> None:
        self._is_set = False

    def wait(self, timeout: float | None = None) -> bool:
        def arrange(wake: Callable[..., None]) -> None:
            self._waiting.append(wake)
            if timeout is not None:
                wake(None, timeout)

        if not self._is_set:
            self._time().block(arrange)
        return self._is_set


class Thread:
    """In place of threading.Thread."""

    def __init__(self, time: Callable[[], Time], target: Callable[[], object]) -> None:
        self._time, self._target = time, target
        self._task: Task | None = None

    def start(self) -> None:
        time = self._time()
        self._task = time.spawn(time.current.process, self._target)

    def is_alive(self) -> bool:
        return self._task is not None and not self._task.is_over

    def join(self, timeout: float | None = None) -> None:
        assert self._task is not None
        join(self._time(), self._task, timeout)


class Pool:
    """In place of concurrent.futures.ThreadPoolExecutor."""

    def __init__(self, time: Callable[[], Time]) -> None:
        self._time = time

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None: ...

    def map(self, call: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        time, results = self._time(), {}

        def run(number: int, item: Any) -> None:
            results[number] = call(item)

        tasks = []
        for number, item in enumerate(items):
            task = time.spawn(time.current.process, lambda n=number, i=item: run(n, i))
            task.is_joined = True
            tasks.append(task)
        for task in tasks:
            join(time, task)
        for task in tasks:
            if task.error is not None:
                raise task.error
        return [results[number] for number in range(len(tasks))]


def join(time: Time, task: Task, timeout: float | None = None) -> None:
    """Return when a thread is over, or after `timeout` seconds."""

    def arrange(wake: Callable[..., None]) -> None:
        task.waiting.append(wake)
        if timeout is not None:
            wake(None, timeout)

    if not task.is_over:
        time.block(arrange)
