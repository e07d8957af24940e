"""What MLflow and Weights & Biases are told of a run, in their own words. Both are imported when a run uses them.

Steps that a resumed run repeats are not told again: both services keep what they were told first, which is the same,
since a resumed run repeats what it did. Errors of any kind come out of here; tracking/services.py deals with them.
"""

import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from models.errors import ConfigError
from pipeline.storage.files import Directory, is_s3
from pipeline.storage.run_dir import checkpoint_name

_TAG = "dinoray.id"
_PARAM_LENGTH, _PARAMS_AT_ONCE = 500, 100
"""What every MLflow server takes."""


@dataclass(frozen=True)
class TrackedRun:
    """The run: what people call it, by what id it is known, where it is filed, its settings, and its directory."""

    name: str
    id: str
    project: str
    params: Mapping[str, Any]
    directory: Directory


class Tracker(Protocol):
    """One service that follows one run; each call returns when the service has it, or fails."""

    def log(self, step: int, values: Mapping[str, float], seconds: float) -> None:
        """Values as of `step` steps done, which was at `seconds` since 1970."""

    def picture(self, name: str, step: int, png: bytes) -> None:
        """A picture."""

    def page(self, html: str) -> None:
        """The page about the run."""

    def close(self, failed: bool) -> None:
        """The run ends."""


class MLflow:
    """A run of the experiment; the one with our id goes on."""

    def __init__(self, run: TrackedRun) -> None:
        quiet = {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
            # Its own, two minutes and seven times, are longer than anyone wants to not know.
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        }
        for name, value in quiet.items():
            os.environ.setdefault(name, value)
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            raise ConfigError("MLFLOW_TRACKING_URI is not set where the train workers run")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._client, self._metric = MlflowClient(), Metric
        experiment = self._client.get_experiment_by_name(run.project)
        number = (
            experiment.experiment_id
            if experiment
            else self._client.create_experiment(run.project, artifact_location=_artifact_location(run))
        )
        for found in self._client.search_runs([number], f"tags.`{_TAG}` = '{run.id}'", max_results=1):
            self._client.update_run(found.info.run_id, status="RUNNING")
            break
        else:
            found = self._client.create_run(number, tags={_TAG: run.id}, run_name=run.name)
        self._id = found.info.run_id
        self._old_metrics = set(found.data.metrics)
        self._last_steps: dict[str, int] = {}
        # A parameter cannot be changed: what a continued run may do differently stays as it was first told.
        new = [Param(k, str(v)[:_PARAM_LENGTH]) for k, v in run.params.items() if k not in found.data.params]
        for start in range(0, len(new), _PARAMS_AT_ONCE):
            self._client.log_batch(self._id, params=new[start : start + _PARAMS_AT_ONCE])

    def log(self, step: int, values: Mapping[str, float], seconds: float) -> None:
        """Points of curves, those that are not there yet."""
        points = [
            self._metric(name, value, int(seconds * 1000), step)
            for name, value in values.items()
            if step > self._last_step(name)
        ]
        if points:
            self._client.log_batch(self._id, metrics=points)

    def picture(self, name: str, step: int, png: bytes) -> None:
        """An artifact in a folder of this name; the same step's again replaces it."""
        image = Image.open(io.BytesIO(png))
        self._client.log_image(self._id, image, artifact_file=f"{name}/{checkpoint_name(step)}.png")

    def page(self, html: str) -> None:
        """An artifact."""
        self._client.log_text(self._id, html, "report.html")

    def close(self, failed: bool) -> None:
        """The run's status."""
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")

    def _last_step(self, name: str) -> int:
        """Up to which step the curve was there when we came."""
        if name not in self._old_metrics:
            return -1
        if name not in self._last_steps:
            history = self._client.get_metric_history(self._id, name)
            self._last_steps[name] = max((point.step for point in history), default=-1)
        return self._last_steps[name]


def _artifact_location(run: TrackedRun) -> str | None:
    """Beside run directories where there is a database and no server, which knows by itself: None.

    MLflow would take the folder that a worker happens to run in, which Ray removes.
    """
    kind = os.environ["MLFLOW_TRACKING_URI"].partition(":")[0].partition("+")[0]
    is_database = kind in ("sqlite", "postgresql", "mysql", "mssql")
    return f"{os.path.dirname(run.directory.uri)}/mlartifacts" if is_database else None


class WandB:
    """A run of the project; the one with our id goes on. W&B itself leaves out steps before its last one."""

    def __init__(self, run: TrackedRun) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_SILENT", "true")
        is_offline = os.environ.get("WANDB_MODE") == "offline"
        if is_offline and is_s3(run.directory.uri) and "WANDB_DIR" not in os.environ:
            raise ConfigError(
                "WANDB_MODE=offline keeps its files on a node: set WANDB_DIR to a folder that outlives it"
            )
        import wandb

        self._wandb, self._step = wandb, 0
        local = None if is_s3(run.directory.uri) or "WANDB_DIR" in os.environ else Path(run.directory.uri)
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=run.id,
            resume="allow",
            config=dict(run.params),
            allow_val_change=True,
            dir=local,
            reinit="create_new",
            save_code=False,
            settings=wandb.Settings(console="off", disable_git=True, init_timeout=60),
        )

    def log(self, step: int, values: Mapping[str, float], seconds: float) -> None:
        """A row of the history; several of one step make one row."""
        self._step = step
        self._run.log(dict(values), step=step)

    def picture(self, name: str, step: int, png: bytes) -> None:
        """An image of the row."""
        self._step = step
        self._run.log({name: self._wandb.Image(Image.open(io.BytesIO(png)))}, step=step)

    def page(self, html: str) -> None:
        """A panel of the last row."""
        self._run.log({"report": self._wandb.Html(html, inject=False)}, step=self._step)

    def close(self, failed: bool) -> None:
        """Send what is left."""
        self._run.finish(exit_code=int(failed))


OPEN: dict[str, Callable[[TrackedRun], Tracker]] = {"mlflow": MLflow, "wandb": WandB}
"""How to begin with each, by name."""
