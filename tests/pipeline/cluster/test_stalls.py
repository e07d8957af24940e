"""What a run says while no images come, when it says so, and how long it waits; the clock is the test's."""

from dataclasses import replace

import pytest

from dinoray.models.errors import ResourceError
from dinoray.pipeline.cluster.hangs import SIGN_SECONDS, Sign
from dinoray.pipeline.cluster.stalls import Flow, StallWatch

STALL, MINUTES, STORE_SECONDS = 60.0, 10.0, 300.0
WORKS = Flow(running=4, pending=0, in_work=8, made=100, store_bytes=100_000_000, store_limit=1_000_000_000)


class Run:
    """A train worker that waits for images, and pools whose state the test changes."""

    def __init__(self, flow: Flow | None, stall_seconds: float = STALL) -> None:
        self.seconds, self.flow, self.cpus = 0.0, flow, (1.0, 8.0)
        self.waiting: Sign | None = Sign(0, "10.0.0.1", "n", 1, "1", step=9, doing="waits for images")
        self.lines: list[tuple[float, str]] = []
        self.watch = StallWatch(
            stall_seconds,
            MINUTES,
            STORE_SECONDS,
            flow=lambda: self.flow,
            cpus=lambda: self.cpus,
            now=lambda: self.seconds,
        )

    def pass_(self, seconds: float, *, makes: int = 0) -> "Run":
        end = self.seconds + seconds
        while self.seconds < end:
            self.seconds += SIGN_SECONDS
            if self.waiting:
                self.waiting = replace(self.waiting, seconds=self.waiting.seconds + SIGN_SECONDS)
            if self.flow:
                self.flow = self.flow._replace(made=self.flow.made + makes)
            if line := self.watch.look(self.waiting):
                self.lines.append((self.seconds, line))
        return self


@pytest.mark.parametrize(
    ("flow", "why"),
    [
        (None, "the stream has not begun, 1 of 8 CPUs are free"),
        (
            WORKS._replace(running=0, pending=4, in_work=0, made=0),
            "0 of 4 augment actors run, 1 of 8 CPUs are free",
        ),
        (WORKS._replace(made=0), "4 augment actors work at 8 blocks and finish none"),
        (
            WORKS._replace(in_work=0, made=0, store_bytes=950_000_000),
            "the object store is full: the stream uses 950 of 1000 MB of the object store that it may use",
        ),
        (
            WORKS._replace(in_work=0, made=0),
            "4 augment actors have no block to work at, the stream uses 100 of 1000 MB of the object store",
        ),
    ],
)
def test_it_says_why_no_images_come_and_again_every_30_seconds(flow: Flow | None, why: str) -> None:
    assert Run(flow).pass_(120).lines == [
        (seconds, f"warning: no images for {seconds:.0f} s at step 10: {why}") for seconds in (60, 90, 120)
    ]


def test_a_slow_stream_is_no_stall() -> None:
    assert Run(WORKS).pass_(60 * MINUTES + STORE_SECONDS + 60, makes=1).lines == []


def test_a_worker_that_trains_is_no_stall_however_little_the_pool_makes() -> None:
    run = Run(WORKS)
    run.waiting = None
    assert run.pass_(60 * MINUTES + STORE_SECONDS + 60).lines == []


def test_a_second_wait_is_told_as_soon_as_the_first() -> None:
    run = Run(WORKS, stall_seconds=10).pass_(15)
    sign, run.waiting = run.waiting, None
    run.pass_(5)
    assert sign
    run.waiting = replace(sign, seconds=0)
    run.flow = WORKS._replace(made=101)
    run.pass_(15)
    assert [seconds for seconds, _ in run.lines] == [15, 35]


def test_it_counts_from_the_last_block_not_from_the_last_step() -> None:
    run = Run(WORKS).pass_(100, makes=1).pass_(55)
    assert run.lines == []
    assert run.pass_(10).lines == [
        (160, "warning: no images for 60 s at step 10: 4 augment actors work at 8 blocks and finish none")
    ]


def test_a_wait_that_ends_begins_anew() -> None:
    run = Run(WORKS._replace(in_work=0)).pass_(200)
    run.waiting, waited = None, run.waiting
    run.pass_(5)
    run.waiting, run.lines = waited and replace(waited, seconds=0), []
    assert run.pass_(65).lines[0][0] == 265


@pytest.mark.parametrize(
    ("flow", "seconds"),
    [
        (WORKS._replace(running=0, pending=4, in_work=0, made=0), 60 * MINUTES),
        # Storage may not answer for so long, which has an error of its own.
        (WORKS._replace(made=0), 60 * MINUTES + STORE_SECONDS),
    ],
)
def test_the_longest_wait_ends_the_run_with_what_helps(flow: Flow, seconds: float) -> None:
    run = Run(flow).pass_(seconds - SIGN_SECONDS)
    with pytest.raises(
        ResourceError, match=rf"resources\.wait_for_nodes_minutes=10: no images have come for {seconds:.0f} s"
    ):
        run.pass_(SIGN_SECONDS)
