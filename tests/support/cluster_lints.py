"""What is wrong with a cluster.yaml that neither Ray's schema nor EC2 would notice: each lint lists its finds."""

import re
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from paths import ROOT

from dinoray.jobs.cluster.upload import SECRET_FILES

Config = dict[str, Any]
Lint = Callable[[Config], list[str]]

PYPROJECT = (ROOT / "pyproject.toml").read_text()
RAY = Requirement(re.findall(r'"(ray\[.*)"', PYPROJECT)[0]).specifier
PYTHON = SpecifierSet(re.findall(r'requires-python = "(.*)"', PYPROJECT)[0])


def min_above_max(tree: Config) -> list[str]:
    types = tree["available_node_types"].items()
    return [k for k, v in types if v.get("min_workers", 0) > v.get("max_workers", tree["max_workers"])]


def mins_above_total(tree: Config) -> list[str]:
    total = sum(v.get("min_workers", 0) for v in tree["available_node_types"].values())
    return [f"{total} > {tree['max_workers']}"] if total > tree["max_workers"] else []


def never_grows(tree: Config) -> list[str]:
    """Worker types, or `max_workers` for all of them, of which no node may ever be started."""
    workers = {k: v for k, v in tree["available_node_types"].items() if k != tree["head_node_type"]}
    stuck = [k for k, v in workers.items() if v.get("max_workers", tree["max_workers"]) < 1]
    return stuck + (["max_workers"] if tree["max_workers"] < 1 else [])


def costs_at_rest(tree: Config) -> list[str]:
    return [k for k, v in tree["available_node_types"].items() if v.get("min_workers", 0)]


def head_takes_tasks(tree: Config) -> list[str]:
    resources = tree["available_node_types"][tree["head_node_type"]].get("resources", {})
    return [] if resources.get("CPU") == 0 else [f"resources: {resources}"]


def unpinned_image(tree: Config) -> list[str]:
    """Images of others than Ray, and those whose tag is not platform and a release of Ray and of Python that
    pyproject.toml allows."""
    tags = {
        image: re.fullmatch(r"rayproject/ray(-ml)?:([\d.]+)-py3(\d+)-(cpu|cu\d+)", image)
        for image in _images(tree)
    }
    return [image for image, tag in tags.items() if not (tag and tag[2] in RAY and f"3.{tag[3]}" in PYTHON)]


def unlike_images(tree: Config) -> list[str]:
    """All images, where they differ in Ray or Python: nodes of two kinds refuse one another."""
    images = _images(tree)
    return images if len({image.rpartition(":")[2].rpartition("-")[0] for image in images}) > 1 else []


def zone_of_another_region(tree: Config) -> list[str]:
    zones = tree["provider"].get("availability_zone", "").split(",")
    return [zone for zone in zones if not zone.startswith(tree["provider"]["region"])]


def metadata_v1(tree: Config) -> list[str]:
    options = {
        k: v["node_config"].get("MetadataOptions", {}) for k, v in tree["available_node_types"].items()
    }
    return [
        k
        for k, v in options.items()
        if (v.get("HttpTokens"), v.get("HttpPutResponseHopLimit")) != ("required", 2)
    ]


def wrong_market(tree: Config) -> list[str]:
    """Node types that are spot and should not be, or the other way round: CPU workers are, and nothing else."""
    wrong = []
    for name, kind in tree["available_node_types"].items():
        has_gpus = re.match(r"[gp]\d", kind["node_config"]["InstanceType"])
        spot = kind["node_config"].get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        if spot == (has_gpus is not None or name == tree["head_node_type"]):
            wrong.append(name)
    return wrong


def never_starts_ray(tree: Config) -> list[str]:
    return [which for which in ("head", "worker") if len(_start_lines(tree, which)) != 1]


def spills_to_root(tree: Config) -> list[str]:
    """`ray start` lines that do not spill to a path which is mounted from the host."""
    mounts = [option.split(":")[-1] for option in tree["docker"]["run_options"] if option.startswith("-v ")]
    wrong = []
    for line in _start_lines(tree, "head") + _start_lines(tree, "worker"):
        spill = re.search(r"--object-spilling-directory=(\S+)", line)
        if spill is None or not any(spill[1].startswith(mount + "/") for mount in mounts):
            wrong.append(line)
    return wrong


def head_cannot_scale(tree: Config) -> list[str]:
    flag = "--autoscaling-config=~/ray_bootstrap_config.yaml"
    return [line for line in _start_lines(tree, "head") if flag not in line.split()]


def open_dashboard(tree: Config) -> list[str]:
    """`ray start` lines of the head with any but one `--dashboard-host`, that of loopback."""
    hosts = [re.findall(r"--dashboard-host[= ]*(\S+)", line) for line in _start_lines(tree, "head")]
    return [str(found) for found in hosts if found != ["127.0.0.1"]]


def not_installed(tree: Config) -> list[str]:
    """Node types that would start Ray without this project's dependencies."""
    shared = tree["worker_setup_commands"]
    setups = {k: v.get("worker_setup_commands", shared) for k, v in tree["available_node_types"].items()}
    setups[tree["head_node_type"]] = tree["head_setup_commands"]
    installs = [re.compile(rf"pip install .*-e {re.escape(path)}(\s|$)") for path in tree["file_mounts"]]
    return [k for k, commands in setups.items() if not any(i.search(c) for i in installs for c in commands)]


def uploads_too_much(tree: Config) -> list[str]:
    return sorted({"/runs", "/data", ".venv", ".git", *SECRET_FILES} - set(tree["rsync_exclude"]))


def not_shell(tree: Config) -> list[str]:
    """Commands that bash cannot parse."""
    return [
        c for c in _commands(tree) if subprocess.run(["bash", "-n", "-c", c], capture_output=True).returncode
    ]


def deaf_to_spot_notices(tree: Config) -> list[str]:
    """The worker start commands, when none of them watches the notice in the background, after Ray has started."""
    commands = tree["worker_start_ray_commands"]
    watch = re.compile(r"setsid nohup (\S+)/deploy/spot_watcher\.sh \$RAY_HEAD_IP:6379 .*</dev/null &")
    watched = watch.fullmatch(commands[-1])
    return [] if watched and watched[1] in tree["file_mounts"] else commands


def keeps_stopped_nodes(tree: Config) -> list[str]:
    return [] if tree["provider"].get("cache_stopped_nodes") is False else [str(tree["provider"])]


def open_to_everyone(tree: Config) -> list[str]:
    """What is missing for a cluster that answers only to those who have the token."""
    token = "~/.ray/auth_token"
    missing = []
    modes = re.findall(r"RAY_AUTH_MODE=(\S+)", " ".join([*tree["docker"]["run_options"], *_commands(tree)]))
    if modes != ["token"] or "--env RAY_AUTH_MODE=token" not in tree["docker"]["run_options"]:
        missing.append("RAY_AUTH_MODE")
    if tree["file_mounts"].get(token) != token:
        missing.append(token)
    if f"chmod 600 {token}" not in tree["head_setup_commands"]:
        missing.append("mode 0600")
    return missing


def wrong_role(tree: Config) -> list[str]:
    """Node types whose instance profile is not the head's, for the head, and the workers', for all others."""
    profiles = {
        k: v["node_config"].get("IamInstanceProfile", {}).get("Arn", "")
        for k, v in tree["available_node_types"].items()
    }
    suffix = {k: "head" if k == tree["head_node_type"] else "worker" for k in profiles}
    return [k for k, arn in profiles.items() if not arn.endswith(f"-{suffix[k]}")]


def disks_outlive_nodes(tree: Config) -> list[str]:
    return [
        k
        for k, v in tree["available_node_types"].items()
        for disk in v["node_config"].get("BlockDeviceMappings", [])
        if disk["Ebs"].get("DeleteOnTermination") is not True
    ]


def names_nodes(tree: Config) -> list[str]:
    """Labels and resources of our own: no job of ours asks for any."""
    own = {
        k: set(v["resources"]) - {"CPU"} or v.get("labels") for k, v in tree["available_node_types"].items()
    }
    return [k for k, names in own.items() if names]


def secrets(text: str) -> list[str]:
    """What looks like a credential, or like the number of somebody's account."""
    patterns = (
        r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
        r"-----BEGIN",
        r"""(?i)(?:secret|password|token|key)\w*["']?\s*[:=]\s*["']?[\w/+-]{16,}""",
        r"arn:aws:iam::(?!123456789012)\d{12}",
    )
    return [match[0] for pattern in patterns for match in re.finditer(pattern, text)]


def _images(tree: Config) -> list[str]:
    dockers = [tree["docker"], *(v.get("docker", {}) for v in tree["available_node_types"].values())]
    return [
        v for docker in dockers for k, v in docker.items() if k in ("image", "head_image", "worker_image")
    ]


def _start_lines(tree: Config, which: str) -> list[str]:
    return [line for line in tree[f"{which}_start_ray_commands"] if "ray start" in line]


def _commands(tree: Config) -> Iterator[str]:
    for section in (tree, *tree["available_node_types"].values()):
        for key, commands in section.items():
            if key.endswith("_commands"):
                yield from commands
