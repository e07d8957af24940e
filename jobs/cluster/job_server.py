"""A cluster's job server: the way to it, the attempts at a run, following one to its end.

What can go wrong on the way is one line (ResourceError). Knows nothing of what a job does, nor of its code.
"""

import asyncio
import contextlib
import logging
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import aiohttp
import ray
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from dinoray.jobs.cli.main import wants_token
from dinoray.models.errors import ConfigError, ResourceError, one_line, redact_credentials
from dinoray.pipeline.ray_private.jobs import server_version

_VARIABLE = "RAY_API_SERVER_ADDRESS"
_ANSWER_SECONDS = 10.0
"""How long a job server may take for its first answer."""
_AGENT_SECONDS, _AGENT_PAUSE_SECONDS = 60.0, 2.0
"""How long a cluster that has no agent for jobs yet is asked again, and the pause between two requests."""
_NO_AGENT = "No available agent"
"""The answer of a cluster whose head has just started."""
_PATIENCE_SECONDS = 60.0
"""How long a lost connection is tried again before following a job is given up."""


class Attempt(NamedTuple):
    """One submission of a run, as the job server tells of it."""

    number: int
    id: str
    info: Any

    @property
    def is_over(self) -> bool:
        """Whether it has ended, one way or another."""
        return bool(self.info.status.is_terminal())

    @property
    def exit_code(self) -> int | None:
        """The code that its driver ended with, as a shell would say it; None before the end.

        4 where the driver was never started, 1 for a stopped one, whose code Ray does not keep.
        """
        if not self.is_over:
            return None
        code = self.info.driver_exit_code
        if code is None:
            return {"SUCCEEDED": 0, "STOPPED": 1}.get(str(self.info.status), ResourceError.exit_code)
        return int(code) if code >= 0 else 128 - int(code)


def dashboard_address(given: str | None) -> str:
    """The job server's address: the one given, else that of the environment; ConfigError for none or another kind."""
    address = given or os.environ.get(_VARIABLE) or os.environ.get("RAY_ADDRESS") or ""
    if not _is_http(address):
        what = (
            f"address={redact_credentials(address)!r} is not the address of a job server"
            if address
            else "no cluster is given"
        )
        raise ConfigError(
            f"{what}: pass --address http://127.0.0.1:8265 (`ray dashboard cluster.yaml` opens a tunnel "
            f"from there to the cluster) or set {_VARIABLE}"
        )
    return address.rstrip("/")


def _is_http(address: str) -> bool:
    try:
        parts = urlsplit(address)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # no port, or half an IPv6 address
        return False


def connect(address: str) -> JobSubmissionClient:
    """A client of the job server at `address`. ResourceError when it cannot be used."""
    parts = urlsplit(address)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    with _explained(address):
        # Ray's client would wait for minutes where nothing answers.
        socket.create_connection((parts.hostname or "", port), timeout=_ANSWER_SECONDS).close()
        requests.get(f"{address}/api/version", timeout=_ANSWER_SECONDS)  # what it answers, Ray's client reads
        os.environ[_VARIABLE] = address  # which Ray's client prefers to what it is given
        client = JobSubmissionClient(address)
    for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if version := server_version(client):
        check_version(address, version)
    return client


def check_version(address: str, theirs: str) -> None:
    """ResourceError unless the cluster's Ray is of the minor version of ours."""
    if theirs.split(".")[:2] != ray.__version__.split(".")[:2]:
        raise ResourceError(
            f"the cluster at {redact_credentials(address)} runs Ray {theirs}, this machine Ray {ray.__version__}; "
            f"install the same version on both, e.g. here: pip install 'ray[default]=={theirs}'"
        )


def attempts_at(client: JobSubmissionClient, run: str) -> list[Attempt]:
    """All submissions of a run that the cluster knows of, the oldest first."""
    with _explained(client.get_address()):
        jobs = client.list_jobs()
    found = []
    for info in jobs:
        number = re.fullmatch(rf"{re.escape(run)}-a(\d+)", info.submission_id or "")
        if number and (info.metadata or {}).get("run") == run:
            found.append(Attempt(int(number[1]), info.submission_id, info))
    return sorted(found)


def submit(
    client: JobSubmissionClient,
    run: str,
    number: int,
    command: str,
    *,
    metadata: Mapping[str, str],
    runtime_env: Mapping[str, Any],
) -> Attempt:
    """Start an attempt at a run: its driver gets no CPU of its own, which a head without work could not give.

    A cluster that has just started has no agent for jobs: it is asked again for up to `_AGENT_SECONDS`.
    """
    deadline, is_waiting = time.monotonic() + _AGENT_SECONDS, False
    with _explained(client.get_address()):
        while True:
            try:
                attempt_id = client.submit_job(
                    entrypoint=command,
                    submission_id=f"{run}-a{number}",
                    metadata={**metadata, "run": run},
                    runtime_env=dict(runtime_env),
                    entrypoint_num_cpus=0,
                )
                return Attempt(number, attempt_id, client.get_job_info(attempt_id))
            except RuntimeError as error:
                if _NO_AGENT not in str(error):
                    raise
                if time.monotonic() > deadline:
                    raise ResourceError(
                        f"the cluster at {redact_credentials(client.get_address())} has had no agent for jobs for "
                        f"{_AGENT_SECONDS:.0f} s; see dashboard_agent.log on its head node, or restart the head"
                    ) from error
            if not is_waiting:
                text = f"the cluster has no agent for jobs yet; trying again for up to {_AGENT_SECONDS:.0f} s"
                print(text, flush=True)
            is_waiting = True
            time.sleep(_AGENT_PAUSE_SECONDS)


def follow(client: JobSubmissionClient, attempt: Attempt) -> Attempt:
    """Print an attempt's log as it comes, from its beginning to its end; return what became of it.

    A connection that is lost meanwhile is opened again; ResourceError when that does not help.
    """
    with _explained(client.get_address()):
        return attempt._replace(info=asyncio.run(_follow(client, attempt.id)))


async def _follow(client: JobSubmissionClient, attempt_id: str) -> Any:
    num_printed, lost_since = 0, None
    while True:
        try:
            num_received = 0
            async for text in client.tail_job_logs(attempt_id):
                lost_since = None
                fresh = text[max(0, num_printed - num_received) :]
                num_received += len(text)
                num_printed = max(num_printed, num_received)
                print(fresh, end="", flush=True)
            info = client.get_job_info(attempt_id)
            if info.status.is_terminal():
                return info
        except AuthenticationError:
            raise
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            lost_since = lost_since or time.monotonic()
            if time.monotonic() - lost_since > _PATIENCE_SECONDS:
                raise ConnectionError(one_line(error)) from error
        await asyncio.sleep(0.5)


def stop(client: JobSubmissionClient, attempt: Attempt) -> Attempt:
    """Ask an attempt to end, by SIGTERM, and wait until it has."""
    with _explained(client.get_address()):
        client.stop_job(attempt.id)
        return _wait(client, attempt)


def finish(client: JobSubmissionClient, attempt: Attempt) -> str:
    """Wait until an attempt has ended; return its log."""
    with _explained(client.get_address()):
        return str(client.get_job_logs(_wait(client, attempt).id))


def _wait(client: JobSubmissionClient, attempt: Attempt) -> Attempt:
    while not attempt.is_over:
        time.sleep(0.5)
        attempt = attempt._replace(info=client.get_job_info(attempt.id))
    return attempt


@contextlib.contextmanager
def _explained(address: str) -> Iterator[None]:
    """What the job server or the way to it says becomes one line."""
    address = redact_credentials(address)
    try:
        yield
    except AuthenticationError as error:
        raise wants_token(address, error) from error
    except (KeyError, ValueError) as error:  # what it sent is no JSON, or not Ray's
        raise ResourceError(f"{address} is not a Ray dashboard; check the port") from error
    except OSError as error:  # those of requests are, too
        raise ResourceError(
            f"{address} does not answer ({one_line(error, limit=120)}); start the cluster, or open a tunnel to "
            "its dashboard: ray dashboard cluster.yaml"
        ) from error
    except RuntimeError as error:
        raise ResourceError(
            f"{address}: {one_line(error, limit=300).rstrip('.')}; check the address, and the logs of the cluster's "
            "dashboard"
        ) from error
