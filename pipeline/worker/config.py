"""All settings of a run. Each section is declared beside the thing that it configures; they meet here."""

from typing import Any

import yaml
from pydantic import Field, field_validator, model_validator

from dinoray.pipeline.cluster.cost import CostConfig
from dinoray.pipeline.cluster.resources import ResourcesConfig
from dinoray.pipeline.data.config import DataConfig, PixelsConfig
from dinoray.pipeline.evaluation.config import EvalConfig, ProbeConfig
from dinoray.pipeline.storage.config import StorageConfig
from dinoray.pipeline.storage.files import is_s3, split_s3_uri
from dinoray.pipeline.storage.yaml_text import Dumper
from dinoray.pipeline.tracking.config import LogConfig, TrackConfig
from dinoray.pipeline.training.config import (
    CheckpointConfig,
    DINOConfig,
    FreezeConfig,
    HealthConfig,
    InitConfig,
)

MUTABLE_ON_RESUME = frozenset(
    {
        *("resources", "cost", "log", "track", "checkpoint", "health", "probe", "storage"),
        *("storage_path", "name", "recipe"),
    }
)
"""What may differ when a run is continued: nothing in them changes what is learnt."""

MUTABLE_KEYS = frozenset(
    {"data.streams", "eval.where", "eval.max_under_way", "eval.timeout_minutes", "train.compile"}
)
"""Such settings in other sections; with compiled blocks numbers are rounded otherwise."""


RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""It names a folder, and a job in an address."""


class Config(DINOConfig):
    """All settings of a run."""

    recipe: str
    """Name of the recipe, which sets the other values."""
    name: str = Field(pattern=RUN_NAME, max_length=100)
    """Name of the run and of its directory under `storage_path`; the same name resumes the run."""
    storage_path: str = Field(default="runs", min_length=1)
    """Folder or s3://bucket/prefix that holds run directories."""
    data: DataConfig
    storage: StorageConfig = StorageConfig()
    init: InitConfig = InitConfig()
    eval: EvalConfig = EvalConfig()
    probe: ProbeConfig = ProbeConfig()
    health: HealthConfig = HealthConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    track: TrackConfig = TrackConfig()
    resources: ResourcesConfig = ResourcesConfig()
    cost: CostConfig = CostConfig()

    @field_validator("storage_path")
    @classmethod
    def _is_local_or_in_a_bucket(cls, path: str) -> str:
        if is_s3(path):
            split_s3_uri(path)
        return path

    @model_validator(mode="before")
    @classmethod
    def _crops_follow_the_data(cls, tree: Any) -> Any:
        """Let the crops have as many channels as the pictures, unless they are said to have others."""
        data, crops = (
            (tree.get(name) for name in ("data", "crops")) if isinstance(tree, dict) else (None, None)
        )
        if not isinstance(data, dict) or "channels" not in data or not isinstance(crops, dict | None):
            return tree
        return tree | {"crops": {"channels": data["channels"]} | (crops or {})}

    @model_validator(mode="after")
    def _crops_have_the_channels_of_the_data(self) -> "Config":
        if self.crops.channels != self.data.channels:
            raise ValueError(
                f"crops.channels={self.crops.channels} must be data.channels={self.data.channels}; "
                f"set crops.channels={self.data.channels}"
            )
        return self

    @model_validator(mode="after")
    def _evaluator_is_used(self) -> "Config":
        for name in ("evaluator_cpus", "evaluator_gpus"):
            number = getattr(self.resources, name)
            if number and self.eval.where != "side":
                raise ValueError(
                    f"resources.{name}={number:g} is for eval.where=side; set that, or resources.{name}=0"
                )
        return self

    def algorithm(self) -> DINOConfig:
        """The part that defines what is learnt, without where and how it runs."""
        sections = {k: getattr(self, k) for k in DINOConfig.model_fields}
        pixels = {k: getattr(self.data, k) for k in PixelsConfig.model_fields}
        freeze = {k: getattr(self.init, k) for k in FreezeConfig.model_fields}
        return DINOConfig.model_validate(
            sections | {"data": PixelsConfig(**pixels), "init": FreezeConfig(**freeze)}
        )

    def with_pixels_of(self, learnt: DINOConfig) -> "Config":
        """The settings with what `data` leaves to be measured as a network was trained with it."""
        values = {
            k: getattr(learnt.data, k) for k in PixelsConfig.model_fields if getattr(self.data, k) == "auto"
        }
        return self.model_copy(update={"data": self.data.model_copy(update=values)})

    def to_yaml(self) -> str:
        """The resolved config, in the form that `--config` reads."""
        return yaml.dump(self.model_dump(mode="json"), Dumper=Dumper, sort_keys=False)
