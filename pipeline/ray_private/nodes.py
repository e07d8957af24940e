"""Nodes that are taken back, and types of nodes that could be started: Ray has public names for neither.

Without the first name a run that waits for nodes counts those that are taken back for as long as they live; without the
second it does not say which types could bring what is missing. The same in Ray 2.58.1, 2.59.0 and 2.60.0.

Few autoscalers report their types to the cluster. That of `ray up` reads them from a file on the head, where drivers of
submitted jobs run.
"""

from pathlib import Path
from typing import Any

import ray
import yaml

try:
    from ray._private.state import state
except ImportError:
    state = None


BOOTSTRAP = Path.home() / "ray_bootstrap_config.yaml"
"""The cluster's config on a head that `ray up` has started."""


def staying_nodes() -> list[dict[str, Any]]:
    """Return those of `ray.nodes()` that live and are not taken back."""
    drained = state.get_draining_nodes() if hasattr(state, "get_draining_nodes") else {}
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in drained]


def node_types(file: Path = BOOTSTRAP) -> list[tuple[str, dict[str, float], int]]:
    """Return the types of nodes that the cluster's autoscaler may start: name, resources, and number of nodes (-1: no
    limit); [] where that is not known."""
    config = state.get_cluster_config() if hasattr(state, "get_cluster_config") else None
    groups = getattr(config, "node_group_configs", ())
    reported = [(group.name, dict(group.resources), group.max_count) for group in groups if group.max_count]
    return reported or _types_in(file)


def _types_in(file: Path) -> list[tuple[str, dict[str, float], int]]:
    try:
        config = yaml.safe_load(file.read_text())
        most, head = config.get("max_workers", 2), config["head_node_type"]
        types = {name: kind for name, kind in config["available_node_types"].items() if name != head}
        if not all(kind.get("resources") for kind in types.values()):
            return []  # Ray fills them in where it knows the provider's instances
        return [
            (name, dict(kind["resources"]), min(most, kind.get("max_workers", most)))
            for name, kind in types.items()
        ]
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError):
        return []  # it is for a line of information
