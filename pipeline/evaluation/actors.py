"""A map over numbered items on Ray actors, with or without a network: evaluations, embeddings and packing.

The only requirement for items and results is that they can be pickled.
"""

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import ray
import ray.data
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy

from dinoray.models.errors import DinorayError
from dinoray.pipeline.data.reading.source import Source

if TYPE_CHECKING:
    from dinoray.pipeline.training.checkpoint import FrozenBackbone

_MOST_BLOCKS = 4096
"""Limit on blocks: Ray plans every block up front, at some 1.3 ms each."""


Work = Callable[[Any, Source, Any], Any]
"""(frozen backbone or None, source, item) -> a result; all but the backbone can be pickled."""


class EmbedTask(NamedTuple):
    """Task for the images of one source: call `work` item by item."""

    work: Work
    source: Source
    items: Sequence[Any]


class EmbedActor:
    """Maps item numbers to results of the work. An error that the user can fix is returned as a result."""

    def __init__(
        self,
        network: "list[ray.ObjectRef[FrozenBackbone | None]]",
        tasks: "Sequence[ray.ObjectRef[EmbedTask]]",
        device: str,
    ) -> None:
        # In a list, because Ray warns about references passed directly as arguments.
        frozen = ray.get(network)[0]
        self._backbone = None if frozen is None else frozen.backbone(device)
        self._tasks = [ray.get(task) for task in tasks]
        self._places = [(t, i) for t, task in enumerate(self._tasks) for i in range(len(task.items))]

    def __call__(self, rows: Mapping[str, NDArray[np.int64]]) -> dict[str, NDArray[Any]]:
        results = np.empty(len(rows["id"]), dtype=object)
        for row, number in enumerate(rows["id"]):
            place, item = self._places[number]
            task = self._tasks[place]
            result: Any
            try:
                result = task.work(self._backbone, task.source, task.items[item])
            except DinorayError as error:
                result = error  # unchanged: Ray would pass on only its text, inside a traceback
            results[row] = pickle.dumps((place, result))
        return {"result": results}


def embed_on_actors(
    network: "ray.ObjectRef[FrozenBackbone | None]",
    tasks: Sequence[EmbedTask],
    *,
    actors: int,
    use_gpu: bool,
    in_order: bool = True,
) -> Iterator[tuple[int, Any]]:
    """Yield (task number, result) for each item of each task, on up to `actors` actors, or one per GPU.

    Raises the first DinorayError that an item causes. If not `in_order`, results come as they are ready.
    """
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = in_order
    context.enable_progress_bars = False
    most = max(1, int(ray.cluster_resources().get("GPU", 0))) if use_gpu else actors
    num_items = sum(len(task.items) for task in tasks)
    numbers = ray.data.range(num_items, override_num_blocks=min(num_items, _MOST_BLOCKS))
    results = numbers.map_batches(
        EmbedActor,
        batch_size=1,
        fn_constructor_args=([network], [ray.put(task) for task in tasks], "cuda" if use_gpu else "cpu"),
        compute=ActorPoolStrategy(min_size=1, max_size=min(most, num_items)),
        num_cpus=1,
        num_gpus=1 if use_gpu else 0,
    )
    for row in results.iter_rows():
        place, result = pickle.loads(row["result"])
        if isinstance(result, DinorayError):
            raise result
        yield place, result
