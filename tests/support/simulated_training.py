"""A network's stand-in that remembers which images it was trained on, and the history of a run, which checks it.

The state is two numbers. `seen` depends on the positions of all steps so far, `path` also on which start of the
workers trained them: so two states of the same step differ, as those of a real network do, and files of two saves are
told apart.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinoray.pipeline.data.order import Order
from dinoray.pipeline.data.partition import Layout
from dinoray.pipeline.stream.ray_data import in_step
from dinoray.pipeline.training.frozen_stage import FrozenStage
from dinoray.pipeline.training.skips import Skips
from dinoray.pipeline.worker.agreement import Agreement


class _Tensors:
    """A module or optimizer: tensors by name."""

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = tensors

    def state_dict(self) -> dict[str, Tensor]:
        return self.tensors

    def load_state_dict(self, saved: Mapping[str, Tensor], **_: object) -> None:
        assert saved.keys() == self.tensors.keys()
        for name, tensor in self.tensors.items():
            tensor.copy_(saved[name])


class _Optimizer:
    def __init__(self) -> None:
        self.state = {0: {"numbers": torch.zeros(2, dtype=torch.int64)}}

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.state, "param_groups": [{"params": [0]}]}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.state[0]["numbers"].copy_(saved["state"][0]["numbers"])


class StandIn:
    """In place of a TrainState."""

    def __init__(self, global_batch_size: int, total_steps: int) -> None:
        self.dino = SimpleNamespace(
            student=_Tensors(numbers=torch.zeros(2, dtype=torch.int64)),
            teacher=_Tensors(numbers=torch.zeros(2, dtype=torch.int64)),
            center=torch.zeros(1),
        )
        self.dino.state_dict = lambda: {"center": self.dino.center}
        self.dino.shared, self.dino.student_state = frozenset(), self.dino.student.state_dict
        self.dino.load_states = self._load_states
        self.optimizer, self.health = _Optimizer(), _Tensors()
        self.device = torch.device("cpu")
        self.step = 0
        self.skips = Skips(torch.device("cpu"))
        self.stage = FrozenStage(0, total_steps=total_steps, device=torch.device("cpu"))
        self.schedule = SimpleNamespace(total_steps=total_steps)
        self.config = SimpleNamespace(
            train=SimpleNamespace(global_batch_size=global_batch_size),
            optim=SimpleNamespace(name="adamw"),
            model_dump=lambda **_: {"optim": {"name": "adamw"}},
        )

    def _load_states(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> None:
        self.dino.student.load_state_dict(student)
        self.dino.teacher.load_state_dict(teacher)

    @property
    def parts(self) -> list[Tensor]:
        return [
            *(one.tensors["numbers"] for one in (self.dino.student, self.dino.teacher)),
            self.optimizer.state[0]["numbers"],
        ]

    @property
    def numbers(self) -> tuple[int, int]:
        """`seen` and `path`. All parts have the same."""
        found = {tuple(part.tolist()) for part in self.parts}
        assert len(found) == 1, f"a state of step {self.step} is mixed of several: {found}"
        return found.pop()

    def train(self, positions: Sequence[int], start: int) -> None:
        """Train one step on these positions, in any order; `start`: number of the workers' start."""
        seen, path = self.parts[0].tolist()
        numbers = torch.tensor([after(seen, positions), hash((path, start, self.step))], dtype=torch.int64)
        for part in self.parts:
            part.copy_(numbers)
        self.step += 1


def after(seen: int, positions: Sequence[int]) -> int:
    """`seen` after one more step."""
    return hash((seen, *sorted(positions)))


class Batch(NamedTuple):
    """What one rank gets for a step."""

    positions: NDArray[np.int64]
    images: NDArray[np.int64]


def batches(layout: Layout, num_streams: int, order: Order) -> Iterator[list[Batch]]:
    """Yield each step's batches, by rank, as Ray Data hands them on: blocks in turn to the ranks of a stream."""

    def rows(stream: Layout, rank: int) -> Iterator[dict[str, Any]]:
        place, size = list(stream.ranks).index(rank), stream.batch_size_per_worker
        for number in range(place, stream.num_blocks, len(stream.ranks)):
            positions = stream.block(number)
            _, images = order.locate(positions)
            for first in range(0, len(positions), size):
                part = slice(first, first + size)
                yield {"position": positions[part], "image": images[part]}

    ranks = {
        rank: in_step(rows(stream, rank), layout, rank=rank)
        for stream in layout.divided(num_streams)
        for rank in stream.ranks
    }
    for step in zip(*(ranks[rank] for rank in range(layout.world_size)), strict=True):
        yield [Batch(batch["position"], batch["image"]) for batch in step]


class Save(NamedTuple):
    """A state that was to be saved."""

    step: int
    start: int
    """The workers' start that trained it."""


@dataclass
class Start:
    """One start of the workers: where it began, and on what it trained."""

    step: int
    path: int
    world_size: int
    steps: dict[int, list[Batch]] = field(default_factory=dict)


class History:
    """All that the workers of a run have done, from its first driver to its last."""

    def __init__(self, order: Order, *, global_batch_size: int, total_steps: int) -> None:
        self.order, self._size, self._total = order, global_batch_size, total_steps
        self.starts: list[Start] = []
        self.saves: dict[int, Save] = {}
        """By the state's path."""
        self._seen = [0]
        for step in range(total_steps):
            self._seen.append(after(self._seen[-1], range(step * self._size, (step + 1) * self._size)))

    def begin(self, state: StandIn, world_size: int) -> int:
        """Note a start of the workers from `state`, which must be one that was saved; return its number."""
        seen, path = state.numbers
        assert seen == self._seen[state.step], f"what is restored is not the first {state.step} steps"
        if path:
            assert path in self.saves, f"the state of step {state.step} was never saved"
            assert self.saves[path].step == state.step, "it is a state of another step"
        else:
            assert state.step == 0, "a new state is not at step 0"
        self.starts.append(Start(state.step, path, world_size))
        return len(self.starts) - 1

    def trained(self, start: int, step: int, batch: list[Batch]) -> None:
        """Note what a step was trained on."""
        self.starts[start].steps[step] = batch

    def saved(self, state: StandIn, start: int) -> None:
        """Note that a state is being saved."""
        self.saves[state.numbers[1]] = Save(state.step, start)

    def check_committed(self, path: int) -> list[Start]:
        """Check the steps that led to the last checkpoint, whose state has this path; return their starts.

        Each step has trained on its positions, each epoch is a permutation of the images.
        """
        save: Save | None = self.saves[path]
        assert save is not None
        assert save.step == self._total, f"the run has ended at step {save.step} of {self._total}"
        images: list[NDArray[np.int64]] = []
        used, stop = [], save.step
        while save is not None:
            start = self.starts[save.start]
            used.append(start)
            for step in reversed(range(start.step, stop)):
                positions = np.concatenate([batch.positions for batch in start.steps[step]])
                places = np.argsort(positions)
                expected = list(range(step * self._size, (step + 1) * self._size))
                assert positions[places].tolist() == expected, f"step {step} trained on others"
                images.append(np.concatenate([batch.images for batch in start.steps[step]])[places])
            stop, save = start.step, self.saves[start.path] if start.path else None
        assert stop == 0, f"nothing has trained the first {stop} steps"
        self._check_epochs(np.concatenate(images[::-1]))
        return used

    def _check_epochs(self, images: NDArray[np.int64]) -> None:
        size = self.order.num_images
        for first in range(0, len(images), size):
            epoch = np.sort(images[first : first + size])
            is_whole = len(epoch) == size
            assert (np.diff(epoch) > 0).all(), f"the epoch of position {first} repeats an image"
            assert not is_whole or epoch.tolist() == list(range(size)), f"it lacks an image: {epoch}"


class Agreed(Agreement):
    """What the ranks agree on. Rank 0 comes first; another rank hears what it has said."""

    def __init__(self) -> None:
        super().__init__(patience_seconds=0, known=lambda _: None)
        self._said: list[bool] = []

    def is_everywhere(self, mine: bool) -> bool:
        self._said.append(mine)
        return mine

    def of_another_rank(self) -> Agreement:
        other = Agreement(patience_seconds=0, known=lambda _: None)

        def is_everywhere(mine: bool) -> bool:
            assert mine, "only rank 0 writes, so only rank 0 can be busy"
            return self._said.pop()

        other.is_everywhere = is_everywhere  # type: ignore[method-assign]
        return other
