"""What happens where a version of Ray lacks a private name: an error or a warning with a remedy, never a crash."""

import json
from types import SimpleNamespace

import pytest

from models.errors import DataError, ResourceError
from pipeline.ray_private import core, jobs, tune
from pipeline.ray_private.train import committed


def test_committed_checkpoints_are_read_in_order() -> None:
    results = [{"checkpoint_dir_name": f"step_{step:08d}", "metrics": {}} for step in (8, 4)]
    snapshot = json.dumps({"checkpoint_results": results}).encode()
    assert committed(snapshot, file="x") == ["step_00000004", "step_00000008"]
    assert committed(b'{"checkpoint_results": []}', file="x") == []


@pytest.mark.parametrize("snapshot", [b"", b"[]", b"{}", b'{"checkpoint_results": [{"name": "a"}]}', b"\xff"])
def test_a_snapshot_of_another_form_is_not_taken_for_a_run_without_checkpoints(snapshot: bytes) -> None:
    with pytest.raises(
        DataError, match=r"s3://b/run/snapshot.json is not a list .*resume the run with the version"
    ):
        committed(snapshot, file="s3://b/run/snapshot.json")


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
