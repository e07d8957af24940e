"""A study on a cluster whose only working node is lost: the trial goes on from its checkpoint on another one.

There is no dashboard: nothing of a study needs one.
"""

import json
import tempfile
from pathlib import Path

import pytest
from jobs_processes import start_job
from ray.cluster_utils import Cluster
from test_tune import STEPS, arguments, images, outcomes, steps_logged  # noqa: F401  # images is a fixture

pytestmark = [pytest.mark.nightly, pytest.mark.ray, pytest.mark.slow]


def test_a_trial_whose_node_is_lost_goes_on_from_its_checkpoint(
    images: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    temp_dir = tempfile.mkdtemp(prefix="dr-", dir="/tmp")
    node = {"num_cpus": 3, "object_store_memory": 200 << 20}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            **node,
            "num_cpus": 0,
            "temp_dir": temp_dir,
            "include_dashboard": False,
        },
    )
    try:
        lost = cluster.add_node(**node)
        one = [
            "tune.trials=1",
            "tune.confirm_top=0",
            "tune.first=[]",
            "train.epochs=20",
            "tune.evaluations=6",
        ]
        with start_job(
            "jobs.tune", *arguments(images, tmp_path, "lost", *one), env={"RAY_ADDRESS": cluster.address}
        ) as job:
            trial = tmp_path / "lost" / "trials" / "0000"
            snapshot = trial / "checkpoints" / "checkpoint_manager_snapshot.json"
            job.wait_until(
                lambda: snapshot.exists() and json.loads(snapshot.read_text())["checkpoint_results"]
            )
            cluster.remove_node(lost, allow_graceful=False)
            cluster.add_node(**node)
            assert job.wait(400) == 0, job.output
        (outcome,) = outcomes(tmp_path / "lost").values()
        assert (outcome["status"], outcome["step"]) == ("finished", 60)
        assert steps_logged(trial) == list(range(1, 61))
    finally:
        cluster.shutdown()
