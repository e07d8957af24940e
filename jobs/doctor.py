"""Check the cluster, data and storage of a run: `dinoray doctor [--address ADDRESS] [--json] [key=value ...]`.

One line for each thing that was looked at: ok, warn or FAIL, and what to do. Without an address it looks at this
machine; with that of a dashboard (http://...) it sends itself to the cluster as a job and looks around there.
`dinoray doctor RUN` checks the files of a run or study instead: who trains it, checkpoints, what a resume would use.
"""

import json
import os
import re
import shlex
import socket
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
import requests
from ray.exceptions import AuthenticationError

from dinoray.jobs.cli.arguments import CommandLine
from dinoray.jobs.cli.auto_facts import Facts
from dinoray.jobs.cli.auto_recipe import AUTO
from dinoray.jobs.cli.main import not_started, run_main, wants_token
from dinoray.jobs.cli.quiet import quiet_ray
from dinoray.jobs.cluster.job_server import attempts_at, connect, dashboard_address, finish, submit
from dinoray.jobs.cluster.machine_checks import (
    Finding,
    check_clock,
    check_data,
    check_disk,
    check_open_files,
    check_packages,
    check_storage,
    failed,
    machine_facts,
)
from dinoray.jobs.cluster.node_checks import (
    check_dashboard,
    check_fit,
    check_labels,
    check_nodes,
    check_object_store,
    living_nodes,
    look_at_nodes,
)
from dinoray.jobs.cluster.run_checks import check_files
from dinoray.jobs.cluster.upload import pack, read_runtime_env
from dinoray.jobs.runs.choosing import Asked, choose_by
from dinoray.jobs.runs.data_contents import look_into_data
from dinoray.models.commands import command
from dinoray.models.errors import ConfigError, DinorayError, ResourceError, one_line, redact_credentials
from dinoray.pipeline.storage.files import is_s3, is_shared_path, normal_uri
from dinoray.pipeline.worker.config import Config

_RUNTIME_ENV = Path("deploy/runtime_env.yaml")
_SETTING = re.compile(r"[\w.]+=")
"""How a setting begins; the address of a run does not."""
_TOLD = (
    "backbone.name",
    "crops.global_crop_size",
    "train.global_batch_size",
    "train.epochs",
    "optim.base_lr",
)
"""Settings that are named of all that the recipe auto would choose."""


def main(argv: Sequence[str]) -> None:
    """Look at everything, and end with the exit code of the first thing that fails."""
    parser = CommandLine(
        "doctor",
        description="Check the cluster, data and storage of a run, or the checkpoints of a run or study.",
    )
    parser.add_argument(
        "run",
        nargs="?",
        default=None,
        metavar="RUN",
        help="run directory or study whose files are checked, local or S3",
    )
    parser.add_argument(
        "--address",
        default=None,
        help="http://HOST:PORT of a dashboard or HOST:PORT of a head "
        "(default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, else this machine)",
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--verbose", action="store_true", help="show Ray's own logs")
    parser.add_recipe()
    parser.add_overrides("data.path=s3://BUCKET/images")
    arguments = parser.parse_args(argv)
    if arguments.run and _SETTING.match(arguments.run):
        arguments.overrides, arguments.run = [arguments.run, *arguments.overrides], None
    if arguments.run and arguments.overrides:
        raise ConfigError(
            f"doctor {arguments.run} checks files and takes no settings; leave out {arguments.overrides[0]}"
        )
    findings = []
    for finding in check_files(arguments.run) if arguments.run else _findings(arguments):
        findings.append(finding)
        if not arguments.json:
            print(f"{finding.verdict:4}  {finding.name:12}  {finding.text}", flush=True)
    code = next((finding.exit_code for finding in findings if finding.verdict == "FAIL"), 0)
    if arguments.json:
        print(json.dumps({"exit_code": code, "findings": [finding._asdict() for finding in findings]}))
    if code:
        sys.exit(code)


def _findings(arguments: Namespace) -> Iterator[Finding]:
    asked = Asked(arguments.recipe, arguments.config, arguments.overrides)
    config = asked.config()
    recipe = None if config.recipe == AUTO else config.recipe
    on_images: Facts | None = None
    address = arguments.address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    yield from check_packages()
    try:
        facts: Any = machine_facts()
        yield check_open_files(facts["open_files"], "here")
        for folder, room in facts["disks"].items():
            yield check_disk(folder, room, "here")
        if address and address.startswith(("http://", "https://")):
            yield from _ask(address, arguments)
            return
        for source in config.data.each_source:
            data = check_data(source, access=config.storage.access)
            yield data
            if data.verdict != "FAIL" and _is_there(source.path):
                found, on_images = _look_into(config.model_copy(update={"data": source}), asked, recipe)
                yield from (one for one in found if one.name != "next" or not config.data.mix)
        if config.data.mix:
            others = [word for word in arguments.overrides if not word.startswith("data.mix")]
            named = ["--recipe", recipe] if recipe else []
            yield Finding("ok", "next", command("pretrain", *named, config.data.address, *others))
        yield _check_storage(config, is_local=not address)
        for place in {is_s3(source.path): source.path for source in config.data.each_source}.values():
            yield from check_clock(place, config.storage.access)
        dashboard = _start_or_join(address, verbose=arguments.verbose)
        try:
            yield from _look_around(config, dashboard, is_local=not address)
            if on_images and recipe is None and not config.data.mix:
                yield _what_auto_chooses(on_images, asked)
        finally:
            ray.shutdown()
    except DinorayError as error:
        yield failed("cluster", error)


def _is_there(path: str) -> bool:
    """False for demo images that the first run generates."""
    return is_s3(path) or Path(normal_uri(path)).exists()


def _look_into(config: Config, asked: Asked, recipe: str | None) -> tuple[list[Finding], Facts | None]:
    try:
        lines, facts = look_into_data(config, recipe=recipe, overrides=asked.overrides)
    except DinorayError as error:
        return [failed("contents", error)], None
    return [Finding(*line) for line in lines], facts


def _what_auto_chooses(facts: Facts, asked: Asked) -> Finding:
    """What the recipe auto would choose for these images on the nodes that are up; a GPU's memory is not known."""
    have = ray.cluster_resources()
    facts = facts._replace(gpus=int(have.get("GPU", 0)), cpus=max(1, int(have.get("CPU", 1))))
    typed = " ".join(one.typed for one in choose_by(facts, asked).choices if one.key in _TOLD)
    config = ["--config", str(asked.file)] if asked.file else []
    every = command("pretrain", *config, *asked.overrides, "--print-config")
    return Finding("ok", "auto", f"{facts.line}: {typed}; `{every}` prints all choices")


def _check_storage(config: Config, *, is_local: bool) -> Finding:
    path = config.storage_path
    if not is_local and not is_shared_path(path):
        text = (
            f"storage_path={path} would lie in a temporary folder of the cluster; set storage_path=s3://..."
        )
        return Finding("FAIL", "storage", text, ConfigError.exit_code)
    return check_storage(path)


def _start_or_join(address: str | None, *, verbose: bool) -> str:
    """Start a local Ray, or join that at `address`; return where its dashboard is, if it has one."""
    options = quiet_ray(verbose=verbose)
    try:
        if address is None:
            return str(ray.init(address="local", include_dashboard=False, **options).dashboard_url or "")
        host, _, port = address.rpartition(":")
        if port.isdigit():  # Ray would try for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        return str(ray.init(address=address, **options).dashboard_url or "")
    except AuthenticationError as error:
        raise wants_token(address or "the local Ray", error) from error
    except Exception as error:  # one of them is a bare Exception
        if address is None:
            raise not_started(error) from error
        raise ResourceError(
            f"there is no Ray at {address}: {one_line(error)}; check the address, and that the head is up"
        ) from error


def _look_around(config: Config, dashboard: str, *, is_local: bool) -> Iterator[Finding]:
    nodes = living_nodes()
    how = "started locally" if is_local else "joined"
    yield Finding("ok", "cluster", f"{how}, Ray {ray.__version__}")
    yield check_nodes(nodes)
    if not is_local:
        yield from check_labels(nodes)
    yield from check_fit(nodes, config, is_local=is_local)
    yield check_object_store(nodes, config)
    if dashboard:
        yield check_dashboard(dashboard, is_open=_is_open(dashboard))
    yield from look_at_nodes(nodes, config, is_local=is_local)


def _is_open(dashboard: str) -> bool | None:
    """Whether the dashboard answers who has no token; None where it is not reached."""
    try:
        answer = requests.get(f"http://{dashboard}/api/version", timeout=10)
    except requests.RequestException:
        return None
    return answer.status_code not in (401, 403)


def _ask(address: str, arguments: Namespace) -> Iterator[Finding]:
    """Send this job to the cluster, and pass on what it finds there."""
    client = connect(dashboard_address(address))
    yield Finding(
        "ok",
        "job server",
        f"{redact_credentials(address)} answers, Ray {ray.__version__} on this machine and on the cluster",
    )
    if not Path("jobs/doctor.py").exists():
        raise ConfigError(
            "jobs/doctor.py is not in this folder, and its code checks the nodes; run the command in the checkout"
        )
    command = ["python", "-m", "jobs.doctor", "--address", "auto", "--json", *arguments.overrides]
    for option, value in (("--recipe", arguments.recipe), ("--config", arguments.config)):
        command += [option, str(value)] if value else []
    environment = read_runtime_env(_RUNTIME_ENV) if _RUNTIME_ENV.exists() else {}
    excludes = environment.pop("excludes", None) or []
    number = max((attempt.number for attempt in attempts_at(client, "doctor")), default=0) + 1
    with tempfile.TemporaryDirectory() as folder:
        archive = pack(Path("."), excludes, Path(folder, "working_dir.zip"))
        environment["working_dir"] = str(archive.file)
        sent = submit(client, "doctor", number, shlex.join(command), metadata={}, runtime_env=environment)
    log = finish(client, sent)
    lines = [line for line in log.splitlines() if line.startswith('{"exit_code"')]
    if not lines:
        raise ResourceError(
            f"the job {sent.id} ended without findings; mend what its log ends with: {' '.join(log.split())[-300:]}"
        )
    for found in json.loads(lines[-1])["findings"]:
        yield Finding(**{**found, "text": f"cluster: {found['text']}"})


if __name__ == "__main__":
    run_main(main)
