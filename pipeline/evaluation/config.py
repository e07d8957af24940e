"""The settings of evaluations and probes."""

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from models.settings import Settings
from pipeline.storage.files import normal_uri

LABELLED = ("knn", "linear")
"""Probes that classify."""
LABEL_FREE = ("rankme", "lidar", "std")
"""Probes of the features alone."""


class EvalConfig(Settings):
    """How good the teacher's features are, before, during and at the end of the run."""

    val_path: str | None = "auto"
    """Labelled images that are classified; auto: a fifth of `data.path`, if it has labels; null: no k-NN."""
    train_path: str | None = None
    """Labelled images that vote for those of `val_path`; None takes `data.path`."""
    every_steps: int = Field(default=1000, ge=1)
    """Steps between evaluations; there is one before the first step and one at the end as well."""
    k: tuple[PositiveInt, ...] = Field(default=(10, 20), min_length=1)
    """Numbers of neighbours that vote; one accuracy each."""
    temperature: float = Field(default=0.07, gt=0)
    """Temperature of the votes exp(cosine / temperature)."""
    batch_size: int = Field(default=256, ge=1)
    """Images per forward."""
    max_train_images: int = Field(default=50_000, ge=1)
    """Voters are a fixed random subset of at most this size."""
    max_val_images: int = Field(default=10_000, ge=1)
    """Classified images likewise."""
    label_free: bool = True
    """Where there are no labels: measure RankMe on `max_val_images` images of `data.path`."""
    lidar: bool = False
    """Measure LiDAR as well, on `probe.lidar_images` images of `data.path` by `probe.lidar_views` augmented views."""
    image_size: int | None = Field(default=None, ge=8)
    """Side of the centre crop in pixels; None takes the global crop size."""

    @field_validator("val_path", "train_path")
    @classmethod
    def _path_is_an_address(cls, path: str | None) -> str | None:
        if path is not None:
            normal_uri(path)
        return path


class ProbeConfig(Settings):
    """What `jobs.evaluate` measures beside k-NN. Nothing here changes a run."""

    max_images: int = Field(default=25_600, ge=2)
    """RankMe and feature std: a fixed random subset of the images under `data.path`, of at most this size."""
    lidar_images: int = Field(default=256, ge=2)
    """LiDAR: images likewise; the rank found is below their number."""
    lidar_views: int = Field(default=10, ge=2)
    """LiDAR: augmented views of each."""
    linear_blocks: int = Field(default=4, ge=1)
    """Linear: class tokens of this many last blocks, side by side (published: ViT-S 4, ViT-B 1)."""
    linear_mean_patches: bool = False
    """Linear: the mean patch token beside them (published: ViT-B true)."""
    linear_lrs: tuple[PositiveFloat, ...] = Field(
        default=(1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1),
        min_length=1,
    )
    """Linear: learning rates per 256 images that are tried, all in one training."""
    linear_epochs: int = Field(default=100, ge=1)
    """Linear: passes over the features."""
    linear_batch_size: int = Field(default=256, ge=1)
    """Linear: features per step."""
    linear_holdout: float = Field(default=0.1, gt=0, lt=1)
    """Linear: share of the training images kept out to choose the learning rate by."""
    seed: int = Field(default=0, ge=0)
    """Seeds the linear classifiers, the held-out share, and the views."""
