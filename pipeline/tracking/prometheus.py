"""Gauges of a live run, which Ray exports to Prometheus; deploy/grafana.json draws them.

A sink of tracking/run_log.py that works only within Ray. Ray prefixes each name with `ray_`.
"""

from collections.abc import Mapping

from ray.util.metrics import Gauge

from dinoray.pipeline.tracking.scalar_names import OF_START
from dinoray.pipeline.tracking.sink import MetricSink, numbers

PREFIX = "dinoray_"
GAUGES = {
    "step": "Steps done",
    "total_steps": "Steps of the whole run",
    "epoch": "Times that the images were seen",
    "loss": "Cross-entropy of the last logged step",
    "teacher_entropy": "Entropy of the teacher's targets in nats",
    "images_per_second": "Images trained on per second, all workers",
    "data_wait": "Share of the time that training waits for data, 0 to 1",
    "tflops": "TFLOP/s of each GPU",
    "mfu": "Share of what a GPU reaches in large matrix products, 0 to 1",
    "staged_bytes": "Bytes of crops that lie on the first GPU for its next steps",
    "recompiled_graphs": "Graphs compiled after the first step",
    "skipped_steps": "Steps that were not finite, so far",
    "unchecked_reads": "Reads of objects that no checksum covers, so far",
    "evaluations_under_way": "Evaluations beside training that have not arrived",
    "bad_images": "Images that could not be used, so far",
    "knn_20": "Accuracy of 20 nearest neighbours at the last evaluation, 0 to 1",
    f"{OF_START}knn_20": "Accuracy of 20 nearest neighbours of the initial weights, 0 to 1",
    "nodes_head": "Head nodes",
    "nodes_cpu": "Nodes without GPUs",
    "nodes_gpu": "Nodes with GPUs",
    "train_workers": "Processes that train",
    "augment_actors": "Actors that augment",
    "augment_target": "Actors that shall augment",
    "dollars": "What the run has cost so far",
}
"""Name, without prefixes -> description."""


class Gauges(MetricSink):
    """Gauges of the run named `run`."""

    def __init__(self, run: str, *, total_steps: int) -> None:
        self._step, self._total_steps = 0, total_steps
        self._gauges = {name: Gauge(PREFIX + name, text, ("run",)) for name, text in GAUGES.items()}
        for gauge in self._gauges.values():
            gauge.set_default_tags({"run": run})

    def log(self, step: int, values: Mapping[str, float | str]) -> None:
        """Set the gauges that have a value. An evaluation may arrive after later steps."""
        self._step = max(step, self._step)
        self._set({"step": self._step, "total_steps": self._total_steps, **values})

    def set_start(self, scores: Mapping[str, float | str]) -> None:
        """Set the line to beat: `scores` are those of the initial weights."""
        self._set({f"{OF_START}{name}": value for name, value in scores.items()})

    def _set(self, values: Mapping[str, float | str]) -> None:
        for name, value in numbers(values).items():
            if name in self._gauges:
                self._gauges[name].set(float(value))
