"""What Ray, EC2 and our own rules say of a cluster.yaml; and mistakes that each rule finds."""

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import botocore.session
import botocore.validate
import cluster_lints as lints
import yaml
from cluster_lints import Config, Lint
from paths import ROOT

TEXT = (ROOT / "cluster.yaml").read_text()


Change = Callable[[Config], object]


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


def ray_checks(tree: Config) -> None:
    """What `ray up` does first: fill in the defaults, then look at the schema, the head type and the sums."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(tree))


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
    (lints.unpinned_image, change_docker(image="rayproject/ray:2.57.0-py311-cpu")),
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
