"""`python -m jobs.submit`: what it refuses here, what it sends, and a run on a real head, stopped and continued."""

import contextlib
import importlib
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import zipfile
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from jobs_processes import TINY, start_job
from paths import ROOT
from ray_head import RAY, RayHead, ray_head

from dinoray.jobs.cluster.job_server import attempts_at, connect
from dinoray.jobs.cluster.upload import (
    MAX_BYTES,
    check_config_file,
    list_files,
    named_files,
    pack,
    read_runtime_env,
)
from dinoray.jobs.runs.commit import commit_of
from dinoray.models.errors import ConfigError, DinorayError, ResourceError
from dinoray.pipeline.data.demo_images import PATTERNS, draw_demo_image
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.run_dir import committed_checkpoints
from dinoray.pipeline.tracking.records import read_mapping

SHIPPED = ROOT / "deploy" / "runtime_env.yaml"
MARKER = "marker-of-a-secret-4711"
STEPS = 96
"""So many that a run which is asked to stop after its first checkpoint has not ended before it hears."""


def submit(*arguments: str) -> None:
    """The job as this process would run it, its exit codes being exceptions still."""
    importlib.import_module("jobs.submit").main(arguments)


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"content of {name}")


# What is sent


def test_secrets_results_and_caches_stay_at_home(tmp_path: Path) -> None:
    stays = [".env", ".env.local", "jobs/.env", ".git/config", ".venv/bin/python", "runs/a/metrics.jsonl"]
    stays += [
        "data/1.jpg",
        "jobs/__pycache__/pretrain.pyc",
        ".mypy_cache/x",
        "x.egg-info/PKG-INFO",
        "key.pem",
        "deploy/server.key",
        "prod.env",
        ".git-credentials",
        ".npmrc",
        "jobs/auth_token",
        "credentials.json",
        "jobs/aws_credentials",
        "secrets.yaml",
    ]
    goes = [
        "jobs/credentials/__init__.py",
        "jobs/pretrain.py",
        "jobs/data/list.txt",
        "models/deploy/table.yaml",
        "environment.txt",
        "jobs/cli/keys.py",
    ]
    write(tmp_path, *stays, *goes)
    assert list_files(tmp_path, []) == sorted(goes)


def test_ignore_files_of_each_folder_and_the_excludes_of_the_runtime_environment_count(
    tmp_path: Path,
) -> None:
    write(tmp_path, "a.py", "a.log", "notes/a.txt", "notes/b.txt", "b.txt", "big/1.bin", "big/keep.txt")
    (tmp_path / ".gitignore").write_text("*.log\n")
    (tmp_path / "notes/.gitignore").write_text("b.txt\n")
    (tmp_path / ".rayignore").write_text("/big/*\n!/big/keep.txt\n")
    sent = [".gitignore", ".rayignore", "a.py", "b.txt", "big/keep.txt", "notes/.gitignore", "notes/a.txt"]
    assert list_files(tmp_path, []) == sent
    assert list_files(tmp_path, ["/notes", "*.txt"]) == [".gitignore", ".rayignore", "a.py"]


def test_the_archive_holds_the_files_and_is_the_same_each_time(tmp_path: Path) -> None:
    write(tmp_path / "code", "a.py", "jobs/b.py")
    (tmp_path / "code/a.py").chmod(0o755)
    first = pack(tmp_path / "code", [], tmp_path / "1.zip")
    os.utime(tmp_path / "code/a.py", (1e9, 1e9))
    pack(tmp_path / "code", [], tmp_path / "2.zip")
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()
    assert first.names == {"a.py", "jobs/b.py"}
    with zipfile.ZipFile(first.file) as archive:
        assert archive.read("jobs/b.py") == b"content of jobs/b.py"
        assert archive.getinfo("a.py").external_attr >> 16 & 0o777 == 0o755


def test_a_name_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    (tmp_path / "ok-\U0001f600.txt").write_text("x")
    assert list_files(tmp_path, []) == ["ok-\U0001f600.txt"]
    with open(os.fsencode(tmp_path) + b"/caf\xe9.txt", "w"):
        pass
    with pytest.raises(ConfigError, match=r"caf\ufffd\.txt is not a UTF-8 name; rename it"):
        list_files(tmp_path, [])


def test_too_much_is_refused_with_the_largest_files(tmp_path: Path) -> None:
    write(tmp_path / "code", "a.py")
    for name, size in (("weights.bin", MAX_BYTES), ("photos/1.jpg", 1_500_000)):
        (tmp_path / "code" / name).parent.mkdir(exist_ok=True)
        with (tmp_path / "code" / name).open("wb") as file:
            file.truncate(size)  # a hole: nothing is written
    with pytest.raises(
        ConfigError, match=r"51\.5 MB in 3 files.*: weights\.bin 50\.0 MB, photos/1\.jpg 1\.5 MB"
    ):
        pack(tmp_path / "code", [], tmp_path / "code.zip")
    assert pack(tmp_path / "code", ["weights.bin"], tmp_path / "code.zip").names == {"a.py", "photos/1.jpg"}


@pytest.mark.parametrize("excludes", [read_runtime_env(SHIPPED)["excludes"], []], ids=["shipped", "own"])
def test_a_job_gets_the_code_and_half_a_megabyte(tmp_path: Path, excludes: list[str]) -> None:
    archive = pack(ROOT, excludes, tmp_path / "code.zip")
    assert "half a megabyte" in (ROOT / "jobs/README.md").read_text()
    assert archive.num_bytes < 600_000
    code = {
        path.relative_to(ROOT).as_posix()
        for d in ("models", "pipeline", "jobs", "dinoray")
        for path in (ROOT / d).rglob("*.py")
    }
    assert code <= archive.names
    assert {"pyproject.toml", "cluster.yaml"} <= archive.names
    assert [name for name in archive.names if name.startswith(("tests/", "benchmarks/", "deploy/"))] == []
    assert [name for name in archive.names if name.endswith((".png", ".jpg", ".svg"))] == []


def test_files_that_the_command_names_are_sent_even_if_excluded(tmp_path: Path) -> None:
    write(tmp_path, "jobs/a.py", "tests/weights.pth", "lists/labels.parquet", "runs/s/best.yaml", ".env")
    write(tmp_path, "tests/mine.yaml", "other.parquet")
    (tmp_path / "tests/mine.yaml").write_text("data: {path: lists/labels.parquet}\ntrain: {epochs: 3}\n")
    excludes = ["*.parquet", "*.pth"]
    words = ["jobs.pretrain", "--config", f"{tmp_path}/tests/mine.yaml", "init.path=./tests/weights.pth"]
    words += ["--from-study=runs/s", "data.x=.env", "../outside", "x" * 5000, "a\0b"]
    named = named_files(words)
    assert pack(tmp_path, excludes, tmp_path.parent / "code.zip", named=named).names == {
        "jobs/a.py",
        "tests/weights.pth",
        "lists/labels.parquet",
        "runs/s/best.yaml",
    }


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("/elsewhere/mine.yaml", "outside of --working-dir .; copy it there and pass --config mine.yaml"),
        ("../mine.yaml", "outside of --working-dir .; copy it there and pass --config mine.yaml"),
        ("conf/secrets.yaml", "may hold secrets; rename it"),
    ],
)
def test_a_config_file_that_is_not_sent_is_named(file: str, says: str) -> None:
    check_config_file(
        ["jobs.pretrain", "--config", "./conf/mine.yaml"], Path("."), frozenset(["conf/mine.yaml"])
    )
    with pytest.raises(ConfigError, match=re.escape(says)):
        check_config_file(["jobs.pretrain", f"--config={file}"], Path("."), frozenset(["jobs/a.py"]))


# The runtime environment


def test_the_shipped_runtime_environment_gives_a_stopped_run_time_for_its_last_checkpoint() -> None:
    assert int(read_runtime_env(SHIPPED)["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("workdir: .", "workdir is not a key of a runtime environment; did you mean working_dir"),
        ("env_var: {A: b}", "did you mean env_vars"),
        ("working_dir: .", "--working-dir FOLDER"),
        ("env_vars: {A: 1}", "env_vars"),
        ("excludes: runs", "excludes"),
        ("- a", "must hold a mapping"),
        ("env_vars: {AWS_SECRET_ACCESS_KEY: x}", "AWS_SECRET_ACCESS_KEY looks like a secret.*role"),
        ("env_vars: {AWS_ACCESS_KEY_ID: x}", "looks like a secret"),
        ("env_vars: {HF_TOKEN: x}", "looks like a secret"),
        ("env_vars: {DB_PASSWORD: x}", "looks like a secret"),
        ("env_vars: {WANDB_API_KEY: x}", "looks like a secret"),
        ("env_vars: {DB_PASS: x}", "looks like a secret"),
        ("env_vars: {SSH_PASSPHRASE: x}", "looks like a secret"),
        (
            "env_vars: {MLFLOW_TRACKING_URI: 'https://me:MARKER@host'}",
            "env_vars.MLFLOW_TRACKING_URI holds an address",
        ),
        ("pip: ['git+https://MARKER@github.com/me/mine']", "pip holds an address"),
    ],
)
def test_a_mistake_in_the_runtime_environment_is_refused(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "env.yaml").write_text(text)
    with pytest.raises(ConfigError, match=says) as error:
        read_runtime_env(tmp_path / "env.yaml")
    assert "MARKER" not in str(error.value)


def test_innocent_variables_are_let_through(tmp_path: Path) -> None:
    (tmp_path / "env.yaml").write_text(
        "env_vars: {TOKENIZERS_PARALLELISM: 'false', AWS_REGION: eu-west-1, MLFLOW_TRACKING_URI: 'http://host:5000'}\n"
        "pip: ['git+https://github.com/me/mine@v1.0', 'mine @ git+ssh://git@github.com/me/mine@v1']"
    )
    assert read_runtime_env(tmp_path / "env.yaml")["env_vars"]["AWS_REGION"] == "eu-west-1"


# What is refused before a cluster is asked

PRETRAIN = ["--", "jobs.pretrain", "name=x", "data.path=s3://b/i", "storage_path=s3://b/r"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "no job is given"),
        (["jobs.pretrain"], "unrecognized arguments: jobs.pretrain"),
        (["--stop"], "no job is given"),
        (["--", "jobs.pretrian"], "did you mean jobs.pretrain"),
        (["--", "jobs.cli.config"], "jobs.cli.config is not a job in"),
        ([*PRETRAIN, "optim.lrr=1"], "optim.lrr=1: unknown key"),
        (["--", "python", "-m", "jobs.pretrain", "optim.lrr=1"], "optim.lrr=1: unknown key"),
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
    """A server that answers every GET with `status` and `body`, and its address."""
    answer: dict[str, object] = {"status": 200, "body": "{}"}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answer["status"])  # type: ignore[arg-type]
            self.end_headers()
            self.wfile.write(str(answer["body"]).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", answer
    server.shutdown()


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


# On a head


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    with ray_head() as running:
        yield running


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this repository's code with a `.env` in it, committed."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in [*list_files(ROOT, []), "deploy/runtime_env.yaml"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    (folder / ".env").write_text(f"AWS_SECRET_ACCESS_KEY={MARKER}\n")
    for words in (["init", "-q"], ["add", "README.md"], ["commit", "-qm", "first"]):
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *who, *words], cwd=folder, check=True)
    return folder


@pytest.fixture
def on_head(head: RayHead, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> RayHead:
    """This process stands in the checkout, and its Ray clients go to the head."""
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", head.dashboard)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", MARKER)
    monkeypatch.chdir(checkout)
    return head


def job(tmp_path: Path, name: str, *more: str) -> list[str]:
    """A pretraining of STEPS steps on local images."""
    for i in range(24):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / f"images/{i}.jpg").write_bytes(draw_demo_image(list(PATTERNS)[i % 2], "train", i))
    arguments = [*TINY, f"name={name}", f"data.path={tmp_path}/images", f"storage_path={tmp_path}/runs"]
    arguments += ["data.label_from_parent=false", "eval.val_path=null", f"train.epochs={STEPS // 3}"]
    arguments += ["crops.kernel=torch", "checkpoint.every_steps=4", "resources.train_workers=1", *more]
    return ["--", "python", "-m", "jobs.pretrain", *arguments]


@pytest.mark.ray
@pytest.mark.slow
def test_a_stopped_run_is_continued_by_the_same_command_and_a_finished_one_left_alone(
    on_head: RayHead, checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, run = job(tmp_path, "first"), f"{tmp_path}/runs/first"
    submit("--no-wait", *command)
    assert re.search(r"first-a1: sending 0\.\d MB in \d+ files", capsys.readouterr().out)

    variables = {**on_head.env, "PYTHONPATH": str(checkout)}
    with start_job("jobs.submit", *command, env=variables, cwd=checkout) as follower:
        committed = follower.wait_until(lambda: committed_checkpoints(Directory(run)))
        submit("--stop", *command)
        assert "first-a1 stopped" in capsys.readouterr().out
        assert follower.wait() == 1
    assert read_mapping(Directory(run), "environment.json")["git_commit"] == commit_of(checkout) is not None
    # A job that was sent a moment ago may still be starting.
    assert re.search(r"first-a1 is (pending|running) since", follower.output)
    assert f"step 1/{STEPS}" in follower.output
    assert "stopped; the same command resumes from" in follower.output
    assert "Traceback" not in follower.output

    submit(*command)
    continued = capsys.readouterr().out
    assert continued.startswith("first-a1 stopped")
    resumed = re.search(r"resuming from step (\d+)", continued)
    assert resumed
    assert int(committed[-1].removeprefix("step_")) <= int(resumed[1]) < STEPS
    assert f"step {STEPS}/{STEPS}" in continued
    assert continued.rstrip().splitlines()[-1].startswith("first-a2 succeeded")
    assert json.loads(Path(run, "result.json").read_text())["steps"] == STEPS

    submit(*command)
    assert "first is done: first-a2 succeeded" in capsys.readouterr().out
    with pytest.raises(DinorayError, match=r"first had 2 attempts, first-a2 succeeded.*--max-attempts 3"):
        submit("--max-attempts=2", *command, f"train.epochs={STEPS}")
    submit("--stop", *command)
    assert "first is not running: first-a2 succeeded" in capsys.readouterr().out
    submit("--status", "--run", "first")
    assert re.findall(r"^(first-a\d) (\w+)", capsys.readouterr().out, flags=re.MULTILINE) == [
        ("first-a1", "stopped"),
        ("first-a2", "succeeded"),
    ]

    # Neither .env nor the environment of whoever submits is anywhere to be found.
    (attempt, _) = attempts_at(connect(on_head.dashboard), "first")
    assert attempt.info.metadata["run"] == "first"
    assert MARKER not in attempt.info.model_dump_json()
    assert MARKER not in continued
    everywhere = [*on_head.temp_dir.rglob("*"), *(tmp_path / "runs").rglob("*")]
    files = [file for file in everywhere if file.is_file()]
    assert any(file.name == "pretrain.py" for file in files)
    assert [file for file in files if MARKER.encode() in file.read_bytes()] == []


@pytest.mark.ray
@pytest.mark.slow
def test_the_exit_code_is_the_jobs_own(
    on_head: RayHead, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        submit(*job(tmp_path, "nothing", f"data.path={tmp_path}/none"))
    assert ended.value.code == 3
    output = capsys.readouterr().out
    assert f"error: data.path={tmp_path}/none: there is no such folder" in output
    assert output.rstrip().splitlines()[-1].startswith("nothing-a1 failed with exit code 3")


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_whose_directory_says_that_it_is_finished_is_left_alone_by_a_new_cluster(
    on_head: RayHead, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = job(tmp_path, "elsewhere")
    words = [word for word in command if "=" in word]
    load_config = importlib.import_module("dinoray.jobs.cli.config").load_config
    (tmp_path / "runs/elsewhere").mkdir(parents=True)
    (tmp_path / "runs/elsewhere/config.yaml").write_text(load_config(None, None, words).to_yaml())
    (tmp_path / "runs/elsewhere/result.json").write_text("{}")
    submit(*command)
    assert "elsewhere is done" in capsys.readouterr().out
    assert attempts_at(connect(on_head.dashboard), "elsewhere") == []


@pytest.mark.ray
@pytest.mark.slow
def test_the_doctor_looks_at_the_nodes(
    on_head: RayHead, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = job(tmp_path, "looked-at")
    settings = [word for word in words if "=" in word]
    importlib.import_module("jobs.doctor").main(["--address", on_head.dashboard, *settings])
    lines = capsys.readouterr().out.splitlines()
    for beginning in (
        "ok    job server    http://127.0.0.1:",
        f"ok    data          cluster: here: {tmp_path}/images: 24 listed",
        "ok    cluster       cluster: joined, Ray 2.60",
        "ok    nodes         cluster: 1 x head: 4 CPUs, 0 GPUs",
        "ok    CPUs          cluster: 4 CPUs, the run needs 3",
        "ok    dashboard     cluster: 127.0.0.1:",
        "ok    data          cluster: head ",
        "ok    clock         cluster: head ",
    ):
        assert any(line.startswith(beginning) for line in lines), (beginning, lines)
    assert not any(line.startswith("FAIL") for line in lines)


@pytest.mark.ray
@pytest.mark.slow
def test_ray_s_own_command_submits_the_same_job(on_head: RayHead, checkout: Path) -> None:
    words = ["job", "submit", "--working-dir", ".", "--", "python", "-m", "jobs.pretrain", "optim.lrr=1"]
    failed = subprocess.run(
        [RAY, *words], cwd=checkout, env=on_head.env, capture_output=True, text=True, timeout=120, check=False
    )
    assert failed.returncode == 1
    assert "error: optim.lrr=1" in failed.stdout
    assert "Traceback" not in failed.stdout
