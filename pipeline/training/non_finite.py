"""Find where a step is not finite: weights before it, the first outputs, the first gradients, and whose rows they are.

Hooks look at a step and change nothing in it. Axes: B images of a microbatch, G global crops, V = G + L crops.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dinoray.models.recompute import is_recomputing
from dinoray.pipeline.training.state import TrainState


class BadOutput(NamedTuple):
    """The first output of a network that is not finite, in one microbatch, for crops of one size."""

    part: int
    """The microbatch."""
    network: str
    module: str
    """Name in the network; empty: the network itself."""
    inputs_are_finite: bool
    """False: what lies between the module before it and this one is the first."""
    rows: list[int]
    """Rows that are not finite: row v * B + b is crop v of image b. Empty if the output has other rows."""


@dataclass
class NonFinite:
    """What is not finite in a step, in the order in which it was met."""

    weights: list[str] = field(default_factory=list)
    """Parameters, buffers and the centre, before the step."""
    outputs: list[BadOutput] = field(default_factory=list)
    """At most one for each network, microbatch and size of crops."""
    gradients: list[str] = field(default_factory=list)
    """Parameters of the student, in the order of the backward pass: the first one is nearest to the loss."""


@contextmanager
def watched(state: TrainState) -> Iterator[NonFinite]:
    """Watch the steps inside the block; what it yields is complete after it."""
    found = NonFinite()
    for network, module in (("student", state.dino.student), ("teacher", state.dino.teacher)):
        found.weights += [f"{network} {name}" for name, x in module.state_dict().items() if not _is_finite(x)]
    found.weights += [] if _is_finite(state.dino.center) else ["center"]
    with ExitStack() as hooks:
        for name, parameter in state.dino.student.named_parameters():
            if parameter.requires_grad:
                hook = parameter.register_post_accumulate_grad_hook(_gradient_check(name, found))
                hooks.callback(hook.remove)
        # The teacher first, as in the step.
        for network in ("teacher", "student"):
            _Forwards(network, found).watch(getattr(state.dino, network), hooks)
        yield found


def _gradient_check(name: str, found: NonFinite) -> Any:
    def check(parameter: Tensor) -> None:
        if parameter.grad is not None and name not in found.gradients and not _is_finite(parameter.grad):
            found.gradients.append(name)

    return check


class _Forwards:
    """Watches the forwards of one network, one for each microbatch."""

    def __init__(self, network: str, found: NonFinite) -> None:
        self._network, self._found = network, found
        self._part = -1
        self._in_call = self._in_part = False
        """Whether an output was found, in this call of the backbone and in this microbatch."""
        self._ends: list[int] = []
        """Of the rows of each call of the backbone."""
        self._call = -1

    def watch(self, network: nn.Module, hooks: ExitStack) -> None:
        hooks.callback(network.register_forward_pre_hook(self._begin).remove)
        backbone = network.get_submodule("backbone")
        hooks.callback(backbone.register_forward_pre_hook(self._begin_size).remove)
        for name, module in network.named_modules():
            in_backbone = name.partition(".")[0] == "backbone"
            hooks.callback(module.register_forward_hook(self._check(name, in_backbone)).remove)

    def _begin(self, _: nn.Module, inputs: tuple[list[Tensor]]) -> None:
        """Note which rows each call of the backbone has: neighbouring crops of one size share a call."""
        (crops,) = inputs
        self._part, self._call, self._in_part = self._part + 1, -1, False
        sizes = [sum(map(len, same)) for _, same in groupby(crops, key=lambda x: x.shape[1:])]
        self._ends = list(accumulate(sizes))

    def _begin_size(self, *_: Any) -> None:
        self._call, self._in_call = self._call + 1, False

    def _check(self, name: str, in_backbone: bool) -> Any:
        def check(_: nn.Module, inputs: Any, output: Any) -> None:
            if is_recomputing():  # looked at in the first forward
                return
            is_found = self._in_call if in_backbone else self._in_part
            if is_found or all(_is_finite(x) for x in _tensors(output)):
                return
            self._in_call = self._in_part = True
            ends = self._ends[: self._call + 1] if in_backbone else self._ends
            first = ends[-2] if in_backbone and self._call else 0
            bad = next(x for x in _tensors(output) if not _is_finite(x))
            rows: list[int] = []
            if bad.ndim and len(bad) == ends[-1] - first:
                is_bad = ~torch.isfinite(bad.detach().reshape(len(bad), -1)).all(1)
                rows = (first + is_bad.nonzero().flatten()).tolist()
            finite = all(_is_finite(x) for x in _tensors(inputs))
            self._found.outputs.append(BadOutput(self._part, self._network, name, finite, rows))

        return check


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)


def _is_finite(x: Tensor) -> bool:
    # Detached: what a block that is recomputed keeps must not depend on who looks at it.
    return not x.is_floating_point() or bool(torch.isfinite(x.detach()).all())
