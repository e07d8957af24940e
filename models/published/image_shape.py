"""What of a checkpoint depends on the shape of its images: filters for their channels, positions for their sides.

Axes: D filters, N channels of the images, h and w the filter's sides.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from dinoray.models.errors import ConfigError

_RGB = 3


def inflate(filters: Tensor, num_channels: int) -> Tensor:
    """Return RGB filters [D, 3, h, w] as filters [D, N, h, w] for images of `num_channels` N.

    From three channels on, the first three keep their filters, and each new one gets their mean; below three, all get
    the mean. All are scaled by 3 / N. An image that is the same in all channels then has the same features.
    """
    mean = filters.mean(1, keepdim=True)
    kept = filters if num_channels >= _RGB else filters[:, :0]
    new = mean.expand(-1, num_channels - kept.shape[1], *filters.shape[2:])
    return torch.cat([kept, new], dim=1) * (_RGB / num_channels)


def inflate_layers(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], layers: Iterable[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """Return `state` with `layers` inflated where `own`, a backbone's state dict, has other channels; and notes."""
    inflated, notes = dict(state), []
    for name in layers:
        theirs, ours = state.get(name), own.get(name)
        if theirs is None or ours is None or theirs.ndim != 4 or ours.ndim != 4:
            continue
        num_channels = ours.shape[1]
        if theirs.shape[1] == _RGB != num_channels:
            inflated[name] = inflate(theirs, num_channels)
            notes.append(
                f"{name} inflated from {_RGB} to {num_channels} channels: new ones are the mean of the RGB filters, "
                f"all are scaled by {_RGB}/{num_channels}"
            )
    return inflated, notes


def check_grid(state: Mapping[str, Tensor], own: Mapping[str, Tensor], reshaped: list[str]) -> None:
    """Raise ConfigError if only the position embeddings differ in shape: timm could not resize them."""
    theirs, ours = state.get("pos_embed"), own.get("pos_embed")
    if reshaped != ["pos_embed"] or theirs is None or ours is None or theirs.shape[2:] != ours.shape[2:]:
        return
    raise ConfigError(
        f"the position embeddings of the checkpoint, {theirs.shape[1]} tokens, cannot be resized to the backbone's "
        f"{ours.shape[1]}: without tokens for class and registers they are no square grid; start from weights of "
        "square images, or without init.from (--init-from)"
    )
