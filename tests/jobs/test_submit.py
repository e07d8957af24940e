"""`python -m jobs.submit`: what it refuses before a cluster is asked, and job servers that are none or not ours."""

import contextlib
import importlib
import re
import socket
import threading
from collections.abc import Iterator, Sequence

import pytest
from paths import ROOT
from servers import answering_server
from submission import submit

from dinoray.jobs.cluster.job_server import connect
from dinoray.models.errors import ConfigError, ResourceError

# What is refused before a cluster is asked

PRETRAIN = ["--", "jobs.pretrain", "name=x", "data.path=s3://b/i", "storage_path=s3://b/r"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "no job is given"),
        (["jobs.pretrain"], "unrecognized arguments: jobs.pretrain"),
        (["--stop"], "no job is given"),
        (["--", "jobs.pretrian"], "pretrian is not a job in jobs; did you mean pretrain?"),
        (["--", "dinoray", "pretrian"], "pretrian is not a job in jobs; did you mean pretrain?"),
        (["--", "dinoray"], "no job is given"),
        (["--", "python", "train.py"], "python is not a job in"),
        (["--", "jobs.cli.config"], "cli.config is not a job in"),
        (
            ["--working-dir", "benchmarks", *PRETRAIN],
            "--working-dir benchmarks: holds no code of dinoray to send",
        ),
        ([*PRETRAIN, "optim.lrr=1"], "optim.lrr=1: unknown key"),
        (["--", "python", "-m", "jobs.pretrain", "optim.lrr=1"], "optim.lrr=1: unknown key"),
        (["--", "dinoray", "pretrain", "optim.lrr=1"], "optim.lrr=1: unknown key"),
        (["--", "jobs.pretrain", "name=x"], "storage_path=runs would lie in a temporary folder"),
        (["--run", "y", *PRETRAIN], "--run y is for jobs without name="),
        (["--runtime-env", "missing.yaml", *PRETRAIN], "--runtime-env missing.yaml"),
        (["--max-attempts", "0", *PRETRAIN], "--max-attempts"),
        (["--run", "a/b", "--", "jobs.embed", "data.path=s3://b/i"], "--run a/b: must be letters"),
        ([*PRETRAIN, "data.aws_secret_access_key=MARKER"], "data.aws_secret_access_key=...: unknown key"),
        ([*PRETRAIN, "key_column=image"], "key_column=...: unknown key; did you mean data.key_column"),
        (
            ["--", "jobs.embed", "data={aws_secret_access_key: MARKER}"],
            "aws_secret_access_key: looks like a secret",
        ),
        (["--", "jobs.embed", "--hf-token", "MARKER"], "hf_token: looks like a secret"),
        (["--", "jobs.embed", "data.path=s3://AKIA:MARKER/MARKER@b/i"], "looks like a secret"),
        (["--", "jobs.embed", "name=a/b"], "name=a/b: must be letters"),
        (["--", "jobs.embed", "data.path=s3://b/i", "aws_session_token=MARKER"], "looks like a secret"),
        (["--", "jobs.embed", "data.path=s3://AKIA:MARKER@b/i"], "looks like a secret"),
        (["--", "jobs.embed", "--checkpoint=s3://AKIA:MARKER@b/i"], "looks like a secret"),
    ],
)
def test_a_mistake_is_refused_here(
    arguments: Sequence[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):  # it is refused before a cluster is looked for
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=re.escape(says)) as error:
        submit(*arguments)
    assert "MARKER" not in str(error.value)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "10.0.0.1:6379",
        "auto",
        "ray://10.0.0.1:10001",
        "http://h:abc",
        "http://h:99999",
        "http://[::1",
        "htp://me:MARKER@h",
    ],
)
def test_an_address_that_is_not_a_dashboards_is_refused(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match="`ray dashboard cluster"):
        submit(*PRETRAIN)


def test_it_knows_every_option_of_pretrain(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit):
        importlib.import_module("jobs.pretrain").main(["--help"])
    options = re.findall(r"^  (?:-h, )?(--[\w-]+)( [A-Z]+)?", capsys.readouterr().out, flags=re.MULTILINE)
    assert ("--verbose", "") in options
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    monkeypatch.chdir(ROOT)
    values = {"--recipe": "demo", "--config": "/dev/null", "--init-from": "x.pth"}
    others = [
        (name, value) for name, value in options if name not in ("--help", "--from-study")
    ]  # it stands alone
    words = [word for name, value in others for word in (name, values[name] if value else "")]
    with pytest.raises(ResourceError, match="does not answer"):  # all the rest was understood
        submit(*PRETRAIN, *filter(None, words))


# Job servers that are none, or not ours


@pytest.fixture
def answers() -> Iterator[tuple[str, dict[str, object]]]:
    with answering_server() as (address, answer):
        yield address, answer


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (200, '{"ray_version": "2.9.3"}', r"runs Ray 2\.9\.3, this machine Ray 2\.60"),
        (200, "{}", "is not a Ray dashboard"),
        (200, "<html>hello</html>", "is not a Ray dashboard"),
        (401, "Missing authentication token", "requires a token.*RAY_AUTH_MODE=token"),
        (403, "Invalid authentication token", "requires a token"),
        (502, "bad gateway", "502"),
    ],
)
def test_what_is_wrong_with_a_job_server_is_one_line(
    answers: tuple[str, dict[str, object]], status: int, body: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # connect sets it
    address, answer = answers
    answer |= {"status": status, "body": body}
    with pytest.raises(ResourceError, match=says) as error:
        connect(address)
    assert len(str(error.value).splitlines()) == 1
    assert address in str(error.value)


def test_a_server_that_takes_connections_and_says_nothing_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    monkeypatch.setattr("dinoray.jobs.cluster.job_server._ANSWER_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ResourceError, match=r"does not answer .*timed out"):
            connect(address)


def test_a_server_that_speaks_something_else_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")

    def answer(server: socket.socket) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                connection.sendall(b"220 mail.example.org ESMTP\r\n")
                connection.settimeout(1)
                with contextlib.suppress(OSError):
                    while connection.recv(4096):
                        pass

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=answer, args=[server], daemon=True).start()
        port = server.getsockname()[1]
        with pytest.raises(ResourceError) as error:
            connect(f"http://me:MARKER@127.0.0.1:{port}")
        server.shutdown(socket.SHUT_RDWR)
    assert len(str(error.value).splitlines()) == 1
    assert "MARKER" not in str(error.value)
    assert f"...@127.0.0.1:{port}" in str(error.value)
