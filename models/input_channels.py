"""How many channels a network takes."""

from torch import nn


def in_chans(network: nn.Module) -> int:
    """Return the channels of the pictures that a network takes: those of its first convolution, 3 without one."""
    return next((weight.shape[1] for weight in network.parameters() if weight.ndim == 4), 3)
