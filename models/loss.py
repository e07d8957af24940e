"""The DINO loss as pure functions: sharpened and centred teacher probabilities, cross-entropy over crop pairs, centre.

No state, no process group: whoever calls keeps the centre and reduces the statistics over ranks.
Axes: B images, G global crops, V = G + L crops, K prototypes. Logits are crop-major: row v * B + b.
"""

from typing import NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from models.settings import Settings


class LossConfig(Settings):
    """Temperatures and centring."""

    student_temp: float = Field(default=0.1, gt=0)
    """Temperature of the student's softmax."""
    teacher_temp: float = Field(default=0.04, gt=0)
    """Temperature of the teacher's softmax after warm-up; above 0.07 runs become unstable."""
    warmup_teacher_temp: float = Field(default=0.04, gt=0)
    """Teacher temperature at the start."""
    warmup_teacher_temp_epochs: int = Field(default=0, ge=0)
    """Epochs from `warmup_teacher_temp` to `teacher_temp`, one linear stair per epoch; 0 starts at `teacher_temp`."""
    center_momentum: float = Field(default=0.9, ge=0, lt=1)
    """Share of the old centre kept at each step; 0.999 and above is known to collapse."""

    @model_validator(mode="after")
    def _warmup_rises(self) -> "LossConfig":
        if self.warmup_teacher_temp_epochs and self.warmup_teacher_temp > self.teacher_temp:
            raise ValueError(
                f"warmup_teacher_temp={self.warmup_teacher_temp} must not exceed teacher_temp={self.teacher_temp}; "
                "lower it or set warmup_teacher_temp_epochs=0"
            )
        return self


class CrossEntropy(NamedTuple):
    """Scalars: the loss, and the mean entropy of the teacher's targets; loss - entropy = KL(teacher || student)."""

    loss: Tensor
    teacher_entropy: Tensor


def teacher_probs(teacher_logits: Tensor, center: Tensor, temp: float) -> Tensor:
    """Sharpened, centred targets softmax((t - c) / temp): [G*B, K] -> [G*B, K] float32, detached."""
    return torch.softmax((teacher_logits.detach().float() - center) / temp, dim=-1)


def cross_entropy(
    probs: Tensor, student_logits: Tensor, *, student_temp: float, num_global_crops: int
) -> CrossEntropy:
    """Mean cross-entropy over the pairs (global crop g of the teacher, crop v != g of the student).

    `probs` [G*B, K] from `teacher_probs`, `student_logits` [V*B, K], both crop-major with the globals first.
    Equal to the double loop over pairs, in which a crop is never compared with itself:

        mean over g, v != g, b of  -sum_k probs[g, b, k] * log_softmax(student_logits[v, b] / student_temp)[k]

    Written as logsumexp(s_v) - q_g . s_v and summed over v first, so that nothing of size V * G * K is stored.
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
    """Sum of the raw teacher logits and the number of rows, as one float32 vector [K + 1].

    Additive over ranks: all-reduce by sum, then `update_center`. The count travels with the sum because
    ranks need not hold equally many rows.
    """
    logits = teacher_logits.detach().float()
    return torch.cat([logits.sum(0), logits.new_tensor([logits.shape[0]])])


def update_center(center: Tensor, summed: Tensor, *, momentum: float) -> Tensor:
    """c <- m c + (1 - m) * mean of the raw teacher logits (eq. 4); `summed` as `batch_center` gives it."""
    return center * momentum + (summed[:-1] / summed[-1]) * (1 - momentum)
