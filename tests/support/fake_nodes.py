"""Ray's fake provider of nodes, whose nodes of one machine do not take each other's sockets.

A raylet chooses a name that no file has, and binds it some time later: of two that start at once, the second ends with
"Address already in use", and the autoscaler waits for it.
"""

import time
from pathlib import Path
from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class FakeNodes(FakeMultiNodeProvider):  # type: ignore[misc]
    """Starts the next node once the sockets of the one before are there."""

    def _create_node_with_resources_and_labels(self, *arguments: Any) -> None:
        with self.lock:
            super()._create_node_with_resources_and_labels(*arguments)
            node = list(self._nodes.values())[-1]["node"]
            deadline = time.monotonic() + 60
            while not Path(node.raylet_socket_name).exists() and time.monotonic() < deadline:
                time.sleep(0.01)
