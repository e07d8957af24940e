"""The DINO loss as pure functions: teacher probabilities, cross-entropy over crop pairs, centre, KoLeo.

No state, no process group: the caller keeps the centre and passes the reductions over ranks.
Axes: B images, G global crops, V = G + L crops, K prototypes. Logits are crop-major: row v * B + b.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dinoray.models.compiled import compiled_in_steps, is_compiled_now
from dinoray.models.loss_rows import fill_gradient, row_sums

_SINKHORN_ITERATIONS = 3


class CrossEntropy(NamedTuple):
    """Scalars: the loss and the mean entropy of the targets; loss - entropy = KL(teacher || student)."""

    loss: Tensor
    teacher_entropy: Tensor


@compiled_in_steps
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

    `probs` [G*B, K] from `teacher_probs`, constants: they get no gradient. `student_logits` [V*B, K], of any
    float dtype. Both crop-major with the globals first. Computed in float32 (float64 for float64 logits);
    the gradient has the dtype of the logits. Equal to the double loop over pairs, in which a crop is never
    compared with itself:

        mean over g, v != g, b of  -sum_k probs[g, b, k] * log_softmax(student_logits[v, b] / student_temp)[k]
    """
    loss = _MeanOverPairs.apply(student_logits, probs, student_temp, num_global_crops)
    return CrossEntropy(loss, _mean_entropy(probs))


@compiled_in_steps
def _mean_entropy(probs: Tensor) -> Tensor:
    # Twice as fast as torch.special.entr on a CPU. A probability of 0 adds 0 * log(tiny) = 0.
    log_probs = probs.clamp_min(torch.finfo(probs.dtype).tiny).log_()
    return -log_probs.mul_(probs).sum(-1).mean()


class _MeanOverPairs(torch.autograd.Function):
    """Mean cross-entropy over pairs, with its gradient written out, one crop of the student at a time.

    Crop v meets `num` global crops other than itself; `targets` is the sum of their probabilities. With
    p = softmax(s / temp) and N pairs of rows:

        loss         = sum over v, b of  (num * logsumexp(s / temp) - targets . s / temp) / N
        d loss / d s = (num * p - targets) / (N * temp)

    The second part of the loss is summed over v first, which needs one pass over the logits.

    Autograd of this formula keeps and passes over several float32 tensors [V, B, K]. Here only the gradient
    has that size: the backward needs no more than the logits and their logsumexp [V, B].
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, probs: Tensor, temp: float, num_global_crops: int) -> Tensor:
        crops = logits.unflatten(0, (-1, len(probs) // num_global_crops))  # [V, B, K]
        lses, dots = (_compiled_row_sums if is_compiled_now() else _row_sums)(
            crops, probs, temp, num_global_crops
        )
        ctx.save_for_backward(logits, probs, lses)
        ctx.temp, ctx.num_global_crops = temp, num_global_crops
        ctx.num_pairs = num_global_crops * (lses.numel() - lses.shape[1])
        lse_of_pairs = num_global_crops * lses.sum() - lses[:num_global_crops].sum()
        return (lse_of_pairs - dots / temp) / ctx.num_pairs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None, None]:
        logits, probs, lses = ctx.saved_tensors
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
        crops, grads = (x.unflatten(0, lses.shape) for x in (logits, grad))
        scale = grad_loss / (ctx.num_pairs * ctx.temp)
        fill = fill_gradient if is_compiled_now() else _fill_gradient
        for group, targets, num in _targets(probs, ctx.num_global_crops, len(crops)):
            fill(grads[group], crops[group], lses[group], targets, num, scale, ctx.temp)
        return grad, None, None, None


def _row_sums(crops: Tensor, probs: Tensor, temp: float, num_global_crops: int) -> tuple[Tensor, Tensor]:
    """Return logsumexp(crops / temp) [V, B], and the sum over pairs of the products of targets and logits []."""
    dtype = torch.promote_types(crops.dtype, torch.float32)
    total = crops.sum(0, dtype=dtype)
    scratch = torch.empty_like(total)
    dots = total.new_zeros(())  # sum over g, b of  probs[g, b] . (sum over v != g of  crops[v, b])
    for q, crop in zip(probs.unflatten(0, (num_global_crops, -1)), crops, strict=False):
        torch.sub(total, crop, out=scratch)
        dots += scratch.mul_(q).sum(-1).sum()
    lses = total.new_empty(crops.shape[:2])
    for crop, lse in zip(crops, lses, strict=True):
        s = crop.to(dtype)
        # The largest is subtracted, so that no exponential overflows.
        most = s.amax(-1, keepdim=True) / temp
        torch.add(-most, s, alpha=1 / temp, out=scratch)
        torch.add(scratch.exp_().sum(-1).log_(), most.squeeze(-1), out=lse)
    return lses, dots


def _compiled_row_sums(
    crops: Tensor, probs: Tensor, temp: float, num_global_crops: int
) -> tuple[Tensor, Tensor]:
    groups = _targets(probs, num_global_crops, len(crops))
    lses, dots = zip(*(row_sums(crops[group], targets, temp) for group, targets, _ in groups), strict=True)
    return torch.cat(lses), torch.stack(dots).sum()


def _fill_gradient(
    grads: Tensor, crops: Tensor, lses: Tensor, targets: Tensor, num: int, scale: Tensor, temp: float
) -> None:
    """Set `grads` as `fill_gradient` does, one crop after the other."""
    scratch = torch.empty_like(crops[0], dtype=lses.dtype)
    for crop, grad, lse in zip(crops, grads, lses, strict=True):
        torch.add(-lse.unsqueeze(-1), crop.to(lses.dtype), alpha=1 / temp, out=scratch)
        torch.sub(scratch.exp_().mul_(num), targets, out=scratch)
        torch.mul(scratch, scale, out=grad)


def _targets(probs: Tensor, num_global_crops: int, num_crops: int) -> Iterator[tuple[slice, Tensor, int]]:
    """Yield groups of crops with the same targets: the crops, the sum [B, K] of the probabilities of the global crops
    that they meet, and the number of these."""
    crops = probs.unflatten(0, (num_global_crops, -1))  # [G, B, K]
    for v in range(num_global_crops):
        if num_global_crops == 2:
            others = crops[1 - v]  # without a copy
        else:
            # Not the sum of all minus crops[v], which would have the rounding error of the larger of the two.
            others = torch.cat([crops[:v], crops[v + 1 :]]).sum(0)
        yield slice(v, v + 1), others, num_global_crops - 1
    if num_crops > num_global_crops:
        yield slice(num_global_crops, num_crops), crops.sum(0), num_global_crops


@compiled_in_steps
def batch_center(teacher_logits: Tensor) -> Tensor:
    """Return the sum of the raw teacher logits and the number of rows, as one float32 vector [K + 1].

    Additive over ranks: all-reduce by sum, then call `update_center`. The vector includes the count because
    the numbers of rows per rank may differ.
    """
    logits = teacher_logits.detach().float()
    return torch.cat([logits.sum(0), logits.new_full((1,), len(logits))])


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
