"""A Ray head whose autoscaler starts nodes that are processes of this machine: Ray's own fake provider, by its name.

The nodes belong to the autoscaler, which leaves them when it ends: they are found by the address of the head and
ended by pid.
"""

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jobs_processes import end_processes, processes_with
from ray_head import RAY, RayHead, wait_for_dashboard
from servers import free_ports

HEAD_ID = "f" * 51 + "00000"
HEAD_TYPE = "ray.head.default"  # the provider knows no other
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
_LISTS = (
    *("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"),
    *("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude"),
    "rsync_filter",
)


def cluster_config(
    node_types: Mapping[str, Mapping[str, Any]], *, gcs: str, idle_seconds: float, max_workers: int
) -> dict[str, Any]:
    """What `ray start --autoscaling-config` reads; the head has one CPU, for the train worker."""
    return {
        "cluster_name": "fake",
        "max_workers": max_workers,
        "idle_timeout_minutes": idle_seconds / 60,
        "upscaling_speed": 1.0,
        "head_node_type": HEAD_TYPE,
        "provider": {
            "type": "external",
            "module": PROVIDER,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": HEAD_ID,
            "gcs_address": gcs,
        },
        "available_node_types": {
            HEAD_TYPE: {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            **{
                name: {"node_config": {}, "min_workers": 0, **node_type}
                for name, node_type in node_types.items()
            },
        },
        **{key: [] for key in _LISTS},
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
    }


@contextlib.contextmanager
def autoscaling_head(
    node_types: Mapping[str, Mapping[str, Any]],
    *,
    idle_seconds: float,
    max_workers: int,
    env: Mapping[str, str] | None = None,
) -> Iterator[RayHead]:
    """A head with one CPU and Ray's real autoscaler; `env` is what its nodes have beside ours."""
    port, dashboard, agent, grpc, metrics, client = free_ports(6)
    temp_dir = tempfile.mkdtemp(prefix="dr-", dir="/tmp")
    gcs = f"127.0.0.1:{port}"
    config = cluster_config(node_types, gcs=gcs, idle_seconds=idle_seconds, max_workers=max_workers)
    file = Path(temp_dir, "cluster.json")
    file.write_text(json.dumps(config))
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_"))}
    variables |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    variables |= env or {}
    process = subprocess.Popen(
        [
            *(RAY, "start", "--head", "--block", "--num-cpus=1", "--num-gpus=0", f"--temp-dir={temp_dir}"),
            *(f"--autoscaling-config={file}", f"--port={port}", f"--dashboard-port={dashboard}"),
            *(f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={grpc}"),
            *(f"--metrics-export-port={metrics}", f"--ray-client-server-port={client}"),
            *("--object-store-memory=400000000", "--min-worker-port=0", "--max-worker-port=0"),
        ],
        env=variables
        | {
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        address = f"http://127.0.0.1:{dashboard}"
        wait_for_dashboard(address, process)
        yield RayHead(address, gcs, Path(temp_dir), variables | {"RAY_ADDRESS": gcs})
    finally:
        process.kill()
        process.wait()
        for _ in range(2):  # the autoscaler may have been starting one
            end_processes([*processes_with(f"{temp_dir}/"), *processes_with(gcs)])
            time.sleep(0.5)
        shutil.rmtree(temp_dir, ignore_errors=True)
