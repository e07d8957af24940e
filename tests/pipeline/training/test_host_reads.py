"""A step never makes the host wait for the device, not even to learn whether the step is finite.

Watched on the CPU: calls that would read a tensor's values on a GPU, calls that would copy a constant there from memory
that is not pinned, and the operators under them, which C++ calls too.
"""

import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import TINY_RESNET, tiny_batch
from tiny_states import after
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dinoray.pipeline.training import step as training
from dinoray.pipeline.training.step import train_step

READS = {"item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__"}
COPIES = {"tensor", "new_tensor"}
OPERATORS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2"}


class HostReads(TorchFunctionMode):
    """Collects the calls that copy values from or to a device, as "method in function"."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in COPIES or (name in READS and args and isinstance(args[0], Tensor)):
            frames = [f for f in traceback.extract_stack() if f.filename != __file__ or f.name == "pixels"]
            self.found.append(f"{name} in {frames[-1].name}")
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """Collects the operators whose result or whose size the host has to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        self.found += [name] * (name in OPERATORS)
        return func(*args, **(kwargs or {}))


def reads_of_a_step(**changes: dict[str, Any]) -> list[str]:
    state = after(1, **changes)
    batch = tiny_batch(state.config, seed=1)
    with HostReads() as reads:
        train_step(state, batch)
    with Operators() as operators:
        train_step(state, batch)
    assert len(operators.found) == sum(read.split(" ")[0] not in COPIES | {"cpu"} for read in reads.found)
    return reads.found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"backbone": TINY_RESNET},
        {"backbone": {"drop_path_rate": 0.1}, "optim": {"clip_grad": 0.0}},
        {"loss": {"centering": "sinkhorn_knopp", "koleo_weight": 0.1}, "train": {"accumulate_steps": 2}},
        {"optim": {"name": "sgd"}, "head": {"norm_last_layer": False}},
        {"optim": {"name": "lars"}, "train": {"precision": "bf16"}},
        {"crops": {"photometric": "device"}},
    ],
    ids=["vit", "resnet", "drop path", "sinkhorn-knopp, koleo", "sgd", "lars, bf16", "colours on the device"],
)
def test_a_step_reads_nothing(changes: dict[str, Any]) -> None:
    assert reads_of_a_step(**changes) == []


def test_a_read_in_a_part_of_the_step_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def pixels(*args: Any) -> Tensor:
        x = real(*args)
        return x * torch.tensor(1.0) if x.sum().item() else x

    real = training.pixels
    monkeypatch.setattr(training, "pixels", pixels)
    assert reads_of_a_step() == ["item in pixels", "tensor in pixels"] * 2


def test_each_way_to_read_is_noticed() -> None:
    x = torch.ones(1)
    with HostReads() as reads:
        for read in (x.item, x.tolist, x.cpu, x.numpy, x.__bool__, x.__float__, x.__int__):
            read()
        assert x
        float(x)
        int(x)
        x.new_tensor([1])
    assert len(reads.found) == 11
