"""What happens where a version of Ray lacks a private name: an error or a warning with a remedy, never a crash."""

import json
import runpy
import sys
from types import SimpleNamespace

import pytest
import ray.data
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import _CheckpointManagerState
from ray_releases import TRIED, minor

from dinoray.models.errors import DataError, ResourceError
from dinoray.pipeline.ray_private import core, data, jobs, train_controller, tune
from dinoray.pipeline.ray_private.train import TornSnapshotError, committed, snapshot_of


def test_committed_checkpoints_are_read_in_order() -> None:
    results = [{"checkpoint_dir_name": f"step_{step:08d}", "metrics": {}} for step in (8, 4)]
    snapshot = json.dumps({"checkpoint_results": results}).encode()
    assert committed(snapshot, file="x") == ["step_00000004", "step_00000008"]
    assert committed(b'{"checkpoint_results": []}', file="x") == []


@pytest.mark.parametrize("snapshot", [b"[]", b"{}", b'{"checkpoint_results": [{"name": "a"}]}'])
def test_a_snapshot_of_another_form_is_not_taken_for_a_run_without_checkpoints(snapshot: bytes) -> None:
    with pytest.raises(
        DataError,
        match=rf"x is not a list .* as Ray Train {minor(TRIED[0])} to {minor(TRIED[-1])} writes it .*: resume",
    ):
        committed(snapshot, file="x")


@pytest.mark.parametrize("snapshot", [b"", b'{"checkpoint_results": [{"chec', b"\xff"])
def test_a_snapshot_that_breaks_off_has_an_error_of_its_own(snapshot: bytes) -> None:
    with pytest.raises(TornSnapshotError, match=r"s3://b/run/snapshot.json is torn"):
        committed(snapshot, file="s3://b/run/snapshot.json")


@pytest.mark.parametrize("name", ["../other/step_00000004", "/etc", "step_00000004/", ".", ""])
def test_a_name_that_leaves_the_run_directory_is_refused(name: str) -> None:
    snapshot = json.dumps({"checkpoint_results": [{"checkpoint_dir_name": name}]}).encode()
    with pytest.raises(DataError, match=r"names .* not a checkpoint of this run"):
        committed(snapshot, file="x")


@pytest.mark.parametrize("names", [["step_00000004"], ["step_00000004", "step_00000008"]])
def test_a_snapshot_of_ours_is_one_of_ray_train(names: list[str]) -> None:
    state = _CheckpointManagerState.parse_obj(json.loads(snapshot_of(names)))
    assert [result.checkpoint_dir_name for result in state.checkpoint_results] == names
    assert state.latest_checkpoint_result == state.checkpoint_results[-1]
    assert len(state.checkpoint_report_indices) == state.current_report_index == len(names)
    assert committed(snapshot_of(names), file="x") == names


def test_pb2_without_a_method_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    tune.check_pb2()
    monkeypatch.setattr(tune, "PB2", SimpleNamespace(_exploit=1, _save_trial_state=1))
    with pytest.raises(
        ResourceError, match=rf"needs _get_new_config of PB2.*=={minor(TRIED[-1])}\.\*.*scheduler=asha"
    ):
        tune.check_pb2()


def test_ray_s_own_lines_are_dropped_where_it_has_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert callable(core.worker.print_to_stdstream)
    with_the_name, without = SimpleNamespace(print_to_stdstream=print), SimpleNamespace()
    for worker in (with_the_name, without, None):
        monkeypatch.setattr(core, "worker", worker)
        core.silence_errors()
    assert with_the_name.print_to_stdstream is not print
    assert not hasattr(without, "print_to_stdstream")


def test_the_installed_ray_has_all_names_by_which_pools_are_resized() -> None:
    assert data.MISSING is None


def test_a_name_that_a_class_of_ray_data_lacks_is_named() -> None:
    used = {ray.data.DataContext: ("set_config", "custom_execution_callback_classes")}
    assert data.lacking(used) is None
    assert data.lacking({**used, ray.data.Dataset: ("map_batches", "gone")}) == "no Dataset.gone"


@pytest.mark.parametrize("module", ["execution.backpressure_policy", "execution.execution_callback"])
def test_without_a_module_of_ray_data_pools_are_not_resized(
    monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setitem(sys.modules, f"ray.data._internal.{module}", None)
    names = runpy.run_path(data.__file__)
    assert f"ray.data._internal.{module}" in names["MISSING"]
    assert names["BackpressurePolicy"] is names["ExecutionCallback"] is object


@pytest.mark.parametrize(
    ("module", "expected"),
    [(SimpleNamespace(), True), (SimpleNamespace(STANDARD_RESOURCE_TYPES=["CPU"]), ["CPU"])],
)
def test_a_share_of_what_is_left_over_is_requested_as_ray_takes_it(
    monkeypatch: pytest.MonkeyPatch, module: SimpleNamespace, expected: list[str] | bool
) -> None:
    coordinator = "ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator"
    monkeypatch.setitem(sys.modules, coordinator, module)  # type: ignore[arg-type]
    names = runpy.run_path(data.__file__)
    assert names["MISSING"] is None
    asked: list[dict[str, object]] = []
    executor = SimpleNamespace(
        _cluster_autoscaler=SimpleNamespace(
            _autoscaling_coordinator=SimpleNamespace(request_resources=lambda **words: asked.append(words))
        )
    )
    names["request_nodes"](executor, [{"CPU": 1.0}], [{}], expire_after_seconds=9.0)
    assert [words["request_remaining"] for words in asked] == [expected]


def test_the_version_of_a_cluster_may_be_unknown() -> None:
    assert jobs.server_version(SimpleNamespace(_server_ray_version="2.60.0")) == "2.60.0"  # type: ignore[arg-type]
    assert jobs.server_version(SimpleNamespace()) is None  # type: ignore[arg-type]


def test_without_its_callback_ray_train_is_not_ended_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(train_controller.controller_callbacks(print)) == 1
    monkeypatch.setattr(train_controller, "ControllerCallback", None)
    assert train_controller.controller_callbacks(print) == []
