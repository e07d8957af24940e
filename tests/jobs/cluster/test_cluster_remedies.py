"""Mistakes on the way to a cluster, in a plan or a submission: following the message's remedy ends the error."""

import importlib
import os
import re
import tempfile
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import ray
import torch
from fresh_python import run_python
from paths import ROOT
from servers import answering_server, free_ports
from submission import submit

from dinoray.jobs.cluster import cluster_file
from dinoray.jobs.cluster.job_server import attempts_at, connect, dashboard_address
from dinoray.jobs.cluster.machine_checks import machine_facts
from dinoray.jobs.cluster.plan_config import PlanArguments, plan_config
from dinoray.jobs.cluster.upload import check_config_file, list_files, read_runtime_env
from dinoray.models.errors import ConfigError, DinorayError, ResourceError

# Plans

FIGURES = {
    "plan.num_images": "plan.num_images=20000000",
    "plan.bytes_per_image": "plan.bytes_per_image=110000",
    "plan.latency_ms": "plan.latency_ms=25",
    "plan.images_per_second_per_cpu": "plan.images_per_second_per_cpu=250",
}
PER_GPU = "plan.images_per_second_per_gpu=800"
NET = ["--recipe=vit_small_imagenet_vanilla", "head.out_dim=64"]
NET += ["backbone.kwargs={depth: 1, embed_dim: 64, num_heads: 1}"]


def plan(*words: str) -> None:
    importlib.import_module("jobs.plan").main([*NET, *words])


def refused_plan(*words: str) -> str:
    with pytest.raises(DinorayError) as error:
        plan(*words)
    return str(error.value)


def checked(*words: str) -> None:
    """The command line of a plan, without the plan."""
    plan_config(PlanArguments().parse_args([*NET, "data.path=/x", *words]))


def test_a_file_that_is_there_is_removed_or_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "mine.yaml"
    out.write_text("precious")
    message = refused_plan(*FIGURES.values(), PER_GPU, f"--out={out}")
    assert message.endswith("; remove it, or choose another file")
    plan(*FIGURES.values(), PER_GPU, f"--out={tmp_path}/other.yaml")
    out.unlink()
    plan(*FIGURES.values(), PER_GPU, f"--out={out}")


def test_a_folder_that_is_not_there_is_made_for_the_file(tmp_path: Path) -> None:
    message = refused_plan(*FIGURES.values(), PER_GPU, f"--out={tmp_path}/none/mine.yaml")
    assert message.endswith("; name a file that can be written")
    plan(*FIGURES.values(), PER_GPU, f"--out={tmp_path}/mine.yaml")


def test_a_cluster_file_is_made_in_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_file, "_PLACES", (Path(),))  # as of an installed package
    monkeypatch.chdir(tmp_path)
    message = refused_plan(*FIGURES.values(), PER_GPU, "--out=mine.yaml")
    assert message.endswith("; run this job in a checkout of the project")
    monkeypatch.chdir(ROOT)
    plan(*FIGURES.values(), PER_GPU, f"--out={tmp_path}/mine.yaml")


@pytest.mark.parametrize(
    ("wrong", "says", "followed"),
    [
        ([PER_GPU, "resources.use_gpu=false"], "leave out one of them", [PER_GPU]),
        ([PER_GPU, "resources.use_gpu=false"], "leave out one of them", ["resources.use_gpu=false"]),
        (
            ["--out=x", "resources.use_gpu=false"],
            "set plan.images_per_second_per_gpu, or leave out --out",
            ["resources.use_gpu=false"],
        ),
        (
            ["--out=x", "resources.use_gpu=false"],
            "set plan.images_per_second_per_gpu, or leave out --out",
            ["--out=x", PER_GPU],
        ),
        (
            ["plan.prices={t2.nano: {hourly: 1}}"],
            "is new and lacks cpus, gbit, memory_gib; add them",
            ["plan.prices={t2.nano: {hourly: 1, cpus: 1, gbit: 1, memory_gib: 1}}"],
        ),
    ],
)
def test_a_command_line_that_cannot_be_planned(
    wrong: Sequence[str], says: str, followed: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match=f"{re.escape(says)}$"):
        checked(*wrong)
    checked(*followed)


def test_a_run_on_one_machine_is_planned_on_that_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"; plan it on that machine$"):
        checked("resources.use_gpu=false")
    monkeypatch.delenv("RAY_ADDRESS")
    checked("resources.use_gpu=false")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here to measure on")
def test_what_only_a_gpu_tells_can_be_set() -> None:
    message = refused_plan(*FIGURES.values(), "resources.use_gpu=true")
    (name,) = re.findall(r"^(plan\.\w+): not set, .*; set it, or measure on a GPU node: ", message)
    plan(*FIGURES.values(), "resources.use_gpu=true", f"{name}=800")


def test_figures_stand_for_images_that_cannot_be_read(tmp_path: Path) -> None:
    given = [
        FIGURES["plan.num_images"],
        FIGURES["plan.bytes_per_image"],
        PER_GPU,
        f"data.path={tmp_path}/none",
    ]
    found = re.search(r"; or also set ([\w., ]+), so that no images need to be read$", refused_plan(*given))
    assert found
    plan(*given, *(FIGURES[name] for name in found[1].split(", ")))


# What is sent


@pytest.mark.parametrize(
    ("text", "says", "mended"),
    [
        ("workdir: .", r"; did you mean working_dir\?$", ""),
        ("env_var: {A: b}", r"; did you mean env_vars\?$", "env_vars: {A: b}"),
        ("working_dir: .", ": remove it here and pass --working-dir FOLDER$", ""),
        ("env_vars: {HF_TOKEN: x, A: b}", "give the nodes a role .* and remove it here$", "env_vars: {A: b}"),
        (
            "pip: ['git+https://MARKER@github.com/me/mine']",
            "give the nodes a role .* and remove it here$",
            "pip: ['git+https://github.com/me/mine']",
        ),
    ],
)
def test_a_runtime_environment_is_read_once_it_is_mended(
    text: str, says: str, mended: str, tmp_path: Path
) -> None:
    file = tmp_path / "env.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_runtime_env(file)
    file.write_text(mended)
    read_runtime_env(file)


def test_a_name_that_is_not_utf_8_is_renamed_or_its_folder_excluded(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    odd = os.path.join(os.fsencode(tmp_path / "old"), b"caf\xe9.txt")
    with open(odd, "w"):
        pass
    with pytest.raises(ConfigError, match=r"; rename it, or exclude its folder$"):
        list_files(tmp_path, [])
    assert list_files(tmp_path, ["/old"]) == []
    os.rename(odd, tmp_path / "old" / "café.txt")
    assert list_files(tmp_path, []) == ["old/café.txt"]


def test_a_working_directory_is_one_that_there_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no such folder; check the path$"):
        list_files(tmp_path / "none", [])
    list_files(tmp_path, [])


@pytest.mark.parametrize(
    ("file", "says", "followed"),
    [
        ("/elsewhere/mine.yaml", "copy it there and pass (--config .*)$", "mine.yaml"),
        ("conf/secrets.yaml", "may hold (secrets; rename it)$", "conf/mine.yaml"),
    ],
)
def test_a_config_file_is_sent_once_it_is_there(file: str, says: str, followed: str) -> None:
    sent = frozenset([followed])
    with pytest.raises(ConfigError, match=says) as error:
        check_config_file(["jobs.pretrain", f"--config={file}"], Path(), sent)
    passed = re.search(r"pass --config (\S+)$", str(error.value))
    check_config_file(["jobs.pretrain", "--config", passed[1] if passed else followed], Path(), sent)


# Submissions

JOB = ["--", "jobs.pretrain", "name=x", "data.path=s3://b/i", "storage_path=s3://b/r"]
TOKEN = "0123456789abcdef" * 4
EMBED = ["--", "jobs.embed", "data.path=s3://b/i"]


@pytest.mark.parametrize(
    ("wrong", "says", "followed"),
    [
        ([], "no job is given; pass one, e.g. dinoray submit -- dinoray pretrain name=NAME", JOB),
        (["--stop"], "or --run NAME with --stop or --status", ["--stop", "--run", "x"]),
        (["--", "jobs.pretrian", *JOB[2:]], "did you mean pretrain?", JOB),
        (["--", "python", "train.py"], "; choose one of attention, doctor, embed, ", EMBED),
        (
            ["--working-dir=benchmarks", *JOB],
            "or pass --working-dir CHECKOUT",
            [f"--working-dir={ROOT}", *JOB],
        ),
        (JOB[:-1], "; set storage_path=s3://BUCKET/runs, or", [*JOB[:-1], "storage_path=s3://BUCKET/runs"]),
        (JOB[:-1], "or an absolute path that all nodes share", [*JOB[:-1], "storage_path=/shared/runs"]),
        (["--run=y", *JOB], "; leave out --run", JOB),
        (["--run=a/b", *EMBED], "must be letters, digits, '.', '_' and '-'", ["--run=a-b", *EMBED]),
        (["--runtime-env=missing.yaml", *JOB], "; check the path", JOB),
        (["--max-attempts=0", *JOB], "invalid positive number value", ["--max-attempts=1", *JOB]),
        ([*EMBED, "--hf-token", "MARKER"], "; give the nodes a role, or set it in the environment of", EMBED),
    ],
)
def test_a_submission_gets_as_far_as_the_cluster_once_it_is_mended(
    wrong: Sequence[str], says: str, followed: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{free_ports(1)[0]}")
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=re.escape(says)):
        submit(*wrong)
    with pytest.raises(ResourceError, match="does not answer"):
        submit(*followed)


def test_the_address_that_is_named_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ConfigError) as error:
        dashboard_address(None)
    found = re.search(r"pass --address (\S+) .* or set (\w+)$", str(error.value))
    assert found
    assert dashboard_address(found[1]) == found[1]
    monkeypatch.setenv(found[2], found[1])
    assert dashboard_address(None) == found[1]


@pytest.fixture
def server() -> Iterator[tuple[str, dict[str, object]]]:
    with answering_server() as (address, answer):
        yield address, answer


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (
            200,
            '{"ray_version": "2.9.3"}',
            r"; install the same version .* pip install 'ray\[default\]==2\.9\.3'$",
        ),
        (200, "<html>hello</html>", "; check the port$"),
        (502, "bad gateway", "; start the cluster, or open a tunnel to its dashboard: ray dashboard cluster"),
    ],
)
def test_a_job_server_is_used_once_it_is_one(
    status: int, body: str, says: str, server: tuple[str, dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # connect sets it
    address, answer = server
    answer |= {"status": status, "body": body}
    with pytest.raises(ResourceError, match=says):
        connect(address)
    answer |= {"status": 200, "body": f'{{"ray_version": "{ray.__version__}"}}'}
    connect(address)


def test_a_job_server_is_asked_again_once_it_works(
    server: tuple[str, dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    address, answer = server
    answer |= {"status": 200, "body": f'{{"ray_version": "{ray.__version__}"}}'}
    client = connect(address)
    answer |= {"status": 500, "body": "no space left on device"}
    says = r"no space left on device; check the address, and the logs of the cluster's dashboard$"
    with pytest.raises(ResourceError, match=says):
        attempts_at(client, "x")
    answer |= {"status": 200, "body": "[]"}
    assert attempts_at(client, "x") == []


def test_a_token_in_the_file_that_is_named_is_sent(tmp_path: Path) -> None:
    """In processes of their own: Ray keeps the mode that a process began with."""
    tokens: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            tokens.append(self.headers["Authorization"])
            is_open = tokens[-1] == f"Bearer {TOKEN}"
            self.send_response(200 if is_open else 401)
            self.end_headers()
            version = f'{{"ray_version": "{ray.__version__}"}}'
            self.wfile.write((version if is_open else "Missing authentication token").encode())

        def log_message(self, *_: object) -> None:
            pass

    def connected(address: str, **environment: str) -> str:
        code = f"from dinoray.jobs.cluster.job_server import *\ntry:\n    connect({address!r})\n"
        code += "except ResourceError as error:\n    print(error)"
        return run_python(code, HOME=str(tmp_path), **environment)

    with HTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{running.server_port}"
        message = connected(address)
        found = re.search(r"; set (\w+)=(\w+) and put the cluster's token into ~/(\S+) ", message)
        assert found, message
        (tmp_path / found[3]).parent.mkdir()
        (tmp_path / found[3]).write_text(TOKEN)
        (tmp_path / found[3]).chmod(0o600)
        assert connected(address, **{found[1]: found[2]}) == ""
        running.shutdown()


# Machines


def test_a_temporary_folder_that_cannot_be_written_has_another_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [os.environ["TMPDIR"]])
    monkeypatch.setenv("TMPDIR", f"{tmp_path}/none")
    with pytest.raises(ResourceError, match=r"; set TMPDIR to a folder on a disk that can be written$"):
        machine_facts()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert list(machine_facts()["disks"]) == [str(tmp_path)]  # type: ignore[call-overload]
