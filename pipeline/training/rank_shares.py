"""Run a step of several ranks in one process: the ranks' shares of the batch are microbatches of one step.

Gradients and losses of microbatches add up as those of ranks do, so the step itself is the run's. Two things of a step
look beyond a rank: batch norm and Sinkhorn-Knopp. With either, the shares of all ranks are passed at once. No Ray here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dinoray.models.backbone import has_batch_norm
from dinoray.pipeline.data.partition import Layout, batch_size_per_worker, check_accumulation
from dinoray.pipeline.training.config import DINOConfig
from dinoray.pipeline.training.state import TrainState
from dinoray.pipeline.training.step import drop_path_seed


class RankShares(NamedTuple):
    """How one process takes the microbatches of `world_size` ranks: `together`, or one rank after the other."""

    world_size: int
    batch_size_per_worker: int
    accumulate_steps: int
    together: bool

    @classmethod
    def of(cls, state: TrainState, world_size: int) -> "RankShares":
        """Return the shares of a run's ranks. Raises ConfigError if the batch cannot be divided."""
        train = state.config.train
        each = batch_size_per_worker(train.global_batch_size, world_size)
        check_accumulation(each, train.accumulate_steps)
        together = world_size > 1 and _looks_beyond_a_rank(state)
        return cls(world_size, each, train.accumulate_steps, together)

    @property
    def num_parts(self) -> int:
        """Microbatches of a step in this process."""
        return self.accumulate_steps * (1 if self.together else self.world_size)

    @property
    def rows_per_part(self) -> int:
        """Images of a microbatch in this process."""
        return self.world_size * self.batch_size_per_worker // self.num_parts

    def positions(self, step: int) -> NDArray[np.int64]:
        """Return the positions of `step`, 0-based, ordered so that microbatches have the rows of the run's."""
        layout = Layout(step, step + 1, self.world_size, self.batch_size_per_worker, steps_per_block=1)
        every = np.concatenate([layout.positions(step, rank) for rank in range(self.world_size)])
        if self.together:
            return every  # each accumulate_steps-th row of each rank
        return every.reshape(self.world_size, -1, self.accumulate_steps).transpose(1, 0, 2).ravel()

    def rank_of(self, position: int) -> int:
        """Return the rank that has `position`."""
        return position // self.batch_size_per_worker % self.world_size

    def config(self, config: DINOConfig) -> DINOConfig:
        """Return the settings of a step in this process."""
        train = config.train.model_copy(update={"accumulate_steps": self.num_parts})
        return config.model_copy(update={"train": train})

    @contextmanager
    def seeding(self, state: TrainState) -> Iterator[None]:
        """Make each rank's draws of stochastic depth while this process runs the ranks' microbatches."""
        calls = 0

        def seed(*_: Any) -> None:
            nonlocal calls
            part = calls % self.num_parts
            calls += 1
            if part % self.accumulate_steps == 0:
                rank = 0 if self.together else part // self.accumulate_steps
                torch.manual_seed(drop_path_seed(state.config.train.seed, state.step, rank))

        hook = state.dino.student.register_forward_pre_hook(seed)
        try:
            yield
        finally:
            hook.remove()

    def inexact(self, config: DINOConfig) -> list[str]:
        """Return what of a step differs from the run's: ranks are one process, and blocks are not compiled."""
        lines = []
        if config.train.compile == "on":
            lines.append(
                "compiled blocks: a replay runs them eagerly, with other rounding and draws (train.compile)"
            )
        if not self.together:
            return lines
        why = f"the {self.world_size} ranks are passed at once"
        if config.backbone.drop_path_rate:
            lines.append(f"stochastic depth: {why}, with the draws of rank 0 (backbone.drop_path_rate)")
        if config.loss.koleo_weight:
            lines.append(f"KoLeo: {why}, and neighbours are those among all images (loss.koleo_weight)")
        return lines


def _looks_beyond_a_rank(state: TrainState) -> bool:
    """Return True if a part of the step takes the rows of all ranks."""
    return has_batch_norm(state.dino.student) or state.config.loss.centering == "sinkhorn_knopp"
