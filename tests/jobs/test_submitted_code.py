"""What `python -m jobs.submit` sends: the code, no secrets or results, and a runtime environment without mistakes."""

import os
import re
import zipfile
from pathlib import Path

import pytest
from paths import ROOT

from dinoray.jobs.cluster.upload import (
    MAX_BYTES,
    check_config_file,
    list_files,
    named_files,
    pack,
    read_runtime_env,
)
from dinoray.models.errors import ConfigError

SHIPPED = ROOT / "deploy" / "runtime_env.yaml"


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
def test_a_job_gets_the_code_in_as_many_bytes_as_is_said(tmp_path: Path, excludes: list[str]) -> None:
    archive = pack(ROOT, excludes, tmp_path / "code.zip")
    (said,) = re.findall(
        r"\((\d\.\d) MB; no tests, pictures or secrets\)", (ROOT / "jobs/README.md").read_text()
    )
    assert abs(archive.num_bytes / 1e6 - float(said)) < 0.05
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
    words = ["jobs.pretrain", "--config", f"{tmp_path}/tests/mine.yaml", "init.from=./tests/weights.pth"]
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
