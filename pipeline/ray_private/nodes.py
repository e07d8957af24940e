"""Nodes that are taken back: Ray lists them with the others, and has no public name for those that it drains.

Without this name a run that waits for nodes counts them for as long as they live. The same in Ray 2.58.1, 2.59.0 and
2.60.0.
"""

from typing import Any

import ray

try:
    from ray._private.state import state
except ImportError:
    state = None


def staying_nodes() -> list[dict[str, Any]]:
    """Return those of `ray.nodes()` that live and are not taken back."""
    drained = state.get_draining_nodes() if hasattr(state, "get_draining_nodes") else {}
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in drained]
