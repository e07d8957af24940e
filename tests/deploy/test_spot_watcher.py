"""deploy/spot_watcher.sh against a metadata service that answers as AWS does, with a `ray` that notes its arguments."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT
from spot_metadata import Metadata, metadata, notice

SCRIPT = ROOT / "deploy" / "spot_watcher.sh"
HEAD = "127.0.0.1:1"  # nothing listens there, and nobody else's Ray has it on its command line
NODE_ID = "ab" * 28

pytestmark = pytest.mark.skipif(
    shutil.which("wget") is None or not Path("/proc/self").exists(), reason="made for Linux with wget"
)


@pytest.fixture
def raylet() -> Iterator[None]:
    """A process with the arguments of a raylet of this cluster, and one of another cluster on the same machine."""
    wait = "import sys; sys.stdin.read()"
    arguments = [
        [f"--node_id={'cd' * 28}", "--gcs-address=127.0.0.1:12"],
        [f"--node_id={NODE_ID}", f"--gcs-address={HEAD}"],
    ]
    processes = [
        subprocess.Popen([sys.executable, "-c", wait, *words], stdin=subprocess.PIPE) for words in arguments
    ]
    yield
    for process in processes:
        process.communicate(b"")


def watch(service: Metadata, folder: Path, *exit_codes: int) -> tuple[int, list[list[str]]]:
    """Run the script to its end; its exit code, and the arguments of the calls of `ray`, which end with these codes."""
    calls = folder / "calls"
    codes = " ".join(str(code) for code in exit_codes)
    stub = folder / "ray"
    stub.write_text(
        f'#!/bin/bash\nprintf "%s\\n" "$@" --- >>{calls}\ncodes=({codes})\n'
        f'exit "${{codes[$(grep -c -e "^---$" {calls}) - 1]}}"\n'
    )
    stub.chmod(0o755)
    done = subprocess.run(
        [SCRIPT, HEAD],
        env={
            "PATH": f"{folder}:{os.environ['PATH']}",
            "IMDS_URL": service.url,
            "SPOT_PAUSE_SECONDS": "0.05",
        },
        timeout=60,
    )
    text = calls.read_text() if calls.exists() else ""
    return done.returncode, [call.split("\n")[:-1] for call in text.split("---\n")[:-1]]


@pytest.mark.usefixtures("raylet")
def test_a_node_that_is_taken_back_is_drained_once_and_the_watch_ends(tmp_path: Path) -> None:
    with metadata(None, None, notice(120)) as service:
        code, calls = watch(service, tmp_path, 0)
    assert code == 0
    assert service.asked == 3
    assert service.without_token == 0
    (call,) = calls
    assert call[:4] == [
        "drain-node",
        f"--address={HEAD}",
        f"--node-id={NODE_ID}",
        "--reason=DRAIN_NODE_REASON_PREEMPTION",
    ]
    assert call[4].startswith("--reason-message=")
    name, seconds = call[5].split("=")
    assert name == "--deadline-remaining-seconds"
    assert 60 < int(seconds) <= 120  # less what the watch itself took
    assert len(call) == 6


@pytest.mark.usefixtures("raylet")
def test_a_drain_that_fails_is_tried_again_with_the_time_that_is_left(tmp_path: Path) -> None:
    with metadata(notice(120)) as service:
        code, calls = watch(service, tmp_path, 1, 1, 0)
    assert code == 0
    assert [call[2] for call in calls] == [f"--node-id={NODE_ID}"] * 3
    left = [int(call[5].split("=")[1]) for call in calls]
    assert left == sorted(left, reverse=True)


def test_a_notice_whose_time_is_over_ends_the_watch(tmp_path: Path) -> None:
    with metadata(notice(-1)) as service:
        assert watch(service, tmp_path) == (1, [])


@pytest.mark.usefixtures("raylet")
def test_a_metadata_service_without_an_answer_is_asked_again(tmp_path: Path) -> None:
    with metadata(notice(120)) as service:
        service.refuses = 2
        code, calls = watch(service, tmp_path, 0)
    assert (code, len(calls)) == (0, 1)
    assert (service.tokens, service.asked) == (1, 1)


def test_ray_knows_the_command_and_its_options() -> None:
    command = pytest.importorskip("ray.scripts.scripts").cli.commands["drain-node"]
    known = {option for parameter in command.params for option in parameter.opts}
    used = {"--address", "--node-id", "--reason", "--reason-message", "--deadline-remaining-seconds"}
    assert used <= known
    (reason,) = [parameter for parameter in command.params if "--reason" in parameter.opts]
    assert "DRAIN_NODE_REASON_PREEMPTION" in reason.type.choices
    assert all(option in SCRIPT.read_text() for option in used)
