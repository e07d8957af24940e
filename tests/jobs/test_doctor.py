"""`python -m jobs.doctor`: what it says of a machine, of local and S3 data and storage, of nodes, and its exit code."""

import importlib
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import ray
from faults import FaultProxy
from jobs_processes import run_job
from servers import S3Server, aws_environment, free_ports, use_aws

from dinoray.jobs.cli.config import load_config
from dinoray.jobs.cluster.machine_checks import (
    Finding,
    check_clock,
    check_data,
    check_disk,
    check_open_files,
    check_packages,
    check_storage,
    judge_clock,
)
from dinoray.jobs.cluster.node_checks import (
    LATE,
    check_dashboard,
    check_fit,
    check_nodes,
    check_object_store,
    judge_gpu,
)
from dinoray.models.errors import ConfigError
from dinoray.pipeline.data.demo_images import draw_demo_image
from dinoray.pipeline.data.manifests.manifest import DataConfig


def images(folder: Path, count: int = 6) -> Path:
    for i in range(count):
        folder.mkdir(exist_ok=True)
        (folder / f"{i}.jpg").write_bytes(draw_demo_image("stripes", "train", i))
    return folder


def verdicts(findings: list[dict[str, Any]]) -> dict[str, str]:
    return {finding["name"]: finding["verdict"] for finding in findings}


# This machine


def test_the_packages_of_this_environment_are_those_that_the_project_asks_for() -> None:
    (finding,) = check_packages()
    assert finding.verdict == "ok"
    assert f"ray {ray.__version__}," in finding.text


@pytest.mark.parametrize(
    ("open_files", "verdict"), [(256, "warn"), (4095, "warn"), (65536, "ok"), (-1, "ok")]
)
def test_few_open_files_are_warned_of(open_files: int, verdict: str) -> None:
    assert check_open_files(open_files, "here").verdict == verdict


@pytest.mark.parametrize(
    ("free_gb", "verdict", "code"), [(100, "ok", 0), (51, "ok", 0), (49, "FAIL", 4), (0, "FAIL", 4)]
)
def test_a_disk_that_ray_would_not_spill_to_fails(free_gb: int, verdict: str, code: int) -> None:
    finding = check_disk("/tmp", (free_gb * 10**9, 1000 * 10**9), "here")
    assert (finding.verdict, finding.exit_code) == (verdict, code)


def test_a_small_disk_is_warned_of() -> None:
    assert check_disk("/tmp", (19 * 10**9, 100 * 10**9), "here").verdict == "warn"


@pytest.mark.parametrize(
    ("skew", "verdict"),
    [(0.5, "ok"), (-29, "ok"), (31, "warn"), (-31, "warn"), (901, "FAIL"), (-901, "FAIL")],
)
def test_a_clock_that_s3_would_refuse_fails(skew: float, verdict: str) -> None:
    assert judge_clock(skew, "here").verdict == verdict


# Local data and storage


def test_local_images_are_read(tmp_path: Path) -> None:
    finding = check_data(DataConfig(path=str(images(tmp_path / "images"))))
    assert finding.verdict == "ok"
    assert "6 listed" in finding.text
    assert "MB/s" in finding.text


@pytest.mark.parametrize("files", [[], ["notes.txt"], ["empty.jpg"]])
def test_a_folder_without_images_fails(files: list[str], tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).touch()
    finding = check_data(DataConfig(path=str(tmp_path)))
    assert (finding.verdict, finding.exit_code) == ("FAIL", 3)
    assert "no images under" in finding.text
    assert finding.text.endswith("; check data.path")
    assert check_data(DataConfig(path=str(images(tmp_path / "images")))).verdict == "ok"


def test_looking_at_storage_leaves_nothing_behind(tmp_path: Path) -> None:
    assert check_storage(str(tmp_path / "a" / "runs")).verdict == "ok"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs a folder that nobody may write to")
def test_storage_that_cannot_be_written_fails() -> None:
    finding = check_storage("/proc/runs")
    assert (finding.verdict, finding.exit_code) == ("FAIL", 3)


def test_a_dashboard_that_is_not_reached_is_not_said_to_ask_for_a_token() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = f"127.0.0.1:{server.getsockname()[1]}"
    said = check_dashboard(closed, is_open=importlib.import_module("jobs.doctor")._is_open(closed))
    assert "is not reachable from this machine" in said.text


def test_a_file_is_no_place_for_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "runs"):
        finding = check_storage(str(path))
        assert (finding.verdict, finding.exit_code) == ("FAIL", 3)


# S3


@pytest.mark.s3
def test_a_bucket_is_listed_read_and_written_and_left_as_it_was(s3: S3Server, bucket: str) -> None:
    for i in range(8):
        s3.client().put_object(
            Bucket=bucket, Key=f"train/{i}.jpg", Body=draw_demo_image("stripes", "train", i)
        )
    before = s3.client().list_objects_v2(Bucket=bucket)["Contents"]
    data = check_data(DataConfig(path=f"s3://{bucket}/train"))
    assert data.verdict == "ok", data.text
    assert "8 listed" in data.text
    assert "5 read" in data.text
    storage = check_storage(f"s3://{bucket}/runs")
    assert storage.verdict == "ok", storage.text
    (clock,) = check_clock(f"s3://{bucket}/train")
    assert clock.verdict == "ok", clock.text
    assert s3.client().list_objects_v2(Bucket=bucket)["Contents"] == before


@pytest.mark.s3
def test_a_missing_bucket_fails_for_data_and_for_storage(bucket: str) -> None:
    for finding in (
        check_data(DataConfig(path="s3://no-such-bucket/x")),
        check_storage("s3://no-such-bucket/x"),
    ):
        assert (finding.verdict, finding.exit_code) == ("FAIL", 3)
        assert "check the bucket's name" in finding.text
    assert check_clock("s3://no-such-bucket/x") == []


@pytest.mark.s3
@pytest.mark.parametrize("method", ["PUT", "HEAD"])
def test_storage_that_may_not_be_written_fails(method: str, bucket: str, proxy: FaultProxy) -> None:
    proxy.fail("forbid", pattern=f"^{method} ", times=99)
    finding = check_storage(f"s3://{bucket}/runs")
    assert (finding.verdict, finding.exit_code) == ("FAIL", 3)
    assert "403" in finding.text
    assert "s3:PutObject" in finding.text


@pytest.mark.s3
def test_data_that_may_not_be_listed_fails(bucket: str, proxy: FaultProxy) -> None:
    proxy.fail("forbid", times=99)
    finding = check_data(DataConfig(path=f"s3://{bucket}/train"))
    assert (finding.verdict, finding.exit_code) == ("FAIL", 3)
    assert "s3:ListBucket" in finding.text


@pytest.mark.s3
def test_wrong_credentials_fail(s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_aws(monkeypatch, aws_environment(s3.endpoint, secret="wrong"))
    for finding in (check_data(DataConfig(path=f"s3://{bucket}/x")), check_storage(f"s3://{bucket}/x")):
        assert (finding.verdict, finding.exit_code) == ("FAIL", 3)
        assert "SignatureDoesNotMatch" in finding.text or "403" in finding.text
        assert "wrong" not in finding.text


def test_a_store_that_does_not_answer_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    (port,) = free_ports(1)
    use_aws(monkeypatch, aws_environment(f"http://127.0.0.1:{port}"))
    finding = check_data(DataConfig(path="s3://bucket/x"))
    assert (finding.verdict, finding.exit_code) == ("FAIL", 3)
    assert "AWS_ENDPOINT_URL" in finding.text


# Nodes, as Ray describes them

HEAD = {"node:__internal_head__": 1.0}


def node(**resources: float) -> dict[str, Any]:
    return {
        "Alive": True,
        "NodeID": "1",
        "NodeManagerAddress": "10.0.0.1",
        "Labels": {},
        "Resources": resources,
    }


def test_nodes_are_counted_by_kind() -> None:
    nodes = [node(**HEAD), node(CPU=8), node(CPU=8), node(CPU=48, GPU=4)]
    nodes[1]["Labels"]["ray.io/node-group"] = "augment"
    assert (
        check_nodes(nodes).text
        == "1 x head, 1 x augment, 1 x CPU node, 1 x GPU node: 64 CPUs, 4 GPUs in total"
    )


@pytest.mark.parametrize(
    ("nodes", "free", "expected"),
    [
        ([node(**HEAD, CPU=8)], 8, ("ok", 0)),
        ([node(**HEAD, CPU=8)], 2, ("warn", 0)),  # others hold them
        ([node(**HEAD, CPU=3)], 3, ("FAIL", 4)),
        ([node(**HEAD), node(CPU=3)], 3, ("warn", 0)),  # a head without CPUs: nodes will join
    ],
)
def test_cpus_beside_the_train_workers_are_asked_for(
    nodes: list[dict[str, Any]], free: float, expected: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.available_resources", lambda: {"CPU": free})
    config = load_config(
        "demo", None, ["resources.use_gpu=false"]
    )  # 2 train workers, 1 augment actor, 1 for Ray
    (finding,) = check_fit(nodes, config, is_local=False)
    assert (finding.verdict, finding.exit_code) == expected
    assert "the run needs 4" in finding.text


def test_gpus_that_are_asked_for_and_not_there_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.available_resources", lambda: {"CPU": 64.0})
    config = load_config("demo", None, ["resources.use_gpu=true"])
    _, few = check_fit([node(**HEAD, CPU=64, GPU=1)], config, is_local=False)
    assert (few.verdict, few.exit_code, few.name) == ("FAIL", 4, "GPUs")
    assert len(check_fit([node(**HEAD, CPU=64, GPU=2)], config, is_local=False)) == 1


def test_an_object_store_smaller_than_the_batches_under_way_is_warned_of() -> None:
    config = load_config(
        "demo", None, []
    )  # 64 images of 2 x 64 px and 6 x 32 px: 2.8 MB, 4 of them under way
    assert check_object_store([node(object_store_memory=12e6)], config).verdict == "ok"
    assert check_object_store([node(object_store_memory=10e6)], config).verdict == "warn"


@pytest.mark.parametrize(
    ("url", "is_open", "verdict"),
    [
        ("127.0.0.1:8265", True, "ok"),
        ("10.0.0.1:8265", True, "warn"),
        ("10.0.0.1:8265", False, "ok"),
        ("10.0.0.1:8265", None, "ok"),
    ],
)
def test_a_dashboard_that_anyone_reaches_is_warned_of(url: str, is_open: bool | None, verdict: str) -> None:
    assert check_dashboard(url, is_open=is_open).verdict == verdict


@pytest.mark.parametrize(
    ("answer", "verdict", "says"),
    [
        (
            {"device": "NVIDIA L40S", "torch": "2.10.0", "nccl": "2.27.5"},
            "ok",
            "L40S, torch 2.10.0, NCCL 2.27.5",
        ),
        (LATE, "warn", "in use by other jobs"),
        ("Torch not compiled with CUDA enabled", "FAIL", "CUDA enabled; install a torch build"),
    ],
)
def test_a_gpu_that_torch_cannot_use_fails(answer: Any, verdict: str, says: str) -> None:
    finding = judge_gpu("GPU node 10.0.0.1", answer)
    assert (finding.verdict, finding.exit_code) == (verdict, 4 if verdict == "FAIL" else 0)
    assert says in finding.text


# The job


def test_a_wrong_setting_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.paht"):
        importlib.import_module("jobs.doctor").main(["data.paht=x"])


@pytest.mark.parametrize("scheme", ["http://", ""])
def test_an_address_where_nothing_is_fails(
    scheme: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # set by what connects
    (port,) = free_ports(1)
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("jobs.doctor").main(
            [
                "--address",
                f"{scheme}127.0.0.1:{port}",
                f"data.path={images(tmp_path)}",
                f"storage_path={tmp_path}",
            ]
        )
    assert ended.value.code == 4
    lines = capsys.readouterr().out.rstrip().splitlines()
    assert lines[-1].startswith("FAIL  cluster")
    assert str(port) in lines[-1]
    told = {line.split()[1]: line for line in lines}
    assert ("contents" in told) is (scheme == "")  # a dashboard that is not there looks at no data
    if not scheme:
        assert "6 images at" in told["contents"]
        assert "6 read: 6 JPEG" in told["images"]
        assert told["next"].endswith(f"dinoray pretrain data.path={tmp_path}")


@pytest.mark.ray
def test_without_a_cluster_it_looks_at_this_machine(tmp_path: Path) -> None:
    path, storage = images(tmp_path / "images"), f"storage_path={tmp_path}/runs"
    output = run_job("jobs.doctor", "--json", f"data.path={path}", storage)
    told = json.loads(output.splitlines()[-1])
    assert told["exit_code"] == 0
    found = verdicts(told["findings"])
    assert {found[name] for name in ("packages", "data", "storage", "cluster", "nodes", "GPUs")} == {"ok"}
    assert {"open files", "disk", "CPUs", "object store", "CUDA"} <= found.keys()
    assert {Finding(**finding).verdict for finding in told["findings"]} <= {"ok", "warn"}
    assert not (tmp_path / "runs").exists()
    (auto,) = [finding["text"] for finding in told["findings"] if finding["name"] == "auto"]
    assert auto.startswith("6 images of 96 x 96 pixels (median), 3 channels; no GPU, ")
    assert (
        " backbone.name=resnet10t crops.global_crop_size=48 train.global_batch_size=2 train.epochs=" in auto
    )
    assert f"`dinoray pretrain data.path={path} {storage} --print-config` prints all choices" in auto
