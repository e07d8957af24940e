"""The settings of what a run logs, and who follows it."""

from pydantic import Field

from models.settings import Settings


class LogConfig(Settings):
    """How often metrics are written."""

    every_steps: int = Field(default=10, ge=1)
    """Steps between logged steps; metrics are those of the step, rates are means since the last one."""


class TrackConfig(Settings):
    """Services that follow a run, beside the files in its directory. Their addresses and keys come from the environment
    of the train workers (MLFLOW_TRACKING_URI, WANDB_API_KEY, WANDB_MODE), never from here."""

    mlflow: bool = False
    """Log to MLflow."""
    wandb: bool = False
    """Log to Weights & Biases."""
    project: str = Field(default="dinoray", min_length=1)
    """The MLflow experiment and the W&B project that the run is filed under."""
