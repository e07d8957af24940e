"""The DINO loss as pure functions: teacher probabilities, cross-entropy over crop pairs, centre, KoLeo.

No state, no process group: the caller keeps the centre and passes the reductions over ranks.
Axes: B images, G global crops, V = G + L crops, K prototypes. Logits are crop-major: row v * B + b.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_SINKHORN_ITERATIONS = 3


class CrossEntropy(NamedTuple):
    """Scalars: the loss and the mean entropy of the targets; loss - entropy = KL(teacher || student)."""

    loss: Tensor
    teacher_entropy: Tensor


def teacher_probs(teacher_logits: Tensor, center: Tensor, temp: float) -> Tensor:
    """Return sharpened, centred targets softmax((t - c) / temp): [G*B, K] -> [G*B, K] float32, detached."""
    return torch.softmax((teacher_logits.detach().float() - center) / temp, dim=-1)


def sinkhorn_probs(
    teacher_logits: Tensor,
    temp: float,
    *,
    reduce_sum: Callable[[Tensor], Tensor],
    reduce_max: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return targets by Sinkhorn-Knopp (SwAV, DINOv2): [n, K] -> [n, K] float32, detached; rows sum to 1.

    Three times, exp(t / temp) is scaled so that all prototypes share the rows of all ranks evenly, and then
    so that each row sums to one. All in logarithms, since exp(t / temp) would overflow once prototypes have
    magnitudes. The reductions are over ranks, whose numbers of rows may differ.
    """
    log_q = teacher_logits.detach().float() / temp
    for _ in range(_SINKHORN_ITERATIONS):
        most = reduce_max(log_q.max(0).values)
        log_q = log_q - most - reduce_sum((log_q - most).exp().sum(0)).log()
        log_q = torch.log_softmax(log_q, dim=1)
    return log_q.exp()


def cross_entropy(
    probs: Tensor, student_logits: Tensor, *, student_temp: float, num_global_crops: int
) -> CrossEntropy:
    """Return the mean cross-entropy over pairs (global crop g of the teacher, crop v != g of the student).

    `probs` [G*B, K] from `teacher_probs`, `student_logits` [V*B, K], both crop-major with the globals first.
    Equal to the double loop over pairs, in which a crop is never compared with itself:

        mean over g, v != g, b of  -sum_k probs[g, b, k] * log_softmax(student_logits[v, b] / student_temp)[k]

    Written as logsumexp(s_v) - q_g . s_v and summed over v first, so that nothing of size V * G * K is
    stored.
    """
    num_images = probs.shape[0] // num_global_crops
    q = probs.unflatten(0, (num_global_crops, num_images))  # [G, B, K]
    s = student_logits.float().unflatten(0, (-1, num_images)) / student_temp  # [V, B, K]
    lse = torch.logsumexp(s, dim=-1)  # [V, B]
    others_lse = lse.sum(0) - lse[:num_global_crops]  # [G, B]: sum over v != g
    others_s = s.sum(0) - s[:num_global_crops]  # [G, B, K]
    num_pairs = num_global_crops * (s.shape[0] - 1)
    loss = (others_lse - (q * others_s).sum(-1)).sum(0).mean() / num_pairs
    entropy = torch.special.entr(q).sum(-1).mean()
    return CrossEntropy(loss, entropy)


def batch_center(teacher_logits: Tensor) -> Tensor:
    """Return the sum of the raw teacher logits and the number of rows, as one float32 vector [K + 1].

    Additive over ranks: all-reduce by sum, then call `update_center`. The vector includes the count because
    the numbers of rows per rank may differ.
    """
    logits = teacher_logits.detach().float()
    return torch.cat([logits.sum(0), logits.new_tensor([logits.shape[0]])])


def update_center(center: Tensor, summed: Tensor, *, momentum: float) -> Tensor:
    """Return m c + (1 - m) * mean of the raw teacher logits (eq. 4); `summed`: the sum of `batch_center`."""
    return center * momentum + (summed[:-1] / summed[-1]) * (1 - momentum)


def koleo(features: Tensor) -> Tensor:
    """Return KoLeo (arXiv 1806.03198) of [n, D]: minus the mean log distance to the nearest other row.

    Distances are between L2-normalised rows, all from one crop on one rank. A single row has no neighbour: 0.
    """
    if len(features) < 2:
        return features.float().sum() * 0
    z = F.normalize(features.float(), dim=-1, eps=1e-8)
    with torch.no_grad():
        nearest = (z @ z.T).fill_diagonal_(-2).argmax(dim=1)
    # From the difference, not the cosine, to keep precision for near-duplicates.
    return -torch.log((z - z[nearest] + 1e-8).norm(dim=-1) + 1e-8).mean()
