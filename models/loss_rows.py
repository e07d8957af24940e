"""The loss's work on rows of logits as torch.compile makes one kernel of each part: one pass over the logits.

The sum of exponentials needs the maximum first, so a kernel would read a row of 65,536 logits twice. Rows are cut into
pieces that stay in a GPU's registers or a CPU's cache between the two. `models/loss.py` has the formulas, and does the
same with tensors that it uses again where nothing is compiled. Axes: n crops, B images, K prototypes, P pieces.
"""

import math

import torch
from torch import Tensor

from dinoray.models.compiled import compiled_in_steps

_PIECE = 1024
"""Logits of a piece, at most: more than that, Inductor's kernels for GPUs read twice."""
_LEAST_PIECE = 32


@compiled_in_steps
def row_sums(logits: Tensor, targets: Tensor, temp: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return logsumexp(logits / temp) [n, B], and the sum of logits * targets [], of logits [n, B, K].

    `targets` [B, K] are those of each crop.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    pieces, of_targets = (
        x.to(dtype).unflatten(-1, (-1, _piece(logits.shape[-1]))) for x in (logits, targets)
    )
    most = pieces.amax(-1)  # [n, B, P]
    sums = ((pieces - most.unsqueeze(-1)) / temp).exp().sum(-1)
    dots = (pieces * of_targets).sum(-1)
    most_of_all = most.amax(-1, keepdim=True)
    sums_of_all = (sums * ((most - most_of_all) / temp).exp()).sum(-1)
    return sums_of_all.log() + most_of_all.squeeze(-1) / temp, dots.sum()


@compiled_in_steps
def fill_gradient(
    gradient: Tensor,
    logits: Tensor,
    lses: Tensor,
    targets: Tensor,
    num_targets: int,
    scale: Tensor,
    temp: float | Tensor,
) -> None:
    """Set `gradient` [n, B, K] to (num_targets * softmax(logits / temp) - targets) * scale.

    `lses` [n, B] and `targets` [B, K] as in `row_sums`.
    """
    probs = (logits.to(lses.dtype) / temp - lses.unsqueeze(-1)).exp()
    gradient.copy_((num_targets * probs - targets) * scale)


def _piece(num_logits: int) -> int:
    """Return the length of a piece: it divides the number of logits. Others stay whole."""
    piece = math.gcd(num_logits, _PIECE)
    return piece if piece >= _LEAST_PIECE else num_logits
