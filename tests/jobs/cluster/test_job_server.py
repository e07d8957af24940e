"""Submitting to a cluster that has just started: real HTTP requests to a server that gives Ray's own answers."""

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import ray
from paths import ROOT

from dinoray.jobs import submit as job
from dinoray.jobs.cli.main import run_main
from dinoray.models.errors import ResourceError

NO_AGENT = "No available agent to submit job, please try again later."
"""What the job server of Ray 2.60 answers, with status 500, before the head's agent is up."""
ARGUMENTS = ["name=x", "data.path=s3://b/i", "storage_path=s3://b/r"]
COMMAND = ["--no-wait", "--", "dinoray", "pretrain", *ARGUMENTS]


@dataclass
class JobServer:
    """A job server whose first `refusals` submissions are refused with `text`."""

    refusals: int = 0
    text: str = NO_AGENT
    address: str = ""
    submitted: list[dict[str, Any]] = field(default_factory=list)
    num_requests: int = 0

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, str]:
        if method == "POST" and path == "/api/jobs/":
            self.num_requests += 1
            if self.num_requests <= self.refusals:
                return 500, self.text
            self.submitted.append(json.loads(body))
            return 200, json.dumps({"job_id": "1", "submission_id": self.submitted[-1]["submission_id"]})
        if path == "/api/version":
            facts = {"version": "4", "ray_version": ray.__version__, "ray_commit": "0", "session_name": "s"}
            return 200, json.dumps(facts)
        if path == "/api/jobs/":
            return 200, "[]"
        if path.startswith("/api/jobs/"):
            details = {"type": "SUBMISSION", "status": "PENDING", "entrypoint": "x", "submission_id": "x-a1"}
            return 200, json.dumps(details)
        return (200, "") if path.startswith("/api/packages/") else (404, "")


@contextlib.contextmanager
def job_server(server: JobServer) -> Iterator[JobServer]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, text = server.answer(self.command, self.path, body)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def do_POST(self) -> None:
            self.do_GET()

        def do_PUT(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    server.address = f"http://127.0.0.1:{http.server_port}"
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # connect sets it
    monkeypatch.setattr("dinoray.jobs.cluster.job_server._AGENT_PAUSE_SECONDS", 0.01)


def test_a_cluster_without_an_agent_is_asked_again(capsys: pytest.CaptureFixture[str]) -> None:
    with job_server(JobServer(refusals=3)) as server:
        job.main(["--address", server.address, *COMMAND])
    lines = capsys.readouterr().out.splitlines()
    waiting = "the cluster has no agent for jobs yet; trying again for up to 60 s"
    assert lines.count(waiting) == 1
    assert lines[-1].startswith("x-a1 is submitted")
    assert server.num_requests == 4
    (sent,) = server.submitted
    assert sent["runtime_env"]["working_dir"].startswith("gcs://")  # as the first request had it


def test_a_cluster_that_gets_no_agent_ends_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinoray.jobs.cluster.job_server._AGENT_SECONDS", 0.2)
    with job_server(JobServer(refusals=10**6)) as server:
        monkeypatch.setattr("sys.argv", ["submit", "--address", server.address, *COMMAND])
        with pytest.raises(SystemExit) as ended:
            run_main(job.main)
    assert ended.value.code == ResourceError.exit_code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: the cluster at {server.address} has had no agent for jobs for ")
    assert "dashboard_agent.log" in line


@pytest.mark.parametrize("program", ["dinoray pretrain", "jobs.pretrain", "/venv/bin/dinoray pretrain",
                                     "python -m jobs.pretrain", "/usr/bin/python3.12 -m dinoray pretrain"])  # fmt: skip
def test_a_job_in_any_form_runs_as_a_module_of_the_code_that_is_sent(program: str) -> None:
    with job_server(JobServer()) as server:
        job.main(["--address", server.address, "--no-wait", "--", *program.split(), *ARGUMENTS])
    (sent,) = server.submitted
    assert sent["entrypoint"] == f"python -m jobs.pretrain {' '.join(ARGUMENTS)}"
    assert sent["submission_id"] == "x-a1"


def test_a_job_without_a_name_has_the_same_run_in_any_form() -> None:
    runs = set()
    for words in (["dinoray", "embed"], ["jobs.embed"], ["python", "-m", "dinoray", "embed"]):
        with job_server(JobServer()) as server:
            job.main(["--address", server.address, "--no-wait", "--", *words, "s3://b/r", "s3://b/i"])
        runs |= {sent["submission_id"] for sent in server.submitted}
    (run,) = runs
    assert run.startswith("embed-")


def test_another_refusal_is_not_repeated() -> None:
    with (
        job_server(JobServer(refusals=10**6, text="disk is full")) as server,
        pytest.raises(ResourceError, match="disk is full"),
    ):
        job.main(["--address", server.address, *COMMAND])
    assert server.num_requests == 1
