"""MLflow and W&B beside a run: what their real stores hold of it, and what is refused before it starts."""

import io
import json
import re
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from jobs_processes import TINY
from PIL import Image
from tracked_runs import run_in

from dinoray.jobs.cli.config import load_config
from dinoray.models.errors import ConfigError
from dinoray.pipeline.reporting.run_report import build_report
from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.tracking import services
from dinoray.pipeline.tracking.config import TrackConfig
from dinoray.pipeline.tracking.mlflow_wandb import OPEN, TrackedRun
from dinoray.pipeline.tracking.services import open_trackers
from dinoray.pipeline.tracking.sink import MetricSink
from dinoray.pipeline.worker.driver import check_run

MLFLOW = pytest.importorskip("mlflow")
WANDB = pytest.importorskip("wandb")


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), (255, 0, 0)).save(file, "PNG")
    return file.getvalue()


def follow(sink: MetricSink, first: int, last: int, *, loss: float) -> None:
    """One life of a run, which logs every step and draws at its last."""
    for step in range(first, last + 1):
        sink.log(step, {"loss": loss, "verdict": "healthy", "time": 1.7e9})
    sink.log(last, {"knn_20": 0.5})
    sink.picture("attention", last, png())
    sink.close(failed=False)


def sinks(folder: Path, config: TrackConfig, told: list[str], **params: object) -> list[MetricSink]:
    run_in(folder)
    return open_trackers(
        config, Directory(str(folder)), name="first", params=params, page=build_report, tell=told.append
    )


@pytest.mark.parametrize("damaged", ["", "{}", "[]", '{"id": "a'])
def test_a_damaged_id_makes_it_a_new_run_and_harms_nothing(damaged: str, tmp_path: Path, mlflow: Any) -> None:
    (tmp_path / run_dir.TRACKING).write_text(damaged)
    told: list[str] = []
    (sink,) = sinks(tmp_path, TrackConfig(mlflow=True, project="damaged"), told)
    follow(sink, 0, 1, loss=2.0)
    assert len(told) == 1
    assert run_dir.TRACKING in told[0]
    assert len(json.loads((tmp_path / run_dir.TRACKING).read_text())["id"]) == 12


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for one MLflow store, whose tables take seconds to make."""
    return tmp_path_factory.mktemp("mlflow")


@pytest.fixture
def mlflow(store: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of that store, to which runs are led too."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}/mlflow.db")
    return MLFLOW.MlflowClient()


def test_mlflow_has_one_run_of_all_lives_and_each_step_once(tmp_path: Path, mlflow: Any) -> None:
    told: list[str] = []
    config = TrackConfig(mlflow=True, project="plants")
    (first,) = sinks(tmp_path, config, told, **{"optim.base_lr": 0.1, "log.every_steps": 1})
    follow(first, 0, 5, loss=2.0)
    (second,) = sinks(tmp_path, config, told, **{"optim.base_lr": 0.1, "log.every_steps": 2, "new": None})
    follow(second, 4, 8, loss=1.0)
    assert told == []

    (run,) = mlflow.search_runs([mlflow.get_experiment_by_name("plants").experiment_id])
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert run.data.params == {"optim.base_lr": "0.1", "log.every_steps": "1", "new": "None"}
    history = mlflow.get_metric_history(run.info.run_id, "train/loss")
    assert sorted((point.step, point.value) for point in history) == [
        *((step, 2.0) for step in range(6)),
        *((step, 1.0) for step in range(6, 9)),
    ]
    assert [p.step for p in mlflow.get_metric_history(run.info.run_id, "eval/knn_20")] == [5, 8]
    assert set(run.data.metrics) == {"train/loss", "eval/knn_20"}
    assert Path(run.info.artifact_uri).is_relative_to(tmp_path.parent / "mlartifacts")
    pictures = [file.path for file in mlflow.list_artifacts(run.info.run_id, "attention")]
    assert pictures == ["attention/step_00000005.png", "attention/step_00000008.png"]
    page = Path(mlflow.download_artifacts(run.info.run_id, "report.html", str(tmp_path)))
    assert "<html" in page.read_text()


def test_a_run_of_an_earlier_version_keeps_the_names_of_its_curves(tmp_path: Path, mlflow: Any) -> None:
    (tmp_path / run_dir.TRACKING).write_text('{"id": "fedcba987654"}')
    (sink,) = sinks(tmp_path, TrackConfig(mlflow=True, project="earlier"), [])
    follow(sink, 0, 1, loss=2.0)
    (run,) = mlflow.search_runs([mlflow.get_experiment_by_name("earlier").experiment_id])
    assert {"loss", "knn_20"} <= set(run.data.metrics)


def test_a_run_that_ends_otherwise_has_failed(tmp_path: Path, mlflow: Any) -> None:
    (sink,) = sinks(tmp_path, TrackConfig(mlflow=True), [])
    sink.close(failed=True)
    (run,) = mlflow.search_runs([mlflow.get_experiment_by_name("dinoray").experiment_id])
    assert run.info.status == "FAILED"


def wandb_records(file: Path) -> list[Any]:
    """What an offline run has kept: protocol buffers in LevelDB's log format, after a head of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole, records = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # too little left of a block for another head
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if at + 7 + length > len(data):
            break
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole one, or the last part of one
            records.append(Record.FromString(whole))
            whole = b""
    return records


def test_wandb_has_one_run_of_all_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    told: list[str] = []
    for first, last in ((0, 5), (4, 8)):
        (sink,) = sinks(tmp_path, TrackConfig(wandb=True, project="plants"), told, lr=0.1)
        sink.log(first, {"loss": 2.0})
        if first:  # evaluations that arrive after later steps
            for step in (5, 6):
                sink.log(step, {"loss": 2.0})
            for step in (3, 5):
                sink.log(step, {"rankme": float(step)})
            first = 7
        follow(sink, first, last, loss=2.0)
    assert told == []
    number = json.loads((tmp_path / run_dir.TRACKING).read_text())["id"]
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime)
    assert [file.name for file in files] == [f"run-{number}.wandb"] * 2
    for file, steps in zip(files, (range(6), range(4, 9)), strict=True):
        records, deadline = wandb_records(file), time.monotonic() + 60
        while not any(record.HasField("exit") for record in records):
            assert time.monotonic() < deadline, "W&B's own process has not written the end"
            time.sleep(0.05)
            records = wandb_records(file)
        begun = next(record.run for record in records if record.HasField("run"))
        assert (begun.run_id, begun.project, begun.display_name) == (number, "plants", "first")
        rows = [
            {
                item.key or ".".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            for record in records
            if record.HasField("history")
        ]
        assert [row["_step"] for row in rows] == list(steps)
        assert all(row["train/loss"] == 2.0 for row in rows)
        assert rows[-1]["eval/knn_20"] == 0.5
        assert rows[-1]["attention.width"] == 4
        assert rows[-1]["report._type"] == "html-file"
        assert not {"eval/knn_20", "attention.width"} & rows[0].keys()
        arrived = [
            (row["_step"], row["eval/step"], row["eval/rankme"]) for row in rows if "eval/rankme" in row
        ]
        assert arrived == ([] if steps[0] == 0 else [(6, 3, 3.0), (7, 5, 5.0)])


# What is asked for


def test_without_trackers_nothing_is_made(tmp_path: Path) -> None:
    assert sinks(tmp_path, TrackConfig(), []) == []
    assert not (tmp_path / run_dir.TRACKING).exists()


def test_a_folder_of_the_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder_left_by_runs").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not services._is_installed("folder_left_by_runs")
    assert services._is_installed("wandb")


def test_trackers_that_are_not_there_are_named_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(services, "_is_installed", lambda name: False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = load_config("demo", None, [*TINY, "track.mlflow=true", "track.wandb=true"])
    with pytest.raises(ConfigError) as error:
        check_run(config)
    missing_mlflow, missing_wandb, address = str(error.value).splitlines()
    assert "pip install 'dinoray[mlflow]'" in missing_mlflow
    assert "pip install 'dinoray[wandb]'" in missing_wandb
    assert "MLFLOW_TRACKING_URI" in address
    monkeypatch.setattr(services, "_is_installed", lambda name: True)
    for example in re.findall(r"(?<=e\.g\. )\S+|(?<= or )\S+$", address):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", example)
        check_run(config)


def test_a_node_without_the_address_of_a_service_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = TrackedRun("first", "0123456789ab", "plants", {}, Directory(str(tmp_path)))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match=r"; set it in the environment of the nodes$"):
        OPEN["mlflow"](run)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    OPEN["mlflow"](run)


def test_offline_files_that_would_be_lost_with_a_node_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    with pytest.raises(ConfigError, match=r": set WANDB_DIR to a folder that outlives it$"):
        OPEN["wandb"](TrackedRun("first", "0123456789ab", "plants", {}, Directory("s3://bucket/runs/first")))
