"""Trackers that fail, hang, die and come back, and what becomes of the run beside them: nothing."""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import create_server, socket
from typing import Any

import pytest
from tracked_runs import run_in

from dinoray.pipeline.reporting.run_report import build_report
from dinoray.pipeline.tracking import services
from dinoray.pipeline.tracking.mlflow_wandb import OPEN, TrackedRun, Tracker
from dinoray.pipeline.tracking.services import Trackers
from dinoray.pipeline.tracking.sink import MetricSink

pytest.importorskip("mlflow")
pytest.importorskip("wandb")


class Memory:
    """A service that keeps what it is told, and fails or waits where the test says so."""

    def __init__(self, before: Callable[[int], None] = lambda step: None) -> None:
        self.steps: list[int] = []
        self.before = before
        self.told = threading.Condition()

    def log(self, step: int, values: Mapping[str, float], seconds: float) -> None:
        self.before(step)
        with self.told:
            self.steps.append(step)
            self.told.notify_all()

    def wait_for(self, step: int) -> None:
        with self.told:
            self.told.wait_for(lambda: step in self.steps)

    def picture(self, name: str, step: int, png: bytes) -> None:
        self.before(step)

    def page(self, html: str) -> None: ...

    def close(self, failed: bool) -> None: ...


def trackers(
    tmp_path: Path, opener: Callable[[TrackedRun], Tracker], told: list[str], **times: Any
) -> MetricSink:
    settings = {"pauses": (0.0, 0.0, 0.0), "end_seconds": 60.0} | times
    return Trackers(run_in(tmp_path), {"memory": opener}, build_report, told.append, **settings)


def test_what_fails_is_tried_again_in_its_order_and_told_once(tmp_path: Path) -> None:
    left = Counter({2: 2, 5: 1})

    def before(step: int) -> None:
        if left[step]:
            left[step] -= 1
            raise OSError("http://me:secret@host is\nbusy")

    told: list[str] = []
    memory = Memory(before)
    sink = trackers(tmp_path, lambda run: memory, told)
    for step in range(8):
        sink.log(step, {"loss": 1.0})
    memory.wait_for(7)
    sink.close(failed=False)
    assert memory.steps == list(range(8))
    assert told == ["warning: memory: http://...@host is busy; the run continues without it"]


def test_what_fails_for_good_is_left_out_and_counted(tmp_path: Path) -> None:
    def before(step: int) -> None:
        if step in (2, 3):
            raise ValueError("no")

    told: list[str] = []
    memory = Memory(before)
    sink = trackers(tmp_path, lambda run: memory, told)
    for step in range(8):
        sink.log(step, {"loss": 1.0})
    memory.wait_for(7)  # all were tried, before the end makes it give up sooner
    sink.close(failed=False)
    assert memory.steps == [0, 1, 4, 5, 6, 7]
    assert told[1:] == ["warning: memory: 2 messages are lost"]


def test_a_service_that_cannot_be_begun_with_costs_the_run_nothing(tmp_path: Path) -> None:
    def opener(run: TrackedRun) -> Tracker:
        raise SystemExit("log in first")

    told: list[str] = []
    sink = trackers(tmp_path, opener, told)
    sink.log(1, {"loss": 1.0})
    sink.close(failed=False)
    assert told == [
        "warning: memory: log in first; the run continues without it",
        "warning: memory: 3 messages are lost",
    ]


def test_a_service_that_does_not_keep_up_loses_the_oldest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "_QUEUE_LENGTH", 10)
    comes, goes = threading.Event(), threading.Event()

    def before(step: int) -> None:
        comes.set()
        goes.wait()

    told: list[str] = []
    memory = Memory(before)
    sink = trackers(tmp_path, lambda run: memory, told)
    sink.log(0, {"loss": 1.0})
    comes.wait()
    for step in range(1, 16):
        sink.log(step, {"loss": 1.0})  # returns, though nothing is taken
    goes.set()
    memory.wait_for(15)
    sink.close(failed=False)
    assert memory.steps == [0, *range(6, 16)]
    assert told == [
        "warning: memory: it does not keep up; the run continues without it",
        "warning: memory: 5 messages are lost",
    ]


@contextmanager
def silent_server() -> Iterator[str]:
    """Accepts whoever comes and never says a word."""
    taken: list[socket] = []
    with create_server(("127.0.0.1", 0)) as listening:

        def accept() -> None:
            try:
                while True:
                    taken.append(listening.accept()[0])
            except OSError:
                pass

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    for connection in taken:
        connection.close()


def test_a_server_that_never_answers_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with silent_server() as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        sink = Trackers(
            run_in(tmp_path), {"mlflow": OPEN["mlflow"]}, build_report, told.append, end_seconds=0.2
        )
        for step in range(50):
            sink.log(step, {"loss": 1.0})
        sink.close(failed=False)  # while the thread still waits for its first answer
        (line,) = told
    assert line.startswith("warning: mlflow: it has not answered in time at the end of the run")


class MLflowServer(ThreadingHTTPServer):
    """As much of MLflow's API as a run of scalars needs; keeps the steps of what it is sent."""

    def __init__(self, port: int, steps: list[int]) -> None:
        self.steps = steps
        super().__init__(("127.0.0.1", port), _Answers)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def die(self) -> None:
        self.shutdown()
        self.server_close()


class _Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer({"experiment": {"experiment_id": "1", "name": "plants", "lifecycle_stage": "active"}})

    def do_POST(self) -> None:
        assert isinstance(self.server, MLflowServer)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path.endswith("log-batch"):
            self.server.steps += [metric["step"] for metric in body.get("metrics", [])]
        self._answer({"run": {"info": {"run_id": "r", "experiment_id": "1"}, "data": {}}})

    def do_PATCH(self) -> None:
        self.do_POST()

    def _answer(self, tree: object) -> None:
        data = json.dumps(tree).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None: ...


def test_a_server_that_dies_and_comes_back_has_missed_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    steps: list[int] = []
    server = MLflowServer(0, steps)
    port = server.server_address[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    told: list[str] = []
    dead = threading.Event()

    def tell(text: str) -> None:
        told.append(text)
        dead.set()

    run, openers = run_in(tmp_path), {"mlflow": OPEN["mlflow"]}
    sink = Trackers(run, openers, build_report, tell, pauses=(0.0, *[0.1] * 100), end_seconds=60)
    sink.log(1, {"loss": 1.0})
    while not steps:
        dead.wait(0.01)
    server.die()
    for step in (2, 3, 4):
        sink.log(step, {"loss": 1.0})
    dead.wait()
    server = MLflowServer(port, steps)
    sink.log(5, {"loss": 1.0})
    while 5 not in steps:
        threading.Event().wait(0.01)
    server.die()
    sink.close(failed=False)  # without a server once more
    assert steps == [1, 2, 3, 4, 5]
    assert "failed with exception" in told[0]
    assert told[1:] == ["warning: mlflow: 2 messages are lost"]  # the page and the end
