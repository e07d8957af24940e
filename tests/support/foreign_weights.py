"""Networks as other programs build them, and a run that starts from a file of theirs."""

from pathlib import Path
from typing import Any

import timm
import torch
from published import Head
from published_twins import HEAD
from tiny import NUM_IMAGES, tiny_config
from torch import nn

from dinoray.pipeline.training.init_weights import load_initial_weights
from dinoray.pipeline.training.init_weights import read_weights as read_path
from dinoray.pipeline.training.match_weights import adapt
from dinoray.pipeline.training.state import TrainState, build_state


def vit() -> nn.Module:
    """timm's own model in the shape of `tiny_config`."""
    return timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=16, **tiny_config().backbone.kwargs
    )


def head() -> nn.Module:
    return Head(32)


class Module(nn.Module):
    """A program's network: an nn.Module with parts under the names that this program gives them."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def started(path: Path, load: Any = "weights", **changes: Any) -> tuple[TrainState, list[str]]:
    """A new run that starts from the file, and its lines, without the folder."""
    weights = read_path(str(path))
    config = adapt(tiny_config(head=HEAD, **changes), weights)
    state = build_state(config, num_images=NUM_IMAGES)
    return state, [line.replace(f"{path.parent}/", "") for line in load_initial_weights(state, weights, load)]


def assert_backbones(state: TrainState, student: nn.Module, teacher: nn.Module) -> None:
    for ours, theirs in ((state.dino.student, student), (state.dino.teacher, teacher)):
        expected = theirs.state_dict()
        assert expected.keys() == ours.backbone.state_dict().keys()
        for name, value in ours.backbone.state_dict().items():
            assert torch.equal(value, expected[name]), name
