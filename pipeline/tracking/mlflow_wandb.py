"""Log a run to MLflow and Weights & Biases through their own APIs. Each is imported only if a run uses it.

Steps that a resumed run repeats are not sent again. Both services keep the first values, and the repeated
values are the same. Any kind of error may be raised here; tracking/services.py handles them.
"""

import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from dinoray.models.errors import ConfigError
from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.files import Directory, is_s3
from dinoray.pipeline.storage.run_dir import checkpoint_name
from dinoray.pipeline.tracking.scalar_names import group_of

_EVAL_STEP = "eval/step"
"""W&B: the step of the evaluation in a row."""
_TAG = "dinoray.id"
_PARAM_LENGTH, _PARAMS_AT_ONCE = 500, 100
"""Limits that every MLflow server accepts."""


@dataclass(frozen=True)
class TrackedRun:
    """A run: its name, its id in the services, its project, its settings and its directory."""

    name: str
    id: str
    project: str
    params: Mapping[str, Any]
    directory: Directory


class Tracker(Protocol):
    """One service for one run; each call returns once the service has the data, or raises."""

    def log(self, step: int, values: Mapping[str, float], seconds: float) -> None:
        """Log values after `step` steps, at `seconds` since 1970."""

    def picture(self, name: str, step: int, png: bytes) -> None:
        """Log a picture."""

    def page(self, html: str) -> None:
        """Log the HTML report of the run."""

    def close(self, failed: bool) -> None:
        """Mark the run as ended."""


class MLflow:
    """A run of the MLflow experiment; an existing run with the same id is resumed."""

    def __init__(self, run: TrackedRun) -> None:
        quiet = {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
            # MLflow's defaults, two minutes and seven retries, would report a failure too late.
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        }
        for name, value in quiet.items():
            os.environ.setdefault(name, value)
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            raise ConfigError(
                "MLFLOW_TRACKING_URI is not set where the train workers run; set it in the environment of the nodes"
            )
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
        # MLflow cannot change a parameter, so settings that a resumed run changed keep their first value
        # there.
        new = [Param(k, str(v)[:_PARAM_LENGTH]) for k, v in run.params.items() if k not in found.data.params]
        for start in range(0, len(new), _PARAMS_AT_ONCE):
            self._client.log_batch(self._id, params=new[start : start + _PARAMS_AT_ONCE])

    def log(self, step: int, values: Mapping[str, float], seconds: float) -> None:
        """Log the points that the curves do not have yet."""
        points = [
            self._metric(name, value, int(seconds * 1000), step)
            for name, value in values.items()
            if step > self._last_step(name)
        ]
        if points:
            self._client.log_batch(self._id, metrics=points)

    def picture(self, name: str, step: int, png: bytes) -> None:
        """Log an artifact in the folder `name`; it replaces an artifact of the same step."""
        image = Image.open(io.BytesIO(png))
        self._client.log_image(self._id, image, artifact_file=f"{name}/{checkpoint_name(step)}.png")

    def page(self, html: str) -> None:
        """Log the report as an artifact."""
        self._client.log_text(self._id, html, run_dir.REPORT)

    def close(self, failed: bool) -> None:
        """Set the run's status."""
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")

    def _last_step(self, name: str) -> int:
        """Return the last step that the curve had when this process opened the run; -1 if none."""
        if name not in self._old_metrics:
            return -1
        if name not in self._last_steps:
            history = self._client.get_metric_history(self._id, name)
            self._last_steps[name] = max((point.step for point in history), default=-1)
        return self._last_steps[name]


def _artifact_location(run: TrackedRun) -> str | None:
    """Return a folder beside the run directories for a database without a server; None for a server.

    A server has a location of its own. For a database MLflow would use the worker's current folder, which Ray
    removes.
    """
    kind = os.environ["MLFLOW_TRACKING_URI"].partition(":")[0].partition("+")[0]
    is_database = kind in ("sqlite", "postgresql", "mysql", "mssql")
    return f"{os.path.dirname(run.directory.uri)}/mlartifacts" if is_database else None


class WandB:
    """A run of the W&B project; an existing run with the same id is resumed.

    W&B itself skips earlier steps. An evaluation may arrive after later steps: it goes into the newest row, or into one
    after it where that has another evaluation, and curves of evaluations are drawn over the step that a row has for
    them.
    """

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
        self._over_own_step: set[str] = set()
        self._newest_evaluation = (-1, -1)
        """Its row, and its step."""
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
        """Log a row of the history; calls with the same step are merged into one row."""
        self._log(step, dict(values))

    def picture(self, name: str, step: int, png: bytes) -> None:
        """Log an image in the row of `step`."""
        self._log(step, {name: self._wandb.Image(Image.open(io.BytesIO(png)))})

    def _log(self, step: int, values: dict[str, Any]) -> None:
        self._step = step
        evaluated = {name for name in values if group_of(name.removeprefix("eval/")) == "eval"}
        if evaluated:
            for name in evaluated - self._over_own_step:
                self._run.define_metric(name, step_metric=_EVAL_STEP)
            self._over_own_step |= evaluated
            row, other = self._newest_evaluation
            self._step = max(step, self._run.step)
            self._step += self._step == row and step != other
            self._newest_evaluation = (self._step, step)
            values[_EVAL_STEP] = step
        self._run.log(values, step=self._step)

    def page(self, html: str) -> None:
        """Log the report as a panel of the last row."""
        self._run.log({"report": self._wandb.Html(html, inject=False)}, step=self._step)

    def close(self, failed: bool) -> None:
        """Send all remaining data and end the run."""
        self._run.finish(exit_code=int(failed))


OPEN: dict[str, Callable[[TrackedRun], Tracker]] = {"mlflow": MLflow, "wandb": WandB}
"""Service name -> class that opens it."""
