"""Regional compilation: torch.compile of the blocks of a backbone and of the loss, in training steps alone.

Blocks of one class have one forward, so code is generated once for each shape of its input and not for each block: for
a ViT with stochastic depth five times, whatever its depth. Names of parameters stay the same. Evaluations have other
shapes and stay eager. Of the loss, functions are compiled that have `compiled_in_steps`.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from dinoray.models.backbone import has_batch_norm
from dinoray.models.config import Compile
from dinoray.models.errors import ConfigError, DinorayError, ResourceError, one_line
from dinoray.models.recompute import blocks, replace_class

Backend = str | Callable[..., Any]
"""As for torch.compile."""

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

_MOST_GRAPHS = 64
"""Of a function. PyTorch's own limit, 8, is below what a network of several stages has; beyond it blocks are eager."""
_backend_now: Backend | None = None


@dataclass
class Compilation:
    """What is compiled of a training step."""

    backend: Backend | None = None
    """None: nothing is compiled."""
    note: str | None = None
    """Why blocks are not compiled although `auto` would compile them; for a person."""
    _graphs_of_first_step: int | None = None

    def __post_init__(self) -> None:
        if self.is_on:
            torch._dynamo.config.recompile_limit = _MOST_GRAPHS

    @property
    def is_on(self) -> bool:
        """Whether anything is compiled."""
        return self.backend is not None

    @contextmanager
    def step(self) -> Iterator[None]:
        """Use compiled code meanwhile. The first step compiles it."""
        global _backend_now
        _backend_now = self.backend
        try:
            yield
        finally:
            _backend_now = None
        if self.is_on and self._graphs_of_first_step is None:
            self._graphs_of_first_step = num_graphs()

    def restart(self) -> None:
        """Make the next step a first one, which compiles blocks: what learns has changed."""
        self._graphs_of_first_step = None

    @property
    def num_recompiled(self) -> int:
        """The graphs compiled after the first step: 0, as all its shapes come again."""
        return 0 if self._graphs_of_first_step is None else num_graphs() - self._graphs_of_first_step


def compile_blocks(
    backbones: Iterable[nn.Module], mode: Compile, device: torch.device, *, backend: Backend = "inductor"
) -> Compilation:
    """Have the blocks of timm models, and the loss, compiled in training steps: `on`, or `auto` on a GPU.

    Blocks with batch norm stay eager. `auto` tells in the result's note why it compiles nothing; `on` raises
    ConfigError for a backbone without blocks to compile, and ResourceError where PyTorch cannot compile. A trial shows
    that, so it is known before the first step.
    """
    if mode == "off" or (mode == "auto" and device.type == "cpu"):
        return Compilation()
    networks = list(backbones)
    refusal = _refusal(networks, device, backend)
    if refusal is not None:
        if mode == "on":
            raise refusal.error()
        return Compilation(note=refusal.note())
    # The blocks of some network may fail to compile where the trial did not.
    torch._dynamo.config.suppress_errors = mode == "auto"
    for network in networks:
        for block in _to_compile(network):
            for module in block.modules():
                if type(module) is DropPath and module.drop_prob:
                    _DropPath.take_over(module, device)
            replace_class(block, lambda kind: _compiled(kind, backend))
    return Compilation(backend)


def compiled_in_steps(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Have a function of tensors compiled within `Compilation.step`, for each shape of its arguments.

    There, each argument that is a float becomes a 0-d tensor: a number would be compiled in, and a schedule compiled
    anew whenever it moves.
    """

    @wraps(function)
    def choose(*args: Any, **kwargs: Any) -> Any:
        if _backend_now is None:
            return function(*args, **kwargs)
        device = next(x.device for x in args if isinstance(x, Tensor))
        args = tuple(
            torch.full((), x, dtype=torch.float64, device=device) if isinstance(x, float) else x for x in args
        )
        return _compiled_function(function, _backend_now)(*args, **kwargs)

    return choose


def is_compiled_now() -> bool:
    """Return True within the step of a `Compilation` that is on."""
    return _backend_now is not None


def num_graphs() -> int:
    """Return the graphs that this process has compiled."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _to_compile(backbone: nn.Module) -> list[nn.Module]:
    return [block for block in blocks(backbone) if not has_batch_norm(block)]


@cache
def _compiled(kind: Any, backend: Backend) -> Any:
    """Return a class of blocks whose forward is compiled within `Compilation.step`."""
    # Not dynamic: each size of crops has shapes of its own, and code for fixed ones is faster.
    forward = torch.compile(kind.forward, dynamic=False, backend=backend)

    def choose(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (kind.forward if _backend_now is None else forward)(self, *args, **kwargs)

    return type(f"Compiled{kind.__name__}", (kind,), {"forward": choose})


@cache
def _compiled_function(function: Callable[..., Any], backend: Backend) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False, backend=backend)


class _DropPath(DropPath):
    """timm's stochastic depth with a rate that is a tensor: a number would be compiled in, for each block anew."""

    keep: Tensor

    @classmethod
    def take_over(cls, module: nn.Module, device: torch.device) -> None:
        """Make one of a module of timm."""
        module.__class__ = cls
        module.keep = torch.tensor(1 - module.drop_prob, device=device)  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = torch.rand((len(x), *[1] * (x.ndim - 1)), device=x.device) < self.keep
        scale = 1 / self.keep if self.scale_by_keep else torch.ones_like(self.keep)
        return x * (kept * scale).to(x.dtype)


class _Refusal(NamedTuple):
    """Why blocks cannot be compiled, and what a person can do."""

    kind: type[DinorayError]
    why: str
    remedy: str | None = None

    def note(self) -> str:
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"train.compile=auto leaves blocks eager: {self.why}{remedy}"

    def error(self) -> DinorayError:
        remedy = f"{self.remedy}, or set" if self.remedy else "set"
        return self.kind(f"train.compile=on: {self.why}; {remedy} train.compile=off")


def _refusal(networks: list[nn.Module], device: torch.device, backend: Backend) -> _Refusal | None:
    for network in networks:
        if not _to_compile(network):
            name = type(network).__name__
            return _Refusal(ConfigError, f"{name} has no blocks that timm tells apart and without batch norm")
    if (missing := _missing_compiler(device)) is not None:
        return _Refusal(ResourceError, f"PyTorch needs {missing} on the PATH", "install it")
    try:
        torch.compile(_trial, dynamic=False, backend=backend)(torch.ones(16, device=device))
    except Exception as failure:  # a compiler, or what it needs, may fail in any way
        why = f"PyTorch cannot compile on this machine ({one_line(failure)})"
        return _Refusal(ResourceError, why, "install the header files of Python and of the compiler")
    return None


def _trial(x: Tensor) -> Tensor:
    return torch.tanh(x) + 1


def _missing_compiler(device: torch.device) -> str | None:
    """Return the name of the compiler that PyTorch lacks, if it is known to."""
    if device.type == "cuda":
        names, kind = [os.environ.get("CC") or "gcc", "clang"], "a C compiler (gcc), for Triton,"
    else:
        names, kind = [os.environ.get("CXX") or "g++", "clang++"], "a C++ compiler (g++)"
    return None if any(map(shutil.which, names)) else kind
