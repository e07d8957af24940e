"""A run on a cluster that grows and shrinks under it: Ray's autoscaler, nodes that are processes, a real S3 store.

The store is far away at first, so that an actor fetches slowly while its CPU idles: one machine can then show what
more nodes are good for. Then it is near.
"""

import json
import time
import urllib.request
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from autoscaling_head import autoscaling_head
from faults import fault_proxy
from jobs_processes import TINY, start_job
from ray_head import RayHead
from servers import aws_environment, s3_server

from dinoray.pipeline.data.demo_images import draw_demo_image

MOST_ACTORS = 3
# The CPU that the train worker asks for must be reckoned to the head, which has it, and not keep an idle node: of nodes
# that have it Ray's autoscaler takes the one with the fewest other resources.
_OTHERS = {"augment": 1, "spot": 1, "object_store_memory": 400_000_000}
NODES = {
    "augment": {"resources": {"CPU": 1, **_OTHERS}, "max_workers": MOST_ACTORS},
    "train": {"resources": {"CPU": 4, "GPU": 1, "object_store_memory": 400_000_000}, "max_workers": 2},
}
FASTER = 1.5
_BATCH = 8
_SETTINGS = [
    *TINY,
    *("crops.global_crop_size=160", "crops.local_crop_size=64"),  # so that few images fill the buffers
    # The trainer must have the most work when the store is near. Its steps must also be long beside the constant
    # cost of handing over a batch, which counts as waiting: the pool shrinks only below 3 % of waiting.
    "backbone.kwargs={patch_size: 32, embed_dim: 64, depth: 8, num_heads: 2}",
    *("data.path=s3://photos", "data.label_from_parent=false"),
    *("eval.val_path=null", "eval.label_free=false"),  # nothing else is fetched from the slow store
    *(
        "train.epochs=500",
        f"train.global_batch_size={_BATCH}",
        "log.every_steps=2",
        "checkpoint.every_steps=1000000",
        "eval.every_steps=1000000",
    ),
    *("resources.train_workers=1", "resources.use_gpu=false", "data.fetch_concurrency=16"),
    *(f"resources.augment_actors=[1, {MOST_ACTORS}]", "resources.cool_down_seconds=8"),
    *("cost.head_hourly=1", "cost.cpu_hourly=2"),
]


@dataclass(frozen=True)
class Growth:
    """What was seen: nodes beside the head before the run and after it, and the run's metrics."""

    before: list[str]
    after: list[str]
    few: list[dict[str, Any]]
    """Lines of metrics.jsonl with one actor, the store far away."""
    many: list[dict[str, Any]]
    """And the latest with all of them, when they had begun to tell."""
    records: list[dict[str, Any]]
    """All lines. The first of `far` are of the time when the store was far away."""
    far: int
    output: str


def watch_growth(folder: Path, *, settle_seconds: float = 16, latest_seconds: float = 16) -> Growth:
    """Start the run on a head without nodes, wait until it has grown and shrunk, and stop it.

    The latest seconds with all actors are looked at once they have been there for `settle_seconds`: what had been given
    to the first actor before they came, it still does alone.
    """
    run = folder / "grows"
    with s3_server() as server, fault_proxy(server.endpoint) as store:
        client = server.client()
        client.create_bucket(Bucket="photos")
        for i in range(160):
            picture = draw_demo_image("dots", "train", i)
            client.put_object(Bucket="photos", Key=f"{i:03d}.jpg", Body=picture)
        # One actor with 16 requests under way then gets 8 images/s: a small part of what even a busy CPU trains on.
        store.delay_seconds = 2.0
        env = aws_environment(store.endpoint)
        with autoscaling_head(NODES, idle_seconds=6, max_workers=5, env=env) as head:
            before = _workers(head)
            settings = [*_SETTINGS, "name=grows", f"storage_path={folder}"]
            with start_job("jobs.pretrain", *settings, env=env | {"RAY_ADDRESS": head.gcs}) as job:
                job.wait_until(lambda: any(r["augment_actors"] == MOST_ACTORS for r in logged(run)))
                few = [r for r in logged(run) if r["augment_actors"] == 1]
                many = job.wait_until(lambda: _faster(run, few, settle_seconds, latest_seconds))
                far = len(logged(run))
                store.delay_seconds = 0.0
                job.wait_until(lambda: logged(run)[-1]["nodes_cpu"] < MOST_ACTORS)
                job.process.terminate()
                job.wait()
            deadline = time.monotonic() + 120
            while (after := _workers(head)) and time.monotonic() < deadline:
                time.sleep(0.5)
        return Growth(before, after, few, many, logged(run), far, job.output)


def logged(run: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl that tell of nodes; the last may be half written."""
    try:
        whole = (run / "metrics.jsonl").read_text().rpartition("\n")[0]
    except OSError:
        return []
    return [record for line in whole.splitlines() if "nodes_cpu" in (record := json.loads(line))]


def images_per_second(records: list[dict[str, Any]]) -> float:
    """From the first of these lines to the last, by the clock."""
    images = (records[-1]["step"] - records[0]["step"]) * _BATCH
    return images / (records[-1]["time"] - records[0]["time"])


def waits(records: list[dict[str, Any]]) -> float:
    """The share of time that was spent waiting for data, from the first of these lines to the last."""
    spans = [b["time"] - a["time"] for a, b in pairwise(records)]
    waited = sum(span * r["data_wait"] for span, r in zip(spans, records[1:], strict=True))
    return waited / sum(spans)


def _faster(
    run: Path, few: list[dict[str, Any]], settle_seconds: float, latest_seconds: float
) -> list[dict[str, Any]]:
    """The lines of the latest seconds with all actors, if images then come clearly faster than with few."""
    records = [r for r in logged(run) if r["augment_actors"] == MOST_ACTORS]
    latest = [r for r in records if r["time"] > records[-1]["time"] - latest_seconds]
    settled = records and records[-1]["time"] - records[0]["time"] > settle_seconds
    if not settled or min(len(latest), len(few)) < 2:  # a busy machine may log no second line in that time
        return []
    return latest if images_per_second(latest) > FASTER * images_per_second(few) else []


def _workers(head: RayHead) -> list[str]:
    """Nodes that are alive beside the head, as Ray's own state API has them."""
    with urllib.request.urlopen(f"{head.dashboard}/api/v0/nodes?detail=true", timeout=30) as answer:
        nodes = json.load(answer)["data"]["result"]["result"]
    return [n["node_id"] for n in nodes if n["state"] == "ALIVE" and not n["is_head_node"]]
