"""Workers that end before the last step: the run stops, or they start again on other nodes or in another number.

They save a checkpoint first, so that no step is lost. To start again, they end as if the run were done, and the driver
starts Ray Train anew: on nodes that are not taken back, with as many workers as there is room for.
"""

import ray

from dinoray.pipeline.cluster.channel import EndRequest, RunChannel

_RESTART = "restart"
"""Name under which the run's channel keeps that the workers have ended to start again."""


class Ending:
    """Rank 0's knowledge of a request to end; others learn of it from rank 0."""

    def __init__(self, channel: RunChannel) -> None:
        self._channel = channel
        self._asked = channel.end_request()
        self.request: EndRequest | None = None

    def is_asked(self) -> bool:
        """Return whether the workers were asked to end; does not wait."""
        if self.request is None and ray.wait([self._asked], timeout=0)[0]:
            self.request = ray.get(self._asked)
        return self.request is not None

    def is_stop(self) -> bool:
        """Return whether the workers were asked to end and not to start again; does not wait."""
        return self.is_asked() and self.request is not None and self.request.restart is None

    def post(self, step: int) -> None:
        """Tell the driver that the workers have ended after `step`, saved; return once it has arrived."""
        if self.request is None or self.request.restart is None:
            self._channel.post_and_wait("stopped", step=step)
        else:
            self._channel.put(_RESTART, True)
            self._channel.post_and_wait("lost", text=self.request.restart, step=step)


def grow(channel: RunChannel, workers: int, more: int) -> None:
    """Have the train workers save a checkpoint and start again as `more`."""
    channel.request_end(EndRequest(restart=f"from {workers} to {more} train workers"))


def take_restart(channel: RunChannel) -> bool:
    """Return whether the workers, which have ended, did so to start again. For the driver."""
    is_restart = bool(channel.get(_RESTART))
    if is_restart:
        channel.put(_RESTART, False)
    return is_restart
