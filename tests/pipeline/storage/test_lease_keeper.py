"""A lease that is held: renewed, refused to others, kept through an outage, lost, given back; and who has ended."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from faults import FaultProxy
from jobs_processes import wait_until
from leases import SHORT, ignored_conditions, record, stored, write
from paths import ROOT
from servers import S3Server

from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.lease import InUseError, LostLeaseError
from dinoray.pipeline.storage.lease_keeper import LeaseKeeper, is_gone, look, this_process


def keeper_of(directory: Directory) -> LeaseKeeper:
    return LeaseKeeper(directory, tell=lambda line: None, timing=SHORT)


def renewals(directory: Directory) -> int:
    found = stored(directory)
    assert found is not None
    return found.renewals


def test_a_second_driver_is_refused_and_gets_the_lease_when_the_first_has_ended(directory: Directory) -> None:
    with LeaseKeeper(directory, tell=print, job="boost-a1", timing=SHORT) as first:
        with pytest.raises(InUseError) as refused:
            keeper_of(directory).await_free()
        name = f"{os.uname().nodename} pid {os.getpid()} (job boost-a1) since 20"
        assert str(refused.value).startswith(f"{directory.uri} is in use by {name}")
        assert str(refused.value).endswith(" UTC; stop that one, or wait until it ends")
        assert refused.value.exit_code == 4
        wait_until(lambda: renewals(directory) > 1)
        first.check()
        first.fence.check()
        assert look(directory) == (stored(directory).holder, True)  # type: ignore[union-attr]
    assert look(directory) is None
    with keeper_of(directory) as second:
        second.fence.check()
        with pytest.raises(LostLeaseError, match="was taken over by"):
            first.fence.check()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_lease_is_given_back_also_upon_an_error(error: type[BaseException], tmp_path: Path) -> None:
    directory = Directory(str(tmp_path))
    with pytest.raises(error), keeper_of(directory) as first:
        raise error
    found = stored(directory)
    assert found is not None
    assert found.is_given_back
    with pytest.raises(LostLeaseError, match="this run has ended; run the same command"):
        first.fence.check()


def test_a_driver_elsewhere_that_renews_is_known_to_live(directory: Directory) -> None:
    write(directory, record("b"))
    lines: list[str] = []

    def renew(line: str) -> None:
        lines.append(line)
        write(directory, record("b", renewals=1))

    with pytest.raises(InUseError, match=r"host-b pid 7 since 2023-11-14 22:13:20 UTC; stop that one"):
        LeaseKeeper(directory, tell=renew, timing=SHORT).await_free()
    (line,) = lines
    assert "is held by host-b pid 7 since 2023-11-14 22:13:20 UTC, which may have ended: waiting" in line


def test_the_lease_of_a_driver_elsewhere_that_was_lost_is_taken_over_after_its_term(
    directory: Directory,
) -> None:
    write(directory, record("b"))
    began = time.monotonic()
    with keeper_of(directory) as taken:
        assert time.monotonic() - began > SHORT.term
        taken.fence.check()


def test_who_is_taken_over_stops_and_leaves_the_record_alone(directory: Directory) -> None:
    with keeper_of(directory) as first:
        write(directory, record("b"))
        with pytest.raises(LostLeaseError, match="taken over by host-b pid 7 at 2023") as lost:
            first.fence.check()
        assert lost.value.exit_code == 4
        assert "; leave it to that one, or stop that one and run the same command again" in str(lost.value)

        def is_noticed() -> bool:
            with contextlib.suppress(LostLeaseError):
                first.check()
                return False
            return True

        wait_until(is_noticed)
    assert stored(directory) == record("b")


@pytest.mark.s3
@pytest.mark.parametrize("is_taken_over", [False, True])
def test_an_outage_costs_the_lease_only_if_another_driver_took_it(
    is_taken_over: bool, proxy: FaultProxy, bucket: str, s3: S3Server
) -> None:
    directory = Directory(f"s3://{bucket}/runs/run")
    with keeper_of(directory) as first:
        wait_until(lambda: renewals(directory) > 0)
        proxy.go_down()
        if is_taken_over:
            s3.client().put_object(Bucket=bucket, Key="runs/run/lease.json", Body=record("b").encode())
        wait_until(lambda: not first.is_sure)
        first.check()
        first.fence.check()
        proxy.come_up()
        if is_taken_over:
            with pytest.raises(LostLeaseError):
                wait_until(lambda: first.check())
        else:
            wait_until(lambda: first.is_sure)
            first.fence.check()


@pytest.mark.s3
def test_a_store_that_ignores_conditions_is_told_of_once_and_used(bucket: str) -> None:
    directory, lines = Directory(f"s3://{bucket}/runs/run"), []
    with ignored_conditions(), LeaseKeeper(directory, tell=lines.append, timing=SHORT) as first:
        (line,) = lines
        assert line.startswith(f"warning: the storage of {directory.uri} has no conditional writes")
        wait_until(lambda: renewals(directory) > 1)
        first.check()
        with pytest.raises(InUseError):
            keeper_of(directory).await_free()
    assert len(lines) == 1


def test_a_process_has_ended_if_its_pid_is_free_or_anothers() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        stat = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        child = replace(this_process(), pid=process.pid, started=stat[19])
        assert is_gone(child) is False
        assert is_gone(replace(child, started="1")) is True
        assert is_gone(replace(child, machine="another")) is None
        assert is_gone(replace(child, machine="")) is None
        process.kill()
        wait_until(lambda: is_gone(child))  # though nobody has asked for its exit code
    finally:
        process.kill()
        process.wait()
    assert is_gone(child) is True


def test_a_lease_of_this_process_that_nobody_holds_is_free() -> None:
    assert is_gone(this_process()) is True  # as after a call in a notebook whose end the storage did not take


DRIVER = """
import sys, time
from dataclasses import replace
from leases import SHORT
from dinoray.models.errors import DinorayError
from dinoray.pipeline.storage import lease_keeper
from dinoray.pipeline.storage.files import Directory

if sys.argv[2] == "elsewhere":
    lease_keeper._machine = lambda: ""
try:
    with lease_keeper.LeaseKeeper(Directory(sys.argv[1]), tell=print, timing=SHORT) as keeper:
        print("holds", flush=True)
        while True:
            time.sleep(0.05)
            keeper.check()
except DinorayError as error:
    print(f"error: {error}")
    sys.exit(error.exit_code)
"""


@contextlib.contextmanager
def driver(folder: Path, where: str = "here") -> Iterator["subprocess.Popen[str]"]:
    """A process that holds the lease of a folder until it is killed, on this machine or as if it were elsewhere."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}"}
    command = [sys.executable, "-c", DRIVER, str(folder), where]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def test_of_two_processes_the_second_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    with driver(tmp_path) as first:
        assert line_of(first) == "holds\n"
        with driver(tmp_path) as second:
            assert f"is in use by {os.uname().nodename} pid {first.pid} since" in line_of(second)
            assert second.wait(60) == 4
        first.send_signal(signal.SIGKILL)
        with driver(tmp_path) as third:  # at once: nothing is printed of a wait
            assert line_of(third) == "holds\n"


def test_a_process_elsewhere_that_was_asleep_finds_that_another_took_over(tmp_path: Path) -> None:
    with driver(tmp_path, "elsewhere") as first:
        assert line_of(first) == "holds\n"
        first.send_signal(signal.SIGSTOP)
        with driver(tmp_path, "elsewhere") as second:
            assert "waiting for its lease to be renewed or to end, until" in line_of(second)
            assert line_of(second) == "holds\n"
            first.send_signal(signal.SIGCONT)
            assert f"was taken over by {os.uname().nodename} pid {second.pid} at 20" in line_of(first)
            assert first.wait(60) == 4
            assert second.poll() is None
