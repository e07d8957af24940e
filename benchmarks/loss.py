"""What the loss costs, forward and backward: the present one, the former one, and a plain loop over pairs of crops.

    python benchmarks/loss.py [--images 4 8] [--out-dim 65536] [--local-crops 8] [--rounds 15]
                              [--compile] [--step vit_small_imagenet_vanilla] [--step-rounds 7]
                              [--set KEY=VALUE ...]

The former loss left the gradient to autograd. The plain one is the published form: a log-softmax of all logits, then
a product for each pair. All take turns in one process on one thread. Times are CPU milliseconds, medians (least to
most). Memory is the peak of what torch allocates during forward and backward, gradient included, in units of the
student's logits as float32 [V, B, K]; the logits and the targets themselves are not counted. Errors are relative to
float64, of a tensor by its largest entry. --compile adds the present loss as train.compile compiles it.

--step adds whole training steps of a recipe, on noise, as they are and with what they had before: the former loss, a
normalised matrix of prototypes for the teacher too, and AdamW that is not fused. `--step none` leaves them out.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from peak_memory import peak_bytes
from torch import Tensor

from dinoray.jobs.cli.config import load_config
from dinoray.jobs.cli.main import run_main
from dinoray.models import optim
from dinoray.models.compiled import Compilation
from dinoray.models.head import PrototypeLayer
from dinoray.models.loss import CrossEntropy, cross_entropy, teacher_probs
from dinoray.pipeline.training import step as training
from dinoray.pipeline.training.config import DINOConfig
from dinoray.pipeline.training.state import build_state

NUM_IMAGES = 1_281_167
Loss = Callable[..., CrossEntropy]


def former(
    probs: Tensor, student_logits: Tensor, *, student_temp: float, num_global_crops: int
) -> CrossEntropy:
    """Return what `cross_entropy` returns; the gradient is autograd's."""
    num_images = probs.shape[0] // num_global_crops
    q = probs.unflatten(0, (num_global_crops, num_images))  # [G, B, K]
    s = student_logits.float().unflatten(0, (-1, num_images)) / student_temp  # [V, B, K]
    lse = torch.logsumexp(s, dim=-1)  # [V, B]
    others_lse = lse.sum(0) - lse[:num_global_crops]  # [G, B]: sum over v != g
    others_s = s.sum(0) - s[:num_global_crops]  # [G, B, K]
    num_pairs = num_global_crops * (s.shape[0] - 1)
    loss = (others_lse - (q * others_s).sum(-1)).sum(0).mean() / num_pairs
    return CrossEntropy(loss, torch.special.entr(q).sum(-1).mean())


def plain(
    probs: Tensor, student_logits: Tensor, *, student_temp: float, num_global_crops: int
) -> CrossEntropy:
    """Return what `cross_entropy` returns, by a loop over pairs."""
    targets = probs.chunk(num_global_crops)
    scaled = (student_logits.float() / student_temp).chunk(
        num_global_crops * len(student_logits) // len(probs)
    )
    terms = [
        torch.sum(-q * F.log_softmax(s, dim=-1), dim=-1).mean()
        for g, q in enumerate(targets)
        for v, s in enumerate(scaled)
        if v != g
    ]
    return CrossEntropy(sum(terms, torch.zeros(())) / len(terms), torch.special.entr(probs).sum(-1).mean())


LOSSES: dict[str, Loss] = {"now": cross_entropy, "before": former, "loop over pairs": plain}


def cpu_ms(works: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the CPU milliseconds of each work in each round; a first round is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            start = time.process_time()
            work()
            taken[name].append(1e3 * (time.process_time() - start))
    return {name: each[1:] for name, each in taken.items()}


def logits_of(images: int, out_dim: int, local_crops: int) -> tuple[Tensor, Tensor]:
    """Return targets [2B, K] and the student's logits [(2+L)B, K]: cosines, as the head returns them."""
    rng = torch.Generator().manual_seed(0)
    teacher, student = (
        torch.rand(crops * images, out_dim, generator=rng) * 2 - 1 for crops in (2, 2 + local_crops)
    )
    return teacher_probs(teacher, torch.zeros(out_dim), 0.04), student.requires_grad_()


def backward(loss: Loss, probs: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """Run forward and backward; return the loss and the gradient of the student's logits."""
    value = loss(probs, student, student_temp=0.1, num_global_crops=2).loss
    (grad,) = torch.autograd.grad(value, student)
    return value.detach(), grad


def compiled(probs: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `backward` returns of the present loss, by compiled code."""
    with Compilation("inductor").step():
        return backward(cross_entropy, probs, student)


class Step:
    """Training steps on one batch of noise, with the present parts or the former ones, and what its loss takes."""

    def __init__(self, config: DINOConfig, *, former_parts: bool) -> None:
        crops, rng = config.crops, np.random.default_rng(0)
        self._batch = {
            name: rng.integers(0, 256, (config.train.global_batch_size, num, size, size, 3), dtype=np.uint8)
            for name, num, size in (
                ("global_crops", crops.num_global_crops, crops.global_crop_size),
                ("local_crops", crops.num_local_crops, crops.local_crop_size),
            )
        }
        self._state = build_state(config, num_images=NUM_IMAGES)
        self._loss: Loss = cross_entropy
        self._layer: Callable[..., Tensor] = PrototypeLayer.forward
        if former_parts:
            self._loss, self._layer = former, former_prototypes
            if config.optim.name == "adamw":
                groups = optim.param_groups(self._state.dino.student, layer_decay=config.optim.layer_decay)
                self._state.optimizer = torch.optim.AdamW(groups, lr=0.0)
        self.loss_ms: list[float] = []
        """Of each step, forward and backward."""

    def __call__(self) -> float:
        """Run a step; return its loss."""
        with (
            mock.patch.object(training, "cross_entropy", self._timed_loss),
            mock.patch.object(PrototypeLayer, "forward", self._layer),
        ):
            return float(training.train_step(self._state, self._batch)["loss"])

    def _timed_loss(self, probs: Tensor, logits: Tensor, **settings: Any) -> CrossEntropy:
        clock = [time.process_time()]
        result = self._loss(probs, logits, **settings)
        clock.append(time.process_time())
        result.loss.register_hook(lambda _: clock.append(time.process_time()))

        def end(_: Tensor) -> None:
            self.loss_ms.append(1e3 * (clock[1] - clock[0] + time.process_time() - clock[2]))

        logits.register_hook(end)
        return result


def former_prototypes(layer: PrototypeLayer, x: Tensor) -> Tensor:
    """Return the logits of `x`; the normalised matrix is written for student and teacher alike."""
    return F.linear(x, torch._weight_norm(layer.weight_v, layer.weight_g, 0))


def ratio_cells(taken: dict[str, list[float]], name: str) -> str:
    """Return two cells: median (least to most), and the ratio of the medians of "now" and `name`."""
    each, median = taken[name], statistics.median
    ratio = "" if name == "now" else f"{median(taken['now']) / median(each):.2f}"
    return f"{median(each):,.1f} ({min(each):,.1f} to {max(each):,.1f}) | {ratio}"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, nargs="+", default=[4, 8], help="per batch")
    parser.add_argument("--out-dim", type=int, default=65536)
    parser.add_argument("--local-crops", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="also the present loss, compiled")
    parser.add_argument("--step", default="vit_small_imagenet_vanilla", help="recipe of the steps, or none")
    parser.add_argument("--step-rounds", type=int, default=7)
    parser.add_argument("--set", nargs="+", default=["train.global_batch_size=4"], help="keys of the recipe")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    print("| images | loss | CPU ms | now / it | peak memory | error of the loss | of the gradient |")
    print("|---|---|---|---|---|---|---|")
    for images in arguments.images:
        probs, student = logits_of(images, arguments.out_dim, arguments.local_crops)
        value, gradient = backward(cross_entropy, probs.double(), student.detach().double().requires_grad_())
        works = {name: partial(backward, loss, probs, student) for name, loss in LOSSES.items()}
        if arguments.compile:
            works["now, compiled"] = partial(compiled, probs, student)
        taken = cpu_ms(works, arguments.rounds)
        for name, work in works.items():
            memory = peak_bytes(work) / (4 * student.numel())
            ours = work()
            off = [
                float((a - b).abs().max() / b.abs().max())
                for a, b in zip(ours, (value, gradient), strict=True)
            ]
            cells = f"{ratio_cells(taken, name)} | {memory:.2f} | {off[0]:.0e} | {off[1]:.0e}"
            print(f"| {images} | {name} | {cells} |", flush=True)
    if arguments.step == "none":
        return
    config = load_config(arguments.step, None, ["data.path=none", *arguments.set]).algorithm()
    steps = {name: Step(config, former_parts=name == "before") for name in ("now", "before")}
    taken = cpu_ms(steps, arguments.step_rounds)
    of_loss = {name: step.loss_ms[1:] for name, step in steps.items()}
    print(
        f"\n| step of {arguments.step}, {' '.join(arguments.set)} | CPU ms | now / it | of it, the loss | now / it |"
    )
    print("|---|---|---|---|---|")
    for name in steps:
        print(f"| {name} | {ratio_cells(taken, name)} | {ratio_cells(of_loss, name)} |")


if __name__ == "__main__":
    run_main(main)
