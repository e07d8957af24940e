"""cluster.yaml against Ray's own schema, against what EC2 accepts, and against what neither of them looks at.

All of it offline: a fixture takes the credentials away and refuses every connection.
"""

import os
import re
import socket
import subprocess
import zipfile
from pathlib import Path

import cluster_lints as lints
import pytest
from cluster_checks import (
    LINTS,
    TEXT,
    Change,
    change_docker,
    change_node,
    change_type,
    config,
    ec2_complaints,
    ray_checks,
)
from cluster_lints import Config, Lint
from paths import ROOT
from ray_releases import uses_private_ray
from servers import use_aws


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    use_aws(monkeypatch, {})

    def refuse(_socket: socket.socket, address: object) -> None:
        raise AssertionError(f"a check of cluster.yaml connected to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


# What Ray checks


@uses_private_ray
def test_ray_accepts_the_file() -> None:
    ray_checks(config())


@uses_private_ray
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(max_worker=3), "'max_worker' was unexpected"),
        (change_type("augment", InstanceType="c6id.8xlarge"), "'InstanceType' was unexpected"),
        (change_type("augment", resources={"CPU": 0.5}), "0.5 is not of type 'integer'"),
        (change_type("augment", min_workers=99), "smaller than the sum of `min_workers`"),
        (change_docker(container_name=None), "Must provide a container & image name"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_ray_refuses_a_mistake(change: Change, says: str) -> None:
    with pytest.raises(Exception, match=says):
        ray_checks(config(change))


# What EC2 checks


def test_every_node_type_is_a_request_that_ec2_understands() -> None:
    assert ec2_complaints(config()) == []


@pytest.mark.parametrize("name", ["head", "augment", "train"])
@pytest.mark.parametrize(
    "mistake",
    [
        {"InstanceTyp": "m6id.2xlarge"},
        {"MetadataOptions": {"HttpToken": "required"}},
        {"BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": "200"}}]},
        {"InstanceMarketOptions": "spot"},
    ],
    ids=str,
)
def test_ec2_would_refuse_a_mistake(mistake: Config, name: str) -> None:
    (complaint,) = ec2_complaints(config(change_node(name, **mistake)))
    assert complaint.startswith(name)


# What neither checks


@pytest.mark.parametrize("lint", dict.fromkeys(lint for lint, _ in LINTS), ids=lambda lint: lint.__name__)
def test_the_file_passes_the_lint(lint: Lint) -> None:
    assert lint(config()) == []


@pytest.mark.parametrize(
    ("lint", "breaks"), LINTS, ids=lambda x: x.__name__ if x.__module__ == lints.__name__ else ""
)
def test_the_lint_finds_what_it_looks_for(lint: Lint, breaks: Change) -> None:
    assert lint(config(breaks)) != []


def test_the_file_holds_no_secrets() -> None:
    assert lints.secrets(TEXT) == []


@pytest.mark.parametrize(
    "line",
    [
        "# my key is " + "AKIA" + "IOSFODNN7EXAMPLE",
        "run_options: [-e AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMIK7MDENGbPxRfiCY]",
        'env: {"WANDB_API_KEY": "0123456789abcdef0123456789abcdef"}',
        "-----BEGIN RSA PRIVATE KEY-----",
        "Arn: arn:aws:iam::210987654321:instance-profile/dinoray-head",
    ],
)
def test_a_secret_is_found(line: str) -> None:
    assert len(lints.secrets(f"{TEXT}\n{line}\n")) == 1


def test_every_placeholder_is_marked_for_editing() -> None:
    placeholders = re.compile(r"123456789012|ami-0{17}|^ *(region|availability_zone):")
    lines = [line for line in TEXT.splitlines() if placeholders.search(line)]
    assert len(lines) == 6
    assert [line for line in lines if "# EDIT" not in line] == []


# The local disk


def mounts(folder: Path, *, disks: int = 0, mounted: str = "", holds_files: bool = False) -> list[str]:
    """What initialization_commands do as root on a node with raw local disks, or one that is mounted there already."""
    by_id = folder / "by-id"
    by_id.mkdir()
    for number in range(disks):
        (by_id / f"nvme-Amazon_EC2_NVMe_Instance_Storage_AWS{number}").touch()
    done, table = folder / "done", folder / "mounted"
    done.touch()
    table.write_text(f"{mounted}\n")
    for name, script in {
        "sudo": f'echo "$@" | sed "s|{by_id}/nvme.*_||" >>{done}; case $1 in mount|mkfs.ext4) exec "$@";; esac',
        "mountpoint": f'grep -qxF "$2" {table}',
        "mount": f'[[ $1 = --bind || -s $1 ]] && echo "${{@: -1}}" >>{table}',
        "mkfs.ext4": 'echo files >"$2"',
    }.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    if holds_files:
        next(by_id.iterdir()).write_text("files")
    for command in config()["initialization_commands"]:
        here = command.replace("/dev/disk/by-id", str(by_id))
        path = f"{folder}:{os.environ['PATH']}"
        assert subprocess.run(["bash", "-c", here], env={"PATH": path}).returncode == 0
    return [line for line in done.read_text().splitlines() if line.startswith(("mount", "mkfs"))]


def test_a_raw_local_disk_is_formatted_and_mounted(tmp_path: Path) -> None:
    assert mounts(tmp_path, disks=1) == ["mount AWS0 /mnt/nvme", "mkfs.ext4 -q AWS0", "mount AWS0 /mnt/nvme"]


def test_of_two_raw_disks_one_is_enough(tmp_path: Path) -> None:
    assert mounts(tmp_path, disks=2)[-1] == "mount AWS0 /mnt/nvme"


def test_a_disk_that_can_be_mounted_is_not_formatted(tmp_path: Path) -> None:
    assert mounts(tmp_path, disks=1, holds_files=True) == ["mount AWS0 /mnt/nvme"]


def test_a_disk_that_the_image_has_mounted_is_used_as_it_is(tmp_path: Path) -> None:
    assert mounts(tmp_path, disks=1, mounted="/opt/dlami/nvme") == ["mount --bind /opt/dlami/nvme /mnt/nvme"]


def test_what_is_mounted_already_is_left_alone(tmp_path: Path) -> None:
    assert mounts(tmp_path, disks=1, mounted="/mnt/nvme") == []


def test_a_node_without_a_local_disk_starts_too(tmp_path: Path) -> None:
    assert mounts(tmp_path) == []


# What `ray job submit --working-dir .` takes along


@uses_private_ray
def test_a_submitted_job_leaves_secrets_and_results_at_home(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    project = tmp_path / "project"
    stays = [".env", "runs/first/metrics.jsonl", ".venv/bin/python", "jobs/__pycache__/pretrain.pyc"]
    for name in [*stays, "jobs/pretrain.py", "pyproject.toml"]:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("x")
    (project / ".gitignore").write_text((ROOT / ".gitignore").read_text())
    create_package(str(project), tmp_path / "job.zip", include_gitignore=True)
    with zipfile.ZipFile(tmp_path / "job.zip") as package:
        files = {name for name in package.namelist() if not name.endswith("/")}
    assert files == {".gitignore", "jobs/pretrain.py", "pyproject.toml"}
