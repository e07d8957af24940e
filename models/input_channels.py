"""How many channels a network takes, and how filters for RGB become those for other channels.

Axes: D filters, N channels of the images, h and w the filter's sides.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

_RGB = 3


def in_chans(network: nn.Module) -> int:
    """Return the channels of the pictures that a network takes: those of its first convolution, 3 without one."""
    return next((weight.shape[1] for weight in network.parameters() if weight.ndim == 4), 3)


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
