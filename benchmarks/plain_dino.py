"""DINO's published step in plain eager PyTorch, written for comparison: what a user of the published code runs.

As published (arXiv 2104.14294 and its code): a forward per resolution of student and teacher, a loop over pairs of
crops, each gradient clipped by a norm that the host reads, AdamW with its default arguments, the teacher updated
parameter by parameter, float16 autocast with a gradient scaler on a GPU, and the loss read by the host after each step.

It starts from the same networks as our step, with timm's attention, which is faster than the published one: the
comparison is of steps, not of networks.
"""

import copy
import math
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from part_clock import Mark, no_mark
from torch import Tensor, nn

from dinoray.models.dino import DINO
from dinoray.models.head import DINOHead
from dinoray.pipeline.training.config import DINOConfig, Schedule


class PlainHead(nn.Module):
    """MLP, L2 norm, and a weight-normed layer, in whatever precision autocast chooses."""

    def __init__(self, head: DINOHead) -> None:
        super().__init__()
        self.mlp = copy.deepcopy(head.mlp)
        out_dim, bottleneck_dim = head.last_layer.weight_v.shape
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the published code has the older weight norm
            self.last_layer = nn.utils.weight_norm(nn.Linear(bottleneck_dim, out_dim, bias=False))
        self.last_layer.weight_g.data.copy_(head.last_layer.weight_g)
        self.last_layer.weight_v.data.copy_(head.last_layer.weight_v)
        self.last_layer.weight_g.requires_grad = head.last_layer.weight_g.requires_grad

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1, p=2))


class PlainNet(nn.Module):
    """One forward of the backbone for each resolution, one of the head for all crops."""

    def __init__(self, backbone: nn.Module, head: DINOHead) -> None:
        super().__init__()
        self.backbone, self.head = copy.deepcopy(backbone), PlainHead(head)

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        features, first = [], 0
        for last in range(1, len(crops) + 1):
            if last == len(crops) or crops[last].shape[-1] != crops[first].shape[-1]:
                features.append(self.backbone(torch.cat(list(crops[first:last]))))
                first = last
        return self.head(torch.cat(features))


class PlainStep:
    """Student, teacher, centre and optimiser; a call runs one step."""

    def __init__(self, dino: DINO, config: DINOConfig, schedule: Schedule, device: torch.device) -> None:
        self._config, self._schedule, self._device, self._step = config, schedule, device, 0
        self.student = PlainNet(dino.student.backbone, dino.student.head).to(device)
        self.teacher = PlainNet(dino.teacher.backbone, dino.teacher.head).to(device)
        self.teacher.requires_grad_(False)
        self.student.train(dino.student.training)
        self.teacher.train(dino.teacher.training)
        self.center = dino.center.clone()
        decayed, others = [], []
        for name, p in self.student.named_parameters():
            if p.requires_grad:
                (others if name.endswith(".bias") or p.ndim == 1 else decayed).append(p)
        self.optimizer = torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}])
        self._scaler = torch.amp.GradScaler() if device.type == "cuda" else None

    def __call__(self, crops: Sequence[Tensor], mark: Mark = no_mark) -> float:
        """Run a step on the crops, each normalised float32 [B, 3, S, S], globals first; return the loss."""
        now, loss_of = self._schedule.at(self._step), self._config.loss
        num_global_crops = self._config.crops.num_global_crops
        for i, group in enumerate(self.optimizer.param_groups):
            group["lr"] = now.lr
            if i == 0:
                group["weight_decay"] = now.weight_decay
        with torch.autocast(self._device.type, dtype=torch.float16, enabled=self._scaler is not None):
            mark("other")
            with torch.no_grad():
                teacher = self.teacher(crops[:num_global_crops])
            mark("teacher forward")
            student = self.student(crops)
            mark("student forward")
            if mark is not no_mark:
                student.register_hook(lambda _: mark("loss"))
            scaled = (student / loss_of.student_temp).chunk(len(crops))
            targets = F.softmax((teacher - self.center) / now.teacher_temp, dim=-1).detach()
            total, num_pairs = torch.zeros((), device=self._device), 0
            for g, target in enumerate(targets.chunk(num_global_crops)):
                for v, logits in enumerate(scaled):
                    if v != g:
                        total = total + torch.sum(-target * F.log_softmax(logits, dim=-1), dim=-1).mean()
                        num_pairs += 1
            loss = total / num_pairs
            batch_center = teacher.float().sum(0, keepdim=True) / len(teacher)
            self.center = (
                self.center * loss_of.center_momentum + batch_center * (1 - loss_of.center_momentum)
            ).squeeze(0)
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"the loss of the plain step is {loss.item()}")
        self._update(loss, now.freeze_last_layer, mark)
        with torch.no_grad():
            m = now.teacher_momentum
            for q, k in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
                k.data.mul_(m).add_((1 - m) * q.detach().data)
        mark("EMA")
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._step += 1
        return loss.item()

    def _update(self, loss: Tensor, freeze_last_layer: bool, mark: Mark) -> None:
        self.optimizer.zero_grad()
        if self._scaler is None:
            loss.backward()
        else:
            self._scaler.scale(loss).backward()
        mark("backward")
        if self._scaler is not None:
            self._scaler.unscale_(self.optimizer)
        if self._config.optim.clip_grad:
            clip_gradients(self.student, self._config.optim.clip_grad)
        if freeze_last_layer:
            for p in self.student.head.last_layer.parameters():
                p.grad = None
        if self._scaler is None:
            self.optimizer.step()
        else:
            self._scaler.step(self.optimizer)
            self._scaler.update()
        mark("optimiser")


def clip_gradients(model: nn.Module, clip: float) -> list[float]:
    """Clip each parameter's gradient to the norm `clip`; return the norms, each of them read by the host."""
    norms = []
    for p in model.parameters():
        if p.grad is not None:
            norm = p.grad.data.norm(2)
            norms.append(norm.item())
            clip_coef = clip / (norm + 1e-6)
            if clip_coef < 1:
                p.grad.data.mul_(clip_coef)
    return norms
