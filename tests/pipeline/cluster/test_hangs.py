"""Which train worker hangs, when that is said, and when it is ended; the clock is the test's."""

from dataclasses import replace
from typing import Any

import pytest

from dinoray.pipeline.cluster.hangs import SIGN_SECONDS, SILENT_SECONDS, STUCK_SECONDS, HangWatch, Sign

LIMIT = 120.0


class Run:
    """Train workers that send signs, each until it is stopped, and the lines on them with their times."""

    def __init__(self, workers: int) -> None:
        self.seconds, self.number = 0.0, 0
        self.watch = HangWatch(LIMIT, now=lambda: self.seconds)
        self.signs = {rank: Sign(0, f"10.0.0.{rank}", f"n{rank}", 100 + rank, "1") for rank in range(workers)}
        self.stopped: set[int] = set()
        self.lines: list[tuple[float, str]] = []
        self.ended: list[tuple[float, int]] = []

    def set(self, *ranks: int, **facts: Any) -> None:
        for rank in ranks:
            self.signs[rank] = replace(self.signs[rank], **facts)

    def pass_(self, seconds: float) -> None:
        end = self.seconds + seconds
        while self.seconds < end:
            self.seconds += SIGN_SECONDS
            self.number += 1
            for rank, sign in self.signs.items():
                if rank not in self.stopped:
                    self.signs[rank] = replace(sign, number=self.number, seconds=sign.seconds + SIGN_SECONDS)
            found = self.watch.look(dict(self.signs))
            self.lines += [(self.seconds, line) for line in found.lines]
            if found.to_end:
                self.ended.append((self.seconds, found.to_end.pid))


def test_workers_that_send_signs_and_make_steps_do_not_hang() -> None:
    run = Run(2)
    for step in range(100):
        run.set(0, 1, step=step, doing="trains", seconds=0)
        run.pass_(STUCK_SECONDS - SIGN_SECONDS)
    assert run.lines == run.ended == []


@pytest.mark.parametrize("doing", ["starts", "waits for images", "evaluates", "saves"])
def test_what_may_take_long_does_not_hang(doing: str) -> None:
    run = Run(2)
    run.set(0, 1, doing=doing)
    run.pass_(10 * LIMIT)
    assert run.lines == run.ended == []


def test_workers_that_wait_for_one_that_gets_no_images_do_not_hang() -> None:
    run = Run(3)
    run.set(0, 1, step=40, doing="trains", seconds=0)
    run.set(2, step=40, doing="waits for images", seconds=0)
    run.pass_(2 * LIMIT)
    assert run.lines == run.ended == []
    waiting = run.watch.waits_for_images()
    assert waiting is not None
    assert (waiting.pid, waiting.step, waiting.seconds) == (102, 40, 2 * LIMIT)
    # It has images for the next step, which another one never reaches.
    run.set(2, step=41)
    run.pass_(SIGN_SECONDS)
    assert [line for _, line in run.lines if "is at step 41 for" in line]
    assert run.watch.waits_for_images() is None


def test_a_worker_without_signs_is_named_within_a_minute_and_ended_in_time() -> None:
    run = Run(3)
    run.set(0, 1, 2, step=40, doing="waits for images")
    run.pass_(20)
    run.stopped = {1}
    run.pass_(2 * LIMIT)
    (named_at, named), (ended_at, ended) = run.lines
    assert named == (
        "warning: train worker 1 on node 10.0.0.1 (process 101) has given no sign for 30 s, after step 40; after "
        "resources.hang_seconds=120 it is replaced"
    )
    assert named_at - 20 <= SILENT_SECONDS + SIGN_SECONDS
    assert ended == "ending train worker 1 on node 10.0.0.1, which hangs for 120 s"
    assert run.ended == [(ended_at, 101)]
    assert ended_at - 20 <= LIMIT + SIGN_SECONDS


def test_of_workers_at_one_step_the_one_that_is_behind_is_named_with_its_stack() -> None:
    run = Run(3)
    run.set(0, 2, step=41, doing="trains", stack="all_reduce (a.py:1)")
    run.set(1, step=40, doing="trains", stack="loop (b.py:2)")
    run.pass_(2 * LIMIT)
    assert [line for _, line in run.lines] == [
        "warning: train worker 1 on node 10.0.0.1 (process 101) is at step 41 for 60 s: loop (b.py:2); after "
        "resources.hang_seconds=120 it is replaced",
        "ending train worker 1 on node 10.0.0.1, which hangs for 120 s",
    ]
    assert [pid for _, pid in run.ended] == [101]


def test_a_collective_that_never_returns_ends_one_of_all_workers() -> None:
    run = Run(2)
    run.set(0, 1, step=40, doing="trains")
    run.pass_(LIMIT)
    assert [pid for _, pid in run.ended] == [100]
    assert len(run.lines) == 3


def test_a_worker_that_goes_on_is_named_anew_when_it_hangs_again() -> None:
    run = Run(2)
    for _ in range(2):
        run.stopped = {1}
        run.pass_(SILENT_SECONDS + SIGN_SECONDS)
        run.stopped = set()
        run.pass_(LIMIT)
    assert [line.split(",")[0][-8:] for _, line in run.lines] == ["for 30 s", "for 30 s"]
    assert run.ended == []


def test_a_sign_that_comes_while_workers_end_is_none_of_those_that_start() -> None:
    run = Run(2)
    run.watch.forget()
    run.pass_(SIGN_SECONDS)  # the last signs of both
    run.stopped = {1}
    run.set(0, pid=200)
    run.watch.placed(1)
    run.pass_(2 * LIMIT)
    assert run.lines == run.ended == []


def test_workers_that_ended_are_not_missed() -> None:
    run = Run(2)
    run.pass_(20)
    run.stopped = {0, 1}
    run.watch.forget()
    run.pass_(2 * LIMIT)
    assert run.lines == run.ended == []
    run.set(0, pid=200)  # one of those that start again
    run.pass_(LIMIT + SILENT_SECONDS)
    assert [pid for _, pid in run.ended] == [200]
