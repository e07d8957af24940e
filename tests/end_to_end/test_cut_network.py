"""Two nodes in two networks: the link between them is cut for half a minute and heals, and the weights are the same."""

import contextlib
import re
import time
from pathlib import Path

import pytest
from jobs_processes import PATIENCE_SECONDS, TINY, losses, start_job, wait_until
from networks import second_network
from ray_head import ray_head, ray_node
from safetensors.torch import load_file
from tiny_run import write_images

from dinoray.pipeline.data.demo_images import PATTERNS
from dinoray.pipeline.storage.run_dir import checkpoint_name

pytestmark = [pytest.mark.nightly, pytest.mark.ray, pytest.mark.slow]

STEPS, CUT_SECONDS = 240, 30


def last_step(metrics: Path) -> int:
    """The last step that was logged; 0 before the first."""
    steps = losses(metrics.read_bytes()) if metrics.exists() else []
    return steps[-1][0] if steps else 0


def test_a_link_that_is_cut_and_heals_changes_no_weights(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", "train", labels=tuple(PATTERNS)[:3], per_label=8)

    def arguments(name: str) -> list[str]:
        return [
            *TINY,
            *(f"name={name}", f"data.path={images}", f"storage_path={tmp_path}", "eval.val_path=null"),
            *(f"train.epochs={STEPS}", "train.global_batch_size=24", "optim.warmup_epochs=0"),
            *("head.use_bn=false", "checkpoint.every_steps=50", "resources.hang_seconds=20"),
            *("resources.train_workers=2", "resources.cpus_per_train_worker=2"),
        ]

    with second_network() as network, contextlib.ExitStack() as nodes:
        # By its name, because the name of this machine stands for an address that is not in the other network.
        env = {"GLOO_SOCKET_IFNAME": network.link}
        head = nodes.enter_context(ray_head(env, num_cpus=1, address=network.here))
        near = nodes.enter_context(ray_node(head, num_cpus=3))
        near.wait_until_up()
        far = nodes.enter_context(ray_node(head, num_cpus=3, network=network))
        with start_job("jobs.pretrain", *arguments("calm"), env=head.env | {"RAY_ADDRESS": head.gcs}) as job:
            assert job.wait() == 0, job.output

        metrics = tmp_path / "cut" / "metrics.jsonl"
        with start_job("jobs.pretrain", *arguments("cut"), env=head.env | {"RAY_ADDRESS": head.gcs}) as job:
            job.wait_until(lambda: last_step(metrics) > 60)
            network.cut()
            begin = time.monotonic()
            job.wait_until(lambda: time.monotonic() - begin > CUT_SECONDS)
            network.heal()
            far_nodes = [far]

            def has_ended() -> bool:
                if (
                    far_nodes[-1].process.poll() is not None
                ):  # its raylet ends once it is told that it was dead
                    far_nodes.append(nodes.enter_context(ray_node(head, num_cpus=3, network=network)))
                return job.process.poll() is not None

            wait_until(has_ended, PATIENCE_SECONDS)
            assert job.wait() == 0, job.output

    assert [step for step, _ in losses(metrics.read_bytes())] == list(range(1, STEPS + 1))
    for file in ("student.safetensors", "teacher.safetensors"):
        calm, cut = (
            load_file(tmp_path / name / "checkpoints" / checkpoint_name(STEPS) / file)
            for name in ("calm", "cut")
        )
        assert all(calm[name].equal(cut[name]) for name in calm)
    assert "Traceback" not in job.output
    assert not re.search("^error", job.output, re.M)
