"""What happens where a version of Ray lacks a private name: an error or a warning with a remedy, never a crash."""

import json
from types import SimpleNamespace

import pytest
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import _CheckpointManagerState

from dinoray.models.errors import DataError, ResourceError
from dinoray.pipeline.ray_private import core, jobs, tune
from dinoray.pipeline.ray_private.train import TornSnapshotError, committed, snapshot_of


def test_committed_checkpoints_are_read_in_order() -> None:
    results = [{"checkpoint_dir_name": f"step_{step:08d}", "metrics": {}} for step in (8, 4)]
    snapshot = json.dumps({"checkpoint_results": results}).encode()
    assert committed(snapshot, file="x") == ["step_00000004", "step_00000008"]
    assert committed(b'{"checkpoint_results": []}', file="x") == []


@pytest.mark.parametrize("snapshot", [b"[]", b"{}", b'{"checkpoint_results": [{"name": "a"}]}'])
def test_a_snapshot_of_another_form_is_not_taken_for_a_run_without_checkpoints(snapshot: bytes) -> None:
    with pytest.raises(
        DataError, match=r"s3://b/run/snapshot.json is not a list .*resume the run with the version"
    ):
        committed(snapshot, file="s3://b/run/snapshot.json")


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
    with pytest.raises(ResourceError, match=r"needs _get_new_config of PB2.*tune\.scheduler=asha"):
        tune.check_pb2()


def test_ray_s_own_lines_are_dropped_where_it_has_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = SimpleNamespace(print_to_stdstream=print)
    monkeypatch.setattr(core.ray._private, "worker", worker)
    core.silence_errors()
    assert worker.print_to_stdstream is not print
    monkeypatch.setattr(core.ray._private, "worker", SimpleNamespace())
    core.silence_errors()
    assert not hasattr(core.ray._private.worker, "print_to_stdstream")


def test_the_version_of_a_cluster_may_be_unknown() -> None:
    assert jobs.server_version(SimpleNamespace(_server_ray_version="2.60.0")) == "2.60.0"  # type: ignore[arg-type]
    assert jobs.server_version(SimpleNamespace()) is None  # type: ignore[arg-type]
