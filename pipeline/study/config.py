"""Settings of a study: the config section `tune`. No Ray here."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_serializer, field_validator

from dinoray.models.settings import Settings
from dinoray.pipeline.study.space import Domain, parse_space

Searcher = Literal["tpe", "random", "quasi", "grid"]


class StudySettings(Settings):
    """What is searched, by whom, for how long, and on how much of the cluster."""

    trials: int = Field(default=16, ge=1)
    """Sets of parameters to try; more of them continue a study that is done. Of a grid, all its points are."""
    space: dict[str, Domain] | None = None
    """Settings by dotted key, each with its domain; None: teacher temperature, its warm-up, and centre momentum."""
    first: tuple[dict[str, Any], ...] = ()
    """Points that are tried before all others, after the recipe's own."""
    try_recipe: bool = True
    """The first trial takes the recipe's own values, so that there is something to be better than."""
    searcher: Searcher = "tpe"
    """TPE (Optuna, multivariate), at random, evenly spread (Sobol), or a grid."""
    grid_points: int = Field(default=4, ge=1)
    """Values of each range in a grid."""
    objective: Literal["auto", "knn", "rankme", "lidar", "loss"] = "auto"
    """What trials are ranked by; auto: k-NN with labels, else RankMe, or LiDAR where it would be misled."""
    epochs: float | None = Field(default=None, gt=0)
    """Length of a trial; warm-ups stay as they are, up to 30 % of it. None: that of the run."""
    evaluations: int = Field(default=8, ge=1)
    """Evaluations of a trial, evenly spaced; at each it may be given up."""
    scheduler: Literal["asha", "pb2", "none"] = "asha"
    """ASHA gives up all but the best at each rung; PB2 moves settings of a population while it trains."""
    reduction_factor: float = Field(default=3, gt=1)
    """One of so many goes on at each rung of ASHA."""
    grace: float = Field(default=0.4, ge=0, le=1)
    """Share of a trial before which none is given up: early scores say little; at least until all warm-ups are over."""
    confirm_top: int = Field(default=3, ge=0)
    """The best so many are run again with other seeds; 0: no confirmation."""
    confirm_seeds: int = Field(default=3, ge=2)
    """Seeds of each of them, the first included."""
    share_stream: bool = False
    """Trials of one seed share one stream of augmented crops; only where nothing of crops or batch varies."""
    share_stream_bytes: int = Field(default=1 << 30, ge=1)
    """Crops that a shared stream keeps for trials that lag behind."""
    max_concurrent: int | None = Field(default=None, ge=1)
    """Trials at once; None: as many as fit."""
    cluster_cpus: int | None = Field(default=None, ge=1)
    """CPUs that the cluster will have, where it grows; None: those that are there."""
    cluster_gpus: int | None = Field(default=None, ge=1)
    """GPUs likewise."""
    max_failures: int = Field(default=2, ge=0)
    """Times that a trial which died, with its node or by an error, is continued from its checkpoint."""
    seed: int = Field(default=0, ge=0)
    """Seeds the proposals; the trials themselves have the run's `train.seed`."""

    @field_validator("space", mode="before")
    @classmethod
    def _domains_are_parsed(cls, tree: Any) -> Any:
        return None if tree is None else parse_space(tree)

    @field_validator("space")
    @classmethod
    def _something_is_searched(cls, space: dict[str, Domain] | None) -> dict[str, Domain] | None:
        if space is not None and not space:
            raise ValueError("an empty space has nothing to search; leave it out for the default")
        return space

    @field_serializer("space")
    def _as_written(self, space: Mapping[str, Domain] | None) -> Any:
        return None if space is None else {key: {d.kind: list(d.values)} for key, d in space.items()}
