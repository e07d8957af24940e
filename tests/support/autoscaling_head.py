"""A Ray head whose autoscaler starts nodes that are processes of this machine: Ray's own fake provider."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from paths import ROOT, SUPPORT
from ray_head import RayHead, ray_head

HEAD_ID = "f" * 51 + "00000"
HEAD_TYPE = "ray.head.default"  # the provider knows no other
PROVIDER = "fake_nodes.FakeNodes"
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

    def config(gcs: str) -> dict[str, Any]:
        return cluster_config(node_types, gcs=gcs, idle_seconds=idle_seconds, max_workers=max_workers)

    head_env = {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        "PYTHONPATH": os.pathsep.join(
            map(str, (ROOT, SUPPORT))
        ),  # the autoscaler imports the provider by its name
    }
    with ray_head(env, num_cpus=1, autoscaling=config, head_env=head_env) as head:
        yield head
