"""Detect collapse: entropy, KL, mutual information, prototype use, centre, features, and a verdict on them.

The training step passes sums that it computes anyway. Once per logged step they are reduced over ranks to a
few numbers, which give a verdict with its remedy. All ranks get the same verdict. No Ray here. Axes: K
prototypes, D features.

There are two ways to collapse (DINO, section 5.3): the teacher's targets become uniform (entropy ln K), or
the same single prototype for every image (entropy 0). In both the KL to the student goes to 0, because
targets that do not depend on the image are easy to match. A healthy run also starts near uniform, since an
untrained network maps all images to nearly the same point. So uniform targets have a grace period, and every
symptom must persist.
"""

import math
from collections import deque
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoray.models.compiled import compiled_in_steps
from dinoray.pipeline.training.config import HealthConfig
from dinoray.pipeline.training.distributed import all_reduce_sum
from dinoray.pipeline.training.verdict import Verdict

_UNIFORM_ENTROPY = 0.98
_LEFT_UNIFORM = 0.95
_SINGLE_ENTROPY = 0.02
_SINGLE_SHARE = 0.98
_COLLAPSED_STD = 0.01
"""Thresholds, as shares: the three entropies of ln K, _SINGLE_SHARE of rows, _COLLAPSED_STD of 1 / sqrt(D).

See benchmarks/collapse.py.
"""


class Sums(NamedTuple):
    """Sums over rows of teacher outputs, float32; additive over microbatches, steps and ranks."""

    probs: Tensor  # [K]
    chosen: Tensor  # [K]: rows whose most likely prototype is k
    features: Tensor  # [D]: L2-normalised features
    squares: Tensor  # [D]: their squares
    totals: Tensor  # [3]: rows, entropy, KL

    def where(self, is_finite: Tensor) -> "Sums":
        """Return the sums if `is_finite`, a 0-d bool on the device which the host does not read; otherwise zeros."""
        return Sums(*(torch.where(is_finite, x, 0.0) for x in self))


@compiled_in_steps
@torch.no_grad()
def sums_of(probs: Tensor, features: Tensor, *, entropy: Tensor, kl: Tensor) -> Sums:
    """Sum over targets [n, K] and teacher features [n, D]; `entropy` and `kl`: the batch's means, in nats."""
    z = F.normalize(features.float(), dim=-1)
    chosen = torch.zeros_like(probs[0]).index_add_(0, probs.argmax(1), torch.ones_like(probs[:, 0]))
    rows = torch.full_like(entropy, len(probs))
    totals = torch.stack([rows, entropy * rows, kl * rows])
    return Sums(probs.sum(0), chosen, z.sum(0), (z * z).sum(0), totals)


class Health:
    """Health of a run: call `add` every step and `read` once per logged step, on all ranks."""

    def __init__(self, config: HealthConfig, *, grace_steps: int) -> None:
        self.config, self.grace_steps = config, grace_steps
        self._judge = CollapseDetector(config, grace_steps=grace_steps)
        self._sums: Sums | None = None
        self._window: deque[tuple[Tensor, Tensor, float, float]] = deque(maxlen=config.window)
        self._center: Tensor | None = None

    def add(self, sums: Sums) -> None:
        """Add the sums of one step on this rank."""
        self._sums = sums if self._sums is None else Sums(*map(torch.add, self._sums, sums))

    def read(self, step: int, center: Tensor, *, skipped_in_a_row: int = 0) -> dict[str, Any]:
        """Return metrics since the last reading and the `verdict`, and reset. No steps: only the verdict.

        `entropy_ratio` (0 to 1, of ln K), `kl_mean` (nats), `mutual_information` (nats; of image and
        prototype, over the window), `prototypes_used` (share chosen for some row of the window),
        `commonest_prototype` (share of rows that choose it), `center_norm`, `center_drift` (L2, since the
        last reading), `feature_std` (1 / sqrt(D) if features are spread evenly, 0 if all are equal),
        `collapsed_dims` (share of feature dimensions that hardly vary).
        """
        sizes = [len(center), len(center), 0, 0, 3]
        metrics: dict[str, Any] = {}
        if self._sums is not None:
            sizes[2] = sizes[3] = len(self._sums.features)
            flat = all_reduce_sum(torch.cat(self._sums))
            if flat[-3] > 0:  # rows; none if all steps were skipped
                metrics = self._measure(Sums(*flat.split(sizes)), center)
            self._sums = None
        if skipped_in_a_row >= self.config.max_skipped:
            verdict = Verdict.NON_FINITE
        else:
            verdict = self._judge.judge(step, metrics)
        return {**metrics, "verdict": verdict.value}

    def _measure(self, sums: Sums, center: Tensor) -> dict[str, float]:
        rows, entropy, kl = sums.totals.tolist()
        self._window.append((sums.probs, sums.chosen, rows, entropy))
        all_rows = sum(x[2] for x in self._window)
        marginal = torch.stack([x[0] for x in self._window]).sum(0) / all_rows
        chosen = torch.stack([x[1] for x in self._window]).sum(0)
        information = float(torch.special.entr(marginal).sum()) - sum(x[3] for x in self._window) / all_rows
        mean = sums.features / rows
        std = (sums.squares / rows - mean * mean).clamp(min=0).sqrt()
        before = torch.zeros_like(center) if self._center is None else self._center
        self._center = center.clone()
        return {
            "entropy_ratio": entropy / rows / math.log(len(center)),
            "kl_mean": kl / rows,
            "mutual_information": max(0.0, information),
            "prototypes_used": float((chosen > 0).float().mean()),
            "commonest_prototype": float(sums.chosen.max()) / rows,
            "center_norm": float(center.norm()),
            "center_drift": float((center - before).norm()),
            "feature_std": float(std.mean()),
            "collapsed_dims": float((std < _COLLAPSED_STD / math.sqrt(len(std))).float().mean()),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs, as tensors and numbers. Call it right after `read`."""
        return {
            "window": [list(reading) for reading in self._window],
            "center": self._center,
            "judge": self._judge.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], *, device: torch.device) -> None:
        """Restore the state that `state_dict` returned."""
        self._window.clear()
        self._window.extend(
            (p.to(device), c.to(device), rows, entropy) for p, c, rows, entropy in state["window"]
        )
        self._center = None if state["center"] is None else state["center"].to(device)
        self._judge.load_state_dict(state["judge"])


class CollapseDetector:
    """Derives verdicts from metrics over time: symptoms must persist; an untrained network is no collapse."""

    def __init__(self, config: HealthConfig, *, grace_steps: int) -> None:
        self._persistence, self._grace_steps = config.persistence, grace_steps
        self._left_uniform = False
        self._symptom, self._times = Verdict.HEALTHY, 0

    def judge(self, step: int, metrics: dict[str, Any]) -> Verdict:
        """Return the verdict after `step` steps; without metrics, it stays as it is."""
        if metrics:
            symptom = symptom_of(metrics)
            self._left_uniform |= metrics["entropy_ratio"] < _LEFT_UNIFORM
            if symptom is Verdict.UNIFORM and step < self._grace_steps and not self._left_uniform:
                symptom = Verdict.HEALTHY
            self._times = self._times + 1 if symptom is self._symptom else 1
            self._symptom = symptom
        return self._symptom if self._times >= self._persistence else Verdict.HEALTHY

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values."""
        return {"left_uniform": self._left_uniform, "symptom": self._symptom.value, "times": self._times}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from plain values."""
        self._left_uniform, self._times = state["left_uniform"], state["times"]
        self._symptom = Verdict(state["symptom"])


def symptom_of(metrics: dict[str, Any]) -> Verdict:
    """Return the verdict on one reading alone."""
    if metrics["entropy_ratio"] < _SINGLE_ENTROPY and metrics["commonest_prototype"] > _SINGLE_SHARE:
        return Verdict.SINGLE
    return Verdict.UNIFORM if metrics["entropy_ratio"] > _UNIFORM_ENTROPY else Verdict.HEALTHY
