"""Partial training (`backbone.train`): which part of the backbone trains, and the frozen part that the networks share.

The frozen part is in eval mode throughout: no stochastic depth, and batch norm keeps its statistics. Blocks are those
of recompute.py, which timm's groups of parameters divide, as for layer decay.
"""

from functools import cache
from typing import Any

from torch import nn

from dinoray.models.config import BackboneConfig
from dinoray.models.errors import ConfigError
from dinoray.models.lora import add_adapters
from dinoray.models.recompute import blocks


def freeze(backbone: nn.Module, config: BackboneConfig, *, crop_size: int) -> None:
    """Freeze all that does not train by `config.train`, and add adapters if it is lora.

    last_n(k) trains the last k blocks and what follows them, such as the final norm. `crop_size`: of any crop, in
    pixels. Raises ConfigError where the backbone has not so many blocks, and as `add_adapters`.
    """
    part = config.trained_part
    if part.kind == "all":
        return
    if part.kind == "last_n":
        _freeze_before(backbone, part.number, name=config.name)
    else:
        backbone.requires_grad_(False)
        add_adapters(backbone, part.number, name=config.name, crop_size=crop_size)
    kind: Any = type(backbone)
    backbone.__class__ = _partly_frozen(kind)
    backbone.frozen_modules = _frozen_modules(backbone)  # type: ignore[assignment]


def shared_names(backbone: nn.Module) -> frozenset[str]:
    """Return the state-dict names of the frozen part: parameters that do not train, and buffers beside them.

    Empty for a backbone that `freeze` has left as it was.
    """
    frozen = tuple(f"{name}." for name in getattr(backbone, "frozen_modules", ()))
    if not frozen:
        return frozenset()
    fixed = {k for k, p in backbone.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return frozenset(k for k in backbone.state_dict() if k in fixed or k.startswith(frozen))


def share(student: nn.Module, teacher: nn.Module, names: frozenset[str]) -> None:
    """Make the teacher's parameters of these names the student's own. Buffers, a few numbers, stay copies."""
    own = dict(student.named_parameters(remove_duplicate=False))
    for name in names & own.keys():
        module, _, leaf = name.rpartition(".")
        setattr(teacher.get_submodule(module), leaf, own[name])


class _PartlyFrozen(nn.Module):
    """Mixin before the class of a backbone: its frozen modules are never in training mode."""

    frozen_modules: tuple[str, ...]

    def train(self, mode: bool = True) -> "_PartlyFrozen":
        super().train(mode)
        # By name, since the synchronised kind of batch norm takes the place of modules.
        for name in self.frozen_modules:
            self.get_submodule(name).eval()
        return self


@cache
def _partly_frozen(kind: Any) -> Any:
    return type(f"PartlyFrozen{kind.__name__}", (_PartlyFrozen, kind), {})


def _freeze_before(backbone: nn.Module, num_blocks: int, *, name: str) -> None:
    found = blocks(backbone)
    if not found:
        raise ConfigError(
            f"backbone.train=last_n({num_blocks}) needs a backbone whose blocks timm tells apart, {name} is none; "
            "set backbone.train=all"
        )
    if num_blocks > len(found):
        raise ConfigError(
            f"backbone.train=last_n({num_blocks}): {name} has {len(found)} blocks; "
            f"set backbone.train=last_n({len(found)}) or fewer, or backbone.train=all"
        )
    first = next(found[-num_blocks].parameters())
    # A backbone registers its layers in the order in which they run, and its tokens first.
    for parameter in backbone.parameters():
        if parameter is first:
            return
        parameter.requires_grad_(False)


def _frozen_modules(backbone: nn.Module) -> tuple[str, ...]:
    """Return the names of the outermost modules that have parameters, none of which trains."""
    found: tuple[str, ...] = ()
    for name, module in backbone.named_modules():
        parameters = list(module.parameters())
        inside = name.startswith(tuple(f"{one}." for one in found))
        if name and parameters and not inside and not any(p.requires_grad for p in parameters):
            found = (*found, name)
    return found
