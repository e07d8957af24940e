"""cluster.yaml against Ray's own schema, against what EC2 accepts, and against what neither of them looks at.

All of it offline: a fixture takes the credentials away and refuses every connection.
"""

import json
import os
import re
import socket
import subprocess
import zipfile
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import botocore.session
import botocore.validate
import cluster_lints as lints
import pytest
import yaml
from cluster_lints import Config, Lint
from servers import use_aws

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "cluster.yaml").read_text()

Change = Callable[[Config], object]

uses_private_ray = pytest.mark.skipif(
    not version("ray").startswith("2.60."), reason="reads modules that are private to Ray, known for 2.60"
)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    use_aws(monkeypatch, {})

    def refuse(_socket: socket.socket, address: object) -> None:
        raise AssertionError(f"a check of cluster.yaml connected to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@lru_cache
def parsed() -> str:
    return json.dumps(yaml.safe_load(TEXT))


def config(change: Change = lambda _: None) -> Config:
    """The file as Ray reads it, with this change made to the copy. Anchors are written out: nothing is shared."""
    tree: Config = json.loads(parsed())
    change(tree)
    return tree


def change_type(name: str, **values: Any) -> Change:
    """Set keys of a node type; None takes the key away."""
    return lambda c: set_keys(c["available_node_types"][name], values)


def change_node(name: str, **values: Any) -> Change:
    """Set keys of a node type's node_config; None takes the key away."""
    return lambda c: set_keys(c["available_node_types"][name]["node_config"], values)


def change_docker(**values: Any) -> Change:
    return lambda c: set_keys(c["docker"], values)


def change_commands(which: str, old: str, new: str) -> Change:
    """Replace a text in the commands that start Ray."""
    key = f"{which}_start_ray_commands"
    return lambda c: c.update({key: [command.replace(old, new) for command in c[key]]})


def set_keys(section: Config, values: Config) -> None:
    section.update(values)
    for key in [k for k, v in values.items() if v is None]:
        del section[key]


# What Ray checks


def ray_checks(tree: Config) -> None:
    """What `ray up` does first: fill in the defaults, then look at the schema, the head type and the sums."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(tree))


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


@lru_cache
def run_instances() -> Any:
    ec2 = botocore.session.get_session().get_service_model("ec2")
    return ec2.operation_model("RunInstances").input_shape


def ec2_complaints(tree: Config) -> list[str]:
    """What botocore would refuse to send as RunInstances."""
    complaints = []
    for name, kind in tree["available_node_types"].items():
        request = {**kind["node_config"], "MinCount": 1, "MaxCount": 1}
        report = botocore.validate.ParamValidator().validate(request, run_instances())
        if report.has_errors():
            complaints.append(f"{name}: {report.generate_report()}")
    return complaints


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

LINTS: list[tuple[Lint, Change]] = [
    (lints.min_above_max, change_type("train", min_workers=3)),
    (lints.mins_above_total, change_type("train", min_workers=11)),
    (lints.never_grows, change_type("train", max_workers=0)),
    (lints.never_grows, lambda c: c.update(max_workers=0)),
    (lints.costs_at_rest, change_type("augment", min_workers=1)),
    (lints.head_takes_tasks, change_type("head", resources={})),
    (lints.head_takes_tasks, change_type("head", resources={"CPU": 1})),
    (lints.head_takes_tasks, lambda c: c["available_node_types"]["head"].pop("resources")),
    (lints.unpinned_image, change_docker(image="rayproject/ray")),
    (lints.unpinned_image, change_docker(image="rayproject/ray:latest-py311-cpu")),
    (lints.unpinned_image, change_docker(image="rayproject/ray:2.61.0-py311-cpu")),
    (lints.unpinned_image, change_docker(head_image="rayproject/ray:nightly-py311-cpu")),
    (lints.unpinned_image, change_type("train", docker={"worker_image": "rayproject/ray:nightly"})),
    (lints.unpinned_image, change_docker(image="somebody/ray:2.60.0-py311-cpu")),
    (lints.unpinned_image, change_docker(image="rayproject/ray:2.60.0-py39-cpu")),
    (
        lints.unlike_images,
        change_type("train", docker={"worker_image": "rayproject/ray:2.60.0-py312-cpu"}),
    ),
    (lints.zone_of_another_region, lambda c: c["provider"].update(region="eu-west-1")),
    (lints.metadata_v1, change_node("head", MetadataOptions=None)),
    (lints.metadata_v1, change_node("train", MetadataOptions={"HttpTokens": "required"})),
    (
        lints.metadata_v1,
        change_node("augment", MetadataOptions={"HttpTokens": "optional", "HttpPutResponseHopLimit": 2}),
    ),
    (lints.wrong_market, change_node("augment", InstanceMarketOptions=None)),
    (lints.wrong_market, change_node("train", InstanceMarketOptions={"MarketType": "spot"})),
    (lints.wrong_market, change_node("head", InstanceMarketOptions={"MarketType": "spot"})),
    (lints.never_starts_ray, lambda c: c.update(worker_start_ray_commands=["ray stop"])),
    (lints.spills_to_root, change_commands("head", "--object-spilling-directory=/mnt/nvme/spill", "")),
    (lints.spills_to_root, change_commands("worker", "--object-spilling-directory=/mnt/nvme/spill", "")),
    (lints.spills_to_root, change_commands("worker", "=/mnt/nvme/spill", "=/tmp/spill")),
    (lints.spills_to_root, change_docker(run_options=[])),
    (
        lints.head_cannot_scale,
        change_commands("head", "--autoscaling-config=~/ray_bootstrap_config.yaml", ""),
    ),
    (lints.open_dashboard, change_commands("head", "127.0.0.1", "0.0.0.0")),
    (lints.open_dashboard, change_commands("head", "=127.0.0.1", "=127.0.0.1 --dashboard-host 0.0.0.0")),
    (lints.not_installed, lambda c: c.update(head_setup_commands=[])),
    (lints.not_installed, lambda c: c.update(worker_setup_commands=["pip install torch"])),
    (lints.not_installed, change_type("augment", worker_setup_commands=[])),
    (lints.not_installed, lambda c: c.update(file_mounts={})),
    (lints.uploads_too_much, lambda c: c["rsync_exclude"].remove("*.env")),
    (lints.uploads_too_much, lambda c: c["rsync_exclude"].remove("*.pem")),
    (lints.not_shell, lambda c: c["initialization_commands"].append("if true; echo")),
    (lints.not_shell, change_commands("worker", "ulimit", "(ulimit")),
    (lints.deaf_to_spot_notices, lambda c: c["worker_start_ray_commands"].pop()),
    (lints.deaf_to_spot_notices, change_commands("worker", "</dev/null &", "</dev/null")),
    (lints.deaf_to_spot_notices, change_commands("worker", "~/dinoray/deploy", "~/elsewhere/deploy")),
    (lints.deaf_to_spot_notices, lambda c: c["worker_start_ray_commands"].reverse()),
    (lints.keeps_stopped_nodes, lambda c: c["provider"].pop("cache_stopped_nodes")),
    (lints.keeps_stopped_nodes, lambda c: c["provider"].update(cache_stopped_nodes=True)),
    (lints.open_to_everyone, lambda c: c["docker"]["run_options"].pop()),
    (lints.open_to_everyone, lambda c: c["docker"]["run_options"].append("--env RAY_AUTH_MODE=disabled")),
    (lints.open_to_everyone, change_commands("head", "ulimit", "export RAY_AUTH_MODE=disabled; ulimit")),
    (lints.open_to_everyone, lambda c: c["file_mounts"].pop("~/.ray/auth_token")),
    (lints.open_to_everyone, lambda c: c["head_setup_commands"].remove("chmod 600 ~/.ray/auth_token")),
    (lints.wrong_role, change_node("head", IamInstanceProfile=None)),
    (lints.wrong_role, change_node("train", IamInstanceProfile={"Arn": "instance-profile/dinoray-head"})),
    (lints.disks_outlive_nodes, change_node("augment", BlockDeviceMappings=[{"Ebs": {"VolumeSize": 200}}])),
    (lints.names_nodes, change_type("augment", labels={"pool": "augment"})),
    (lints.names_nodes, change_type("train", resources={"train": 4})),
]


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
