"""The probes of one frozen network on a Ray that is up: embed on actors, then measure."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import ray
import torch

from dinoray.models.backbone import embed_dim
from dinoray.models.errors import DataError
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.evaluation.actors import EmbedTask, embed_on_actors
from dinoray.pipeline.evaluation.backbone_outputs import embed_views, has_tokens, with_blocks
from dinoray.pipeline.evaluation.clid import MIN_IMAGES, learnability_and_dimension
from dinoray.pipeline.evaluation.features import Features, embed_source, merge
from dinoray.pipeline.evaluation.knn import Answers, KnnProblem, class_numbers, detailed_scores
from dinoray.pipeline.evaluation.labels import subset
from dinoray.pipeline.evaluation.probes import (
    LinearScores,
    collapsed_dims,
    feature_std,
    lidar,
    linear_probe,
    rankme,
)
from dinoray.pipeline.training.checkpoint import FrozenBackbone
from dinoray.pipeline.worker.config import Config


class Prober:
    """What all probes of a network share: its settings and where it runs."""

    def __init__(self, config: Config, network: FrozenBackbone, *, actors: int, use_gpu: bool) -> None:
        self._config = config
        self._crops, self._network = network.config.crops, ray.put(network)
        self._actors, self._use_gpu = actors, use_gpu
        backbone = network.backbone()
        self._dim = embed_dim(backbone)
        self._num_blocks = len(backbone.blocks) if has_tokens(backbone) else 0  # type: ignore[arg-type]

    def scores(
        self, probes: Sequence[str], *, labelled: tuple[Source, Source] | None, images: Source | None
    ) -> dict[str, Any]:
        """All scores: classifiers learn from the first of `labelled` and take the second; the others take `images`."""
        config, probe = self._config.eval, self._config.probe
        tasks: dict[str, EmbedTask] = {}
        if labelled is not None:
            blocks = partial(
                with_blocks, num_blocks=probe.linear_blocks, mean_patches=probe.linear_mean_patches
            )
            forward = blocks if "linear" in probes else None
            tasks["train"] = self._features(labelled[0], config.max_train_images, forward=forward)
            tasks["val"] = self._features(labelled[1], config.max_val_images, forward=forward)
        if images is not None and {"rankme", "clid", "std"} & set(probes):
            tasks["images"] = self._features(images, probe.max_images, labelled=False)
        if images is not None and "lidar" in probes:
            tasks["views"] = self._views(images)
        found = self._run(tasks)

        result: dict[str, Any] = {}
        if labelled is not None:
            result |= self._labelled(merge(found["train"]), merge(found["val"]), probes)
        if "images" in tasks:
            result |= self._label_free(merge(found["images"]), probes)
        if "views" in tasks:
            parts = [part for part in found["views"] if len(part)]
            views = np.concatenate(parts) if parts else np.empty((0, probe.lidar_views, 0))
            result |= {"lidar_images": views.shape[0], "lidar_views": views.shape[1], "lidar": lidar(views)}
        return result

    def _labelled(self, train: Features, val: Features, probes: Sequence[str]) -> dict[str, Any]:
        """Accuracies on `val` of what `train` teaches."""
        classes = class_numbers(train, val)
        result: dict[str, Any] = {
            "num_train": len(train.labels),
            "num_val": len(val.labels),
            "num_unreadable": train.num_bad + val.num_bad,
            "num_classes": len(classes),
        }
        if "knn" in probes:
            outputs = [side._replace(features=side.features[:, : self._dim]) for side in (train, val)]
            problem = KnnProblem.of(outputs[0], outputs[1], self._config.eval)
            result |= detailed_scores(problem, sharded_knn(problem), classes)
        if "linear" in probes:
            result |= self._linear((train, val), classes)
        return result

    def _label_free(self, found: Features, probes: Sequence[str]) -> dict[str, Any]:
        path = self._config.data.path
        if not found.labels:
            raise DataError(
                f"{path} has no readable image ({found.num_bad} unreadable); set data.path to readable images"
            )
        result: dict[str, Any] = {"num_images": len(found.labels), "num_images_unreadable": found.num_bad}
        if "rankme" in probes:
            result["rankme"] = rankme(found.features)
        if "clid" in probes and len(found.features) >= MIN_IMAGES:
            result |= learnability_and_dimension(found.features)
        if "std" in probes:
            result["feature_std"] = feature_std(found.features)
            result["feature_std_healthy"] = 1 / math.sqrt(self._dim)
            result["collapsed_dims"] = collapsed_dims(found.features)
        return result

    def _linear(self, sides: Sequence[Features], classes: Mapping[str, int]) -> dict[str, Any]:
        probe = self._config.probe
        rows = [side.features[:, self._dim :] for side in sides]
        labels = [torch.tensor([classes[label] for label in side.labels]) for side in sides]
        fit = partial(
            linear_probe, num_classes=len(classes), config=probe, device="cuda" if self._use_gpu else "cpu"
        )
        arguments = (rows[0], labels[0], rows[1], labels[1])
        scores: LinearScores = (
            ray.get(ray.remote(num_gpus=1)(_on_copies).remote(fit, *arguments))
            if self._use_gpu
            else fit(*arguments)
        )
        return {
            "linear": scores.val[scores.best],
            "linear_lr": scores.lrs[scores.best],
            "linear_holdout": scores.holdout[scores.best],
            "linear_dim": rows[0].shape[1],
            "linear_features": self._linear_features(),
            "linear_table": [
                {"lr": lr, "holdout": held, "val": val}
                for lr, held, val in zip(scores.lrs, scores.holdout, scores.val, strict=True)
            ],
        }

    def _linear_features(self) -> str:
        probe = self._config.probe
        if not self._num_blocks:
            return "output"
        blocks = f"class tokens of the last {min(probe.linear_blocks, self._num_blocks)} blocks"
        return f"{blocks}, mean patch token" if probe.linear_mean_patches else blocks

    def _features(
        self, source: Source, limit: int, *, forward: Any = None, labelled: bool = True
    ) -> EmbedTask:
        config = self._config.eval
        work = partial(
            embed_source,
            crops=self._crops,
            config=config,
            precision=self._config.train.precision,
            forward=forward,
            labelled=labelled,
        )
        # More batches an item on a GPU: the next one is decoded while it computes.
        return _task(work, source, limit, config.batch_size * (4 if self._use_gpu else 1))

    def _views(self, source: Source) -> EmbedTask:
        probe, batch_size = self._config.probe, self._config.eval.batch_size
        work = partial(
            embed_views,
            crops=self._crops,
            num_views=probe.lidar_views,
            seed=probe.seed,
            batch_size=batch_size,
            precision=self._config.train.precision,
        )
        return _task(work, source, probe.lidar_images, max(1, batch_size // probe.lidar_views))

    def _run(self, tasks: Mapping[str, EmbedTask]) -> dict[str, list[Any]]:
        """The results of each task, in the order of its items; all tasks share one pool of actors."""
        names = list(tasks)
        found: dict[str, list[Any]] = {name: [] for name in names}
        for number, result in embed_on_actors(
            self._network, list(tasks.values()), actors=self._actors, use_gpu=self._use_gpu
        ):
            found[names[number]].append(result)
        return found


def _task(work: Callable[..., Any], source: Source, limit: int, size: int) -> EmbedTask:
    """`work` on a fixed random subset, `size` images an item."""
    indices = subset(source.num_images, limit)
    return EmbedTask(work, source, [indices[start : start + size] for start in range(0, len(indices), size)])


def sharded_knn(problem: KnnProblem) -> list[Answers]:
    """The answers to the problem's blocks of queries, by Ray tasks that share one copy of the bank per node."""
    shared = ray.put(problem)
    answer = ray.remote(num_cpus=1)(KnnProblem.answers)
    return ray.get([answer.remote(shared, block) for block in problem.blocks])


def _on_copies(fit: Callable[..., Any], *arrays: Any) -> Any:
    """Call `fit` with copies: arrays out of the object store are read-only, which torch does not take."""
    return fit(*(np.array(x) if isinstance(x, np.ndarray) else x for x in arrays))
