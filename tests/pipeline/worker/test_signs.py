"""What a train worker's sign of life says, and that only the process which gave it is ended."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from jobs_processes import wait_until

from dinoray.pipeline.cluster.hangs import STUCK_SECONDS, Sign
from dinoray.pipeline.worker import signs


class Channel:
    """Keeps what is sent to it."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, dict[int, Sign]]] = []

    def merge(self, name: str, values: dict[int, Sign]) -> None:
        self.sent.append((name, values))


@pytest.fixture
def channel(monkeypatch: pytest.MonkeyPatch) -> Channel:
    class Context:
        def get_node_id(self) -> str:
            return "n1"

    monkeypatch.setattr(signs.ray, "get_runtime_context", Context)
    monkeypatch.setattr(signs.ray.util, "get_node_ip_address", lambda: "10.0.0.1")
    monkeypatch.setattr(signs, "SIGN_SECONDS", 0.01)
    return Channel()


def test_signs_come_while_the_worker_is_in_one_step_and_say_where_its_code_is(
    channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on, is_there = threading.Event(), threading.Event()

    def a_step_that_hangs() -> None:
        sender = signs.Signs(channel, rank=3)  # type: ignore[arg-type]
        sender.does(40, "trains")
        monkeypatch.setattr(sender, "_now", (40, "trains", time.monotonic() - STUCK_SECONDS))
        is_there.set()
        goes_on.wait()

    thread = threading.Thread(target=a_step_that_hangs)
    thread.start()
    try:
        assert is_there.wait(60)
        wait_until(lambda: len(channel.sent) > 3 and channel.sent[-1][1][3].stack)
        name, sent = channel.sent[-1]
        assert (name, list(sent)) == (signs.SIGNS, [3])
        sign = sent[3]
        assert (sign.address, sign.node_id, sign.pid, sign.step, sign.doing) == (
            "10.0.0.1",
            "n1",
            os.getpid(),
            40,
            "trains",
        )
        assert sign.seconds > STUCK_SECONDS
        assert "a_step_that_hangs (test_signs.py:" in sign.stack
        assert sign.number > channel.sent[0][1][3].number
    finally:
        goes_on.set()
        thread.join()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="tells processes apart by /proc")
def test_a_stopped_process_is_ended_and_another_of_its_number_is_not() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    try:
        started = signs._started(process.pid)
        signs._kill(process.pid, started + "1")
        assert process.poll() is None
        os.kill(process.pid, signs.signal.SIGSTOP)
        signs._kill(process.pid, started)
        assert process.wait(60) == -signs.signal.SIGKILL
        signs._kill(process.pid, "")  # gone
    finally:
        process.kill()
        process.communicate()


def test_a_process_is_known_by_when_it_started() -> None:
    found: Any = {signs._started(os.getpid()) for _ in range(3)}
    assert len(found) == 1
    assert signs._started(-1) == ""
