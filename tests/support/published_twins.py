"""Our networks in the shape of those in published.py, and whether the two are the same."""

from typing import Any

import torch
import torchvision
from published import Run, saved
from tiny import tiny_config
from torch import Tensor, nn

from dinoray.models.config import OptimConfig
from dinoray.models.dino import DINO
from dinoray.models.optim import build_optimizer
from dinoray.models.published.checkpoint import read_weights

HEAD: dict[str, Any] = {"out_dim": 32, "hidden_dim": 48, "bottleneck_dim": 16}
RESNET: dict[str, Any] = {"name": "resnet18", "kwargs": {}}


def dino(
    *,
    pos_embed: str = "official",
    backbone: dict[str, Any] | None = None,
    crops: dict[str, Any] | None = None,
    **head: Any,
) -> DINO:
    """Our networks in the shape of `published.Run`."""
    sections = {"backbone": backbone or {"pos_embed": pos_embed}, "crops": crops or {}}
    config = tiny_config(**sections, head={**HEAD, **head})
    return DINO(config.backbone, config.head, crop_sizes=config.crops.crop_sizes).eval()


def read(state: Any) -> Any:
    return read_weights(saved(state), "checkpoint.pth")


def reordered(state: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint of a network that registers its final norm before its blocks, with torch's own optimiser."""
    names = sorted(state["student"], key=lambda k: k.partition("backbone.")[2].startswith("blocks.") * 1)
    names.sort(key=lambda k: k.startswith("module.head."))
    student = {k: nn.Parameter(state["student"][k].clone()) for k in names}
    decayed = [p for k, p in student.items() if p.ndim > 1 and not k.endswith(".bias")]
    plain = [p for p in student.values() if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": plain, "weight_decay": 0.0}], lr=1e-4)
    for p in student.values():
        p.grad = torch.randn_like(p)
    optimizer.step()
    networks = {k: p.detach() for k, p in student.items()}
    return state | {"student": networks, "optimizer": optimizer.state_dict()}


def torchvision_resnet() -> nn.Module:
    model = torchvision.models.resnet18(weights=None)
    model.fc = nn.Identity()
    for buffer in model.buffers():  # batch norm that has seen something
        if buffer.ndim:
            buffer.uniform_(0.5, 1.5)
    return model


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    ours, theirs = ours.detach(), theirs.detach()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@torch.no_grad()
def assert_same_networks(ours: DINO, run: Run, *sizes: int) -> None:
    ours.eval()
    for mine, theirs in zip((ours.student, ours.teacher), run.networks, strict=True):
        theirs.eval()
        for size in sizes:
            x = torch.randn(3, 3, size, size)
            assert_same(mine([x]).logits, theirs(x))
            assert_same(mine([x]).features, theirs.backbone(x))
    assert torch.equal(ours.center, run.loss.center[0])


def optimizer_of(ours: DINO, **config: Any) -> torch.optim.Optimizer:
    return build_optimizer(OptimConfig.model_validate(config), ours.student)


def moments(optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[str, dict[str, Any]]:
    """Name -> what the optimiser remembers of the parameter."""
    return {k: dict(optimizer.state[p]) for k, p in network.named_parameters() if p in optimizer.state}


def assert_same_moments(ours: dict[str, dict[str, Any]], theirs: dict[str, dict[str, Any]]) -> None:
    assert ours.keys() == theirs.keys()
    for name, state in ours.items():
        assert state.keys() == theirs[name].keys()
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[name][key])), (name, key)
