"""Which checkpoints of a run are kept: the newest, the best by score, and multiples of a step. No torch, no Ray here.

Rank 0 decides it at each save; Ray Train deletes the others once the save is in its list.
"""

from collections.abc import Collection, Iterable, Mapping

from dinoray.pipeline.training.config import CheckpointConfig


def kept(
    steps: Collection[int],
    scores: Mapping[int, float],
    config: CheckpointConfig,
    *,
    under_way: Collection[int] = (),
) -> set[int]:
    """Return which of the checkpoints at `steps` are kept; the newest always is.

    `scores`: of evaluated steps, larger is better. A step without a score is none of the best; of two equal scores the
    later step has the better. `under_way`: steps whose scores are not known yet; they are kept until they are.
    """
    scored = sorted(set(steps) & scores.keys(), key=lambda step: (scores[step], step), reverse=True)
    every = config.keep_every_steps
    return {
        *sorted(steps)[-config.num_to_keep :],
        *scored[: config.num_best_to_keep],
        *(set(steps) & set(under_way)),
        *(step for step in steps if every is not None and step % every == 0),
    }


class Retention:
    """The checkpoints that a run has, as far as its saves succeed."""

    def __init__(self, config: CheckpointConfig, steps: Iterable[int]) -> None:
        """`steps`: of the checkpoints in Ray Train's list, which the run resumes with."""
        self._config, self._steps = config, set(steps)

    def add(
        self, step: int, scores: Mapping[int, float], *, replaces: bool, under_way: Collection[int] = ()
    ) -> list[int]:
        """Add the checkpoint of `step`, and return the steps of those that are not kept from now on, ascending.

        `replaces`: whether it can be resumed from. If it cannot, all others are kept. `under_way`: as in `kept`.
        """
        self._steps.add(step)
        return self.drop(scores, under_way=under_way) if replaces else []

    def drop(self, scores: Mapping[int, float], *, under_way: Collection[int] = ()) -> list[int]:
        """Return the steps of the checkpoints that are not kept from now on, ascending; `under_way`: as in `kept`."""
        dropped = self._steps - kept(self._steps, scores, self._config, under_way=under_way)
        self._steps -= dropped
        return sorted(dropped)
