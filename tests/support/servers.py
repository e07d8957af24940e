"""Servers for the tests, each for as long as a `with` block lasts: a real S3 store, and one that gives one answer."""

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

ACCESS_KEY, SECRET_KEY = "AKTESTKEY", "SKtestsecretvalue"
READER = "AKREADER", "SKreadersecretvalue"
"""Keys of a user who may read and not write, of a server with public buckets."""


@dataclass(frozen=True)
class S3Server:
    """A running store: where it listens and the environment that leads any AWS client to it."""

    endpoint: str
    log: Path

    @property
    def env(self) -> dict[str, str]:
        """AWS_* for a process that shall use this server, and nothing of the user's own configuration."""
        return aws_environment(self.endpoint)

    def client(self) -> "boto3.client":
        """A client of the test's own, apart from the code under test."""
        return _client(self.endpoint)


@lru_cache
def _client(endpoint: str) -> "boto3.client":
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        region_name="us-east-1",
        config=Config(max_pool_connections=32),
    )


def aws_environment(endpoint: str, *, secret: str = SECRET_KEY) -> dict[str, str]:
    """The AWS_* variables for a server at `endpoint`."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@contextlib.contextmanager
def s3_server(*, public: Sequence[str] = ()) -> Iterator[S3Server]:
    """SeaweedFS on free ports of 127.0.0.1, ready for requests; about two seconds to start.

    With `public` buckets, whoever has no keys may read and list these, and whoever has those of `READER` all buckets.
    """
    with tempfile.TemporaryDirectory(prefix="weed-", ignore_cleanup_errors=True) as folder:
        for _ in range(3):  # another process may take a port that was free
            process, server = _start(folder, public)
            try:
                if _is_ready(server, process):
                    yield server
                    return
            finally:
                process.kill()  # a polite stop takes seconds, and nothing here is kept
                process.wait()
        raise RuntimeError(f"weed did not start: {server.log.read_text()[-2000:]}")


def _start(folder: str, public: Sequence[str]) -> tuple["subprocess.Popen[bytes]", S3Server]:
    log = Path(folder, "weed.log")
    s3, master, volume, filer, admin = free_ports(5)
    command = [
        *(_weed(), "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
        *(f"-s3.port={s3}", f"-master.port={master}", f"-volume.port={volume}"),
        *(f"-filer.port={filer}", f"-admin.port={admin}", "-s3.port.iceberg=0", "-s3.port.lance=0"),
        # It takes as many volumes as the free disk holds, and each bucket takes one: small ones never run out.
        *("-webdav=false", "-admin.ui=false", "-master.telemetry=false", "-master.volumeSizeLimitMB=16"),
        *("-s3.autoCreateBucket=false", "-s3.allowDeleteBucketNotEmpty=false"),
    ]
    if public:
        Path(folder, "identities.json").write_text(json.dumps(_identities(public)))
        command.append(f"-s3.config={folder}/identities.json")
    keys = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=os.environ | keys, stdout=output, stderr=output, cwd=folder)
    return process, S3Server(f"http://127.0.0.1:{s3}", log)


def _identities(public: Sequence[str]) -> dict[str, Any]:
    """SeaweedFS's users: one that may do all, one that may read all, and everybody."""

    def identity(name: str, actions: Sequence[str], *keys: str) -> dict[str, Any]:
        credentials = [dict(zip(("accessKey", "secretKey"), keys, strict=True))] if keys else []
        return {"name": name, "credentials": credentials, "actions": list(actions)}

    of_everybody = [f"{action}:{bucket}" for bucket in public for action in ("Read", "List")]
    return {
        "identities": [
            identity("admin", ["Admin", "Read", "Write", "List", "Tagging"], ACCESS_KEY, SECRET_KEY),
            identity("reader", ["Read", "List"], *READER),
            identity("anonymous", of_everybody),
        ]
    }


def _weed() -> str:
    """SeaweedFS's program: that of this environment, be it activated or not."""
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else "weed"


def _is_ready(server: S3Server, process: "subprocess.Popen[bytes]") -> bool:
    """Wait until the server takes an object; False where its process ends first."""
    client = server.client()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with contextlib.suppress(BotoCoreError, ClientError):
            client.create_bucket(Bucket="ready")
            client.put_object(Bucket="ready", Key="ready", Body=b"1")
            return process.poll() is None  # else another's answered
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
            return False
    raise RuntimeError(f"weed is not ready after 120 s: {server.log.read_text()[-2000:]}")


def free_ports(count: int) -> list[int]:
    """Ports that are free now, and free again 10,000 higher, where SeaweedFS puts gRPC."""
    ports: list[int] = []
    # Below the range that the kernel gives to outgoing connections; processes that look at the same time part.
    start = random.SystemRandom().randrange(12_000, 20_000)
    for port in [*range(start, 20_000), *range(12_000, start)]:
        if len(ports) == count:
            break
        if _is_free(port) and _is_free(port + 10_000):
            ports.append(port)
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def use_aws(monkeypatch: pytest.MonkeyPatch, variables: Mapping[str, str]) -> None:
    """Replace all AWS_* of this process for the test."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@contextlib.contextmanager
def answering_server() -> Iterator[tuple[str, dict[str, object]]]:
    """The address of a server that answers every GET with the `status` and `body` of a dict, and that dict."""
    answer: dict[str, object] = {"status": 200, "body": "{}"}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answer["status"])  # type: ignore[arg-type]
            self.end_headers()
            self.wfile.write(str(answer["body"]).encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{running.server_port}", answer
        finally:
            running.shutdown()
