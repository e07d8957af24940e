"""What the trainer and the augment actor pool tell each other, over the run's channel."""

import ray

from dinoray.pipeline.cluster.channel import RunChannel
from dinoray.pipeline.cluster.pool_size import Actors, PoolSize, TrainerReading

_READING, _STATE, _SIZE = "trainer reading", "pool state", "pool size"


class PoolMailbox:
    """Readings from the trainer to the pool, and the pool's state to the trainer; picklable."""

    def __init__(self, channel: RunChannel) -> None:
        self._channel = channel

    def send_reading(self, reading: TrainerReading) -> None:
        """Add to the trainer's readings that the pool has not collected yet."""
        self._channel.add(_READING, reading)

    def collect_reading(self) -> "ray.ObjectRef[TrainerReading | None]":
        """Take the sum of the readings; the future result is None if there are none."""
        return self._channel.collect(_READING)

    def send_state(self, actors: Actors, size: PoolSize) -> None:
        """Replace the pool's state."""
        state = {"running": actors.running, "pending": actors.pending, "target": size.target}
        self._channel.put(_STATE, state)
        self._channel.put(_SIZE, size)

    def metrics(self) -> dict[str, float]:
        """Return `augment_actors` (running) and `augment_target`; empty before the pool's first state."""
        state = self._channel.get(_STATE)
        return {"augment_actors": state["running"], "augment_target": state["target"]} if state else {}

    def size(self) -> PoolSize | None:
        """Return the PoolSize that was last sent. The pool of the next leg continues with it."""
        return self._channel.get(_SIZE)
