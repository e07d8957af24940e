"""What happens where a version of Ray lacks a private name: an error or a warning with a remedy, never a crash."""

import itertools
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray.data
import yaml
from paths import ROOT
from ray.autoscaler._private.util import prepare_config
from ray.core.generated.autoscaler_pb2 import ClusterConfig
from ray.train import WorkerGroupError
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import (
    CheckpointManager,
    _CheckpointManagerState,
)
from ray.train.v2._internal.execution.controller.state import PreemptingState, RestartingState, RunningState
from ray.train.v2.api.preemption import PreemptionInfo
from ray_releases import TRIED, minor

from dinoray.models.errors import ResourceError
from dinoray.pipeline.ray_private import (
    core,
    data,
    jobs,
    nodes,
    train_checkpoints,
    train_controller,
    train_policies,
    tune,
)
from dinoray.pipeline.ray_private.train import BadSnapshotError, is_complete, listed, snapshot_of


def test_checkpoints_are_read_from_a_snapshot() -> None:
    results = [{"checkpoint_dir_name": f"step_{step:08d}", "metrics": {}} for step in (8, 4)]
    assert listed(json.dumps({"checkpoint_results": results}).encode()) == ["step_00000008", "step_00000004"]
    assert listed(b'{"checkpoint_results": []}') == []


@pytest.mark.parametrize("snapshot", [b"[]", b"{}", b"5", b'{"checkpoint_results": [{"name": "a"}]}'])
def test_a_snapshot_of_another_form_is_not_taken_for_a_run_without_checkpoints(snapshot: bytes) -> None:
    with pytest.raises(
        BadSnapshotError, match=rf"not of the form of Ray Train {minor(TRIED[0])} to {minor(TRIED[-1])}"
    ):
        listed(snapshot)


@pytest.mark.parametrize("snapshot", [b"", b'{"checkpoint_results": [{"chec', b"\xff", b"[" * 100_000])
def test_a_snapshot_that_breaks_off_is_torn(snapshot: bytes) -> None:
    with pytest.raises(BadSnapshotError, match=r"^torn$"):
        listed(snapshot)


@pytest.mark.parametrize("names", [["step_00000004"], ["step_00000004", "step_00000008"]])
def test_a_snapshot_of_ours_is_one_of_ray_train(names: list[str]) -> None:
    state = _CheckpointManagerState.parse_obj(json.loads(snapshot_of(names)))
    assert [result.checkpoint_dir_name for result in state.checkpoint_results] == names
    assert state.latest_checkpoint_result == state.checkpoint_results[-1]
    assert len(state.checkpoint_report_indices) == state.current_report_index == len(names)
    assert listed(snapshot_of(names)) == names
    assert is_complete(snapshot_of(names))


@pytest.mark.parametrize(
    "change",
    [
        {"checkpoint_report_indices": [0]},
        {"checkpoint_report_indices": None},
        {"latest_checkpoint_result": {"checkpoint_dir_name": "step_00000012"}},
        {"latest_checkpoint_result": "step_00000008"},
        {"checkpoint_results": [{"checkpoint_dir_name": "step_00000004"}] * 2},
    ],
)
def test_a_snapshot_whose_parts_disagree_is_not_complete(change: dict[str, object]) -> None:
    state = json.loads(snapshot_of(["step_00000004", "step_00000008"]))
    assert not is_complete(json.dumps(state | change).encode())


def test_a_snapshot_that_lacks_a_part_is_not_complete() -> None:
    state = json.loads(snapshot_of(["step_00000004"]))
    # As Ray has it: these two may be missing.
    required = state.keys() - {"ray_version", "latest_checkpoint_result"}
    lacking = {key: json.dumps({k: v for k, v in state.items() if k != key}).encode() for key in state}
    assert {key for key in state if key != "checkpoint_results" and not is_complete(lacking[key])} == (
        required - {"checkpoint_results"}
    )


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


def test_a_ray_train_that_lacks_its_method_keeps_the_newest_checkpoints_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert train_checkpoints.CAN_DROP
    assert len(train_checkpoints.drop_callbacks(first="meta.json")) == 1
    monkeypatch.delattr(CheckpointManager, "_save_state_and_delete_old_checkpoints")
    names = runpy.run_path(train_checkpoints.__file__)
    assert names["CAN_DROP"] is False
    assert names["drop_callbacks"](first="meta.json") == []
    assert f"ray=={minor(TRIED[-1])}.*" in train_checkpoints.NEWEST_ALONE


def test_without_its_callback_ray_train_is_not_ended_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(train_controller.controller_callbacks(print, print, print)) == 1
    monkeypatch.setattr(train_controller, "ControllerCallback", None)
    assert train_controller.controller_callbacks(print, print, print) == []


def test_nodes_that_are_taken_back_are_told_once_and_losses_each_time() -> None:
    told: list[object] = []
    (callback,) = train_controller.controller_callbacks(
        print, told.append, lambda nodes, deadline_ms: told.append((nodes, deadline_ms))
    )
    info = PreemptionInfo(deadline_ms=5, preempted_node_to_ranks={"b": [1], "a": [0]})
    another = PreemptionInfo(deadline_ms=5, preempted_node_to_ranks={"b": [1], "a": [0], "c": [2]})
    running, preempting = RunningState(), PreemptingState(preemption_info=info, detected_at_s=1.0)
    with_another = PreemptingState(preemption_info=another, detected_at_s=1.0)
    lost = WorkerGroupError("gone", {0: RuntimeError()})
    states = [running, preempting, preempting, RestartingState(lost), running, preempting, with_another]
    for before, after in itertools.pairwise(states):
        callback.after_controller_state_update(before, after)
    assert told == [(["a", "b"], 5), lost, (["a", "b"], 5), (["c"], 5)]


def test_nodes_that_are_taken_back_do_not_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    all_of = [{"NodeID": name, "Alive": name != "c"} for name in "abc"]
    monkeypatch.setattr(nodes.ray, "nodes", lambda: all_of)
    monkeypatch.setattr(nodes, "state", SimpleNamespace(get_draining_nodes=lambda: {"b": 0}))
    assert nodes.staying_nodes() == all_of[:1]
    monkeypatch.setattr(nodes, "state", None)
    assert nodes.staying_nodes() == all_of[:2]


def test_types_of_nodes_are_those_that_the_autoscaler_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ClusterConfig()
    for name, resources, most in (("a100", {"GPU": 8, "CPU": 96}, 2), ("off", {"CPU": 4}, 0)):
        config.node_group_configs.add(name=name, max_count=most).resources.update(resources)
    monkeypatch.setattr(nodes, "state", SimpleNamespace(get_cluster_config=lambda: config))
    assert nodes.node_types() == [("a100", {"GPU": 8, "CPU": 96}, 2)]


def test_types_of_nodes_are_else_those_of_the_file_that_ray_up_leaves_on_the_head(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(nodes, "state", SimpleNamespace(get_cluster_config=lambda: None))
    file = tmp_path / "ray_bootstrap_config.yaml"
    assert nodes.node_types(file) == []
    config = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    file.write_text(json.dumps(config))
    assert nodes.node_types(file) == []  # nobody has told the resources of these instances
    config["available_node_types"]["augment"]["resources"] = {"CPU": 64}
    config["available_node_types"]["train"]["resources"] = {"CPU": 32, "GPU": 4}
    file.write_text(json.dumps(config))  # as Ray writes it
    assert nodes.node_types(file) == [("augment", {"CPU": 64}, 8), ("train", {"CPU": 32, "GPU": 4}, 2)]
    for damaged in ("", "[", "a: 1", "available_node_types: 3"):
        file.write_text(damaged)
        assert nodes.node_types(file) == []


def test_the_installed_ray_names_nodes_that_are_taken_back_and_has_the_policy_of_ranges() -> None:
    assert hasattr(nodes.state, "get_draining_nodes")
    assert train_policies.ElasticScalingPolicy is not None
