"""deploy/runtime_env.yaml: what Ray makes of it, and what it keeps at home. Ray accepts unknown keys without a word."""

import shutil
import zipfile
from pathlib import Path

import cluster_lints as lints
import yaml
from paths import ROOT
from ray.runtime_env import RuntimeEnv
from ray_releases import uses_private_ray

from dinoray.jobs.cluster.upload import NO_JOB_READS, SECRET_FILES, list_files

TEXT = (ROOT / "deploy" / "runtime_env.yaml").read_text()
TREE = yaml.safe_load(TEXT)


def unknown(tree: dict[str, object]) -> set[str]:
    return set(tree) - RuntimeEnv.known_fields


def test_ray_knows_every_key() -> None:
    assert unknown(TREE) == set()
    assert unknown(TREE | {"excluded": []}) == {"excluded"}


def test_ray_accepts_it_with_a_working_directory() -> None:
    assert RuntimeEnv(working_dir="s3://BUCKET/job.zip", **TREE)["env_vars"] == TREE["env_vars"]


def test_a_stopped_driver_has_time_to_end() -> None:
    assert TREE["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "60"}


def test_what_stays_at_home_with_ours_stays_at_home_with_rays_own_command() -> None:
    assert set(SECRET_FILES) <= set(TREE["excludes"])
    assert {f"{folder}/" for folder in NO_JOB_READS} <= set(TREE["excludes"])


def test_nodes_get_no_folder_that_neither_jobs_nor_nodes_read() -> None:
    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    assert set(NO_JOB_READS) - set(cluster["rsync_exclude"]) == {"/deploy"}  # spot_watcher.sh runs on nodes


def test_it_holds_no_secrets() -> None:
    assert lints.secrets(TEXT) == []


AT_HOME = [
    ".env",
    ".env.local",
    "key.pem",
    ".git/config",
    ".venv/bin/python",
    "venv/bin/python",
    "jobs/__pycache__/pretrain.pyc",
    ".pytest_cache/x",
    ".hypothesis/x",
    "dinoray.egg-info/PKG-INFO",
    "build/x",
    "dist/x",
    "data/cat.jpg",
    "runs/first/metrics.jsonl",
    "cache/x",
    "weights.pth",
    "models/weights.safetensors",
    "part.parquet",
]
AT_HOME += ["tests/test_a.py", "benchmarks/a.png", "deploy/runtime_env.yaml", ".ci/run"]
TAKEN = ["jobs/pretrain.py", "models/data/table.json", "pyproject.toml", "models/tests/table.json"]


@uses_private_ray
def test_a_submitted_job_brings_code_along_and_nothing_else(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    project = tmp_path / "project"
    for name in AT_HOME + TAKEN:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("x")
    create_package(str(project), tmp_path / "job.zip", include_gitignore=True, excludes=TREE["excludes"])
    with zipfile.ZipFile(tmp_path / "job.zip") as package:
        assert {name for name in package.namelist() if not name.endswith("/")} == set(TAKEN)


@uses_private_ray
def test_rays_own_command_sends_the_files_that_submit_sends(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    project = tmp_path / "project"
    caches = shutil.ignore_patterns(
        ".git", "__pycache__", ".*_cache", ".hypothesis", "runs", ".venv", "*.egg-info"
    )
    shutil.copytree(ROOT, project, ignore=caches)
    create_package(str(project), tmp_path / "job.zip", include_gitignore=True, excludes=TREE["excludes"])
    with zipfile.ZipFile(tmp_path / "job.zip") as package:
        sent = {name for name in package.namelist() if not name.endswith("/")}
    assert sent == set(list_files(project, TREE["excludes"]))
