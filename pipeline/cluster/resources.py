"""Config of a run's processes: their number and resources. No Ray here; worker/worker.py and jobs/ use it."""

from math import ceil
from typing import Literal

from pydantic import Field, PositiveInt, field_validator

from dinoray.models.settings import Settings


class ResourcesConfig(Settings):
    """Processes of the run, with their CPUs and GPUs. They do not change what is learnt and may differ at a resume."""

    train_workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """DDP processes, which divide the global batch; a range [least, most] follows the nodes that there are."""
    use_gpu: bool | Literal["auto"] = "auto"
    """One GPU per train worker; auto takes GPUs when the cluster has any."""
    cpus_per_train_worker: float = Field(default=1, ge=0)
    """CPUs reserved for each train worker."""
    augment_actors: PositiveInt | tuple[PositiveInt, PositiveInt] | Literal["auto"] = "auto"
    """Augmentation actors: a number; a range [least, most], scaled by the wait for data; auto: all CPUs left."""
    cpus_per_augment_actor: float = Field(default=1, gt=0)
    """CPUs reserved for each augment actor."""
    cool_down_seconds: float = Field(default=60, gt=0)
    """Seconds without a wait for data after which a range of augmentation actors is scaled down."""
    evaluator_cpus: float = Field(default=0, ge=0)
    """With eval.where=side, CPUs reserved for the evaluator; 0: none, it takes at a low priority what others leave."""
    evaluator_gpus: float = Field(default=0, ge=0)
    """With eval.where=side, GPUs of the evaluator beside those of the train workers; 0: it computes on CPUs."""
    prefetch_batches: int = Field(default=2, ge=0)
    """Batches that each train worker prefetches."""
    max_failures: int = Field(default=3, ge=-1)
    """Restarts after lost or failed train workers that bring no new checkpoint; -1: no limit."""
    hang_seconds: float = Field(default=300, gt=0)
    """Longest time that a train worker may give no sign of life, or be at one step; then it is replaced."""
    wait_for_nodes_minutes: float = Field(default=60, gt=0)
    """Longest wait for missing nodes, at the start and after a loss, or for images; then the exit code is 4."""

    @field_validator("train_workers", "augment_actors")
    @classmethod
    def _range_is_ordered(cls, number: int | tuple[int, int] | str) -> int | tuple[int, int] | str:
        if isinstance(number, tuple) and number[0] > number[1]:
            raise ValueError(
                f"{list(number)} must be [least, most] with least <= most, e.g. {sorted(number)}"
            )
        return number

    @property
    def worker_range(self) -> tuple[int, int]:
        """Least and most train workers."""
        return (self.train_workers,) * 2 if isinstance(self.train_workers, int) else self.train_workers

    @property
    def least_workers(self) -> int:
        """Train workers without which a run waits."""
        return self.worker_range[0]

    @property
    def most_workers(self) -> int:
        """Train workers of a run that has all its nodes."""
        return self.worker_range[1]

    @property
    def actor_range(self) -> tuple[int, int | None]:
        """Least and most augment actors; None: as many as there are CPUs for."""
        if self.augment_actors == "auto":
            return 1, None
        return (self.augment_actors,) * 2 if isinstance(self.augment_actors, int) else self.augment_actors

    @property
    def train_cpus(self) -> float:
        """CPUs of the least train workers."""
        return self.least_workers * self.cpus_per_train_worker

    def least_actors(self, num_streams: int = 1) -> int:
        """Augment actors that a run of `num_streams` streams starts with: at least one for each stream."""
        return max(num_streams, self.actor_range[0])

    def least_cpus(self, num_streams: int = 1) -> int:
        """CPUs that a run needs: one more than its processes, for Ray's own small tasks, which else wait for ever."""
        actors = self.least_actors(num_streams) * self.cpus_per_augment_actor
        return ceil(self.train_cpus + actors + self.evaluator_cpus) + 1

    def spare_actors(self, cpus: int, num_streams: int = 1) -> int:
        """Augment actors for which `cpus` have room beside as many train workers as fit with the least actors."""
        more = 0
        if self.cpus_per_train_worker:
            left = max(0, cpus - self.least_cpus(num_streams))
            more = min(self.most_workers - self.least_workers, int(left // self.cpus_per_train_worker))
        train = self.train_cpus + more * self.cpus_per_train_worker
        return int((cpus - train - self.evaluator_cpus - 1) // self.cpus_per_augment_actor)
