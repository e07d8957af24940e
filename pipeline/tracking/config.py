"""The settings of what a run logs, and who follows it."""

from pydantic import Field

from dinoray.models.settings import Settings


class LogConfig(Settings):
    """Logging of metrics."""

    every_steps: int = Field(default=10, ge=1)
    """Steps between logged steps; metrics are of that step, rates are means since the last logged step."""


class TrackConfig(Settings):
    """Tracking services, in addition to the files in the run directory. Addresses and keys come from the environment of
    the train workers (MLFLOW_TRACKING_URI, WANDB_API_KEY, WANDB_MODE), never from here."""

    mlflow: bool = False
    """Log to MLflow."""
    wandb: bool = False
    """Log to Weights & Biases."""
    project: str = Field(default="dinoray", min_length=1)
    """MLflow experiment and W&B project of the run."""
