"""The settings of evaluations and probes."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from dinoray.models.settings import Settings
from dinoray.pipeline.storage.addresses import normal_uri

LABELLED = ("knn", "linear")
"""Probes that classify."""
LABEL_FREE = ("rankme", "clid", "lidar", "std")
"""Probes of the features alone."""
NEIGHBOURS = "neighbours"
"""Not a score but a page, only if it is asked for: it needs the features of the start too."""


class EvalConfig(Settings):
    """Evaluation of the teacher's features before, during and at the end of the run."""

    val_path: str | None = "auto"
    """Labelled images to classify; auto: a fifth of `data.path`, if it has labels; null: no k-NN."""
    train_path: str | None = None
    """Labelled images that vote in k-NN; None: those of `data.path`."""
    every_steps: int = Field(default=1000, ge=1)
    """Steps between evaluations; the run also evaluates before the first step and at the end."""
    where: Literal["train", "side"] = "train"
    """train: the train workers evaluate, training stands; side: an actor beside them, from a copy of the weights."""
    max_under_way: int = Field(default=2, ge=1)
    """side: evaluations that may be under way when another one is due; then training waits for the oldest."""
    timeout_minutes: PositiveFloat | Literal["auto"] = "auto"
    """side: minutes until an evaluator is replaced; auto: 10 times the longest so far, at least 30; 24 h at first."""
    k: tuple[PositiveInt, ...] = Field(default=(10, 20), min_length=1)
    """Numbers of neighbours in k-NN; each gives one accuracy."""
    temperature: float = Field(default=0.07, gt=0)
    """Temperature of the votes exp(cosine / temperature)."""
    batch_size: int = Field(default=256, ge=1)
    """Images per forward."""
    max_train_images: int = Field(default=50_000, ge=1)
    """Maximum number of images that vote: a fixed random subset."""
    max_val_images: int = Field(default=10_000, ge=1)
    """Maximum number of images that are classified: a fixed random subset."""
    label_free: bool = True
    """Without labels, measure RankMe and CLID on `max_val_images` images of `data.path`."""
    lidar: bool = False
    """LiDAR too, of `probe.lidar_images` images with `probe.lidar_views` crops; from weights without labels always."""
    image_size: int | None = Field(default=None, ge=8)
    """Side of the centre crop in pixels; None: the global crop size."""

    def measures_lidar(self, *, labelled: bool, from_weights: bool) -> bool:
        """Return whether evaluations measure LiDAR: of labelled images, and from trained weights?"""
        return self.lidar or (self.label_free and from_weights and not labelled)

    @field_validator("val_path", "train_path")
    @classmethod
    def _path_is_an_address(cls, path: str | None) -> str | None:
        if path is not None:
            normal_uri(path)
        return path


class ProbeConfig(Settings):
    """Probes of `dinoray evaluate` besides k-NN; they do not change a run."""

    max_images: int = Field(default=25_600, ge=2)
    """RankMe and feature std: maximum number of images of `data.path`, a fixed random subset."""
    lidar_images: int = Field(default=256, ge=2)
    """LiDAR: maximum number of images; LiDAR is below this number."""
    lidar_views: int = Field(default=10, ge=2)
    """LiDAR: augmented crops of each image."""
    linear_blocks: int = Field(default=4, ge=1)
    """Linear: number of last blocks whose class tokens are concatenated (published: ViT-S 4, ViT-B 1)."""
    linear_mean_patches: bool = False
    """Linear: append the mean of the patch tokens (published: true for ViT-B)."""
    linear_lrs: tuple[PositiveFloat, ...] = Field(
        default=(1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1),
        min_length=1,
    )
    """Linear: learning rates per 256 images; all are tried in one training."""
    linear_epochs: int = Field(default=100, ge=1)
    """Linear: passes over the features."""
    linear_batch_size: int = Field(default=256, ge=1)
    """Linear: features per step."""
    linear_holdout: float = Field(default=0.1, gt=0, lt=1)
    """Linear: fraction of the training images held out to choose the learning rate."""
    seed: int = Field(default=0, ge=0)
    """Seed of the linear classifiers, the held-out images and the crops."""
