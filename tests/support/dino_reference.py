"""DINO's training step a second time, in float64, from the paper (arXiv 2104.14294) and what the published code does.

Nothing of models/, pipeline/ or timm stands below: the ViT, the head, the loss over pairs, the optimisers and the
schedules' tables are all written out, one after the other, in the order in which the published step runs them.
Only gradients are taken by autograd. Weights are a flat dict under the published names (`backbone.norm.weight`,
`head.last_layer.weight_v`). Axes: B images, V crops of each, N rows, T tokens, D embedding, K prototypes.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Weights = dict[str, Tensor]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Arguments:
    """What the published training script is told, and what its networks are built with."""

    patch_size: int
    num_heads: int
    pos_embed: Literal["official", "timm"]
    norm_last_layer: bool
    epochs: int
    steps_per_epoch: int
    global_batch_size: int
    optimizer: Literal["adamw", "sgd", "lars"]
    lr: float
    min_lr: float
    warmup_epochs: int
    weight_decay: float
    weight_decay_end: float
    momentum_teacher: float
    momentum_teacher_end: float
    student_temp: float
    teacher_temp: float
    warmup_teacher_temp: float
    warmup_teacher_temp_epochs: int
    center_momentum: float
    clip_grad: float
    freeze_last_layer: int


@dataclass(frozen=True)
class Step:
    """All that one step used and left behind. Gradients of frozen parameters are missing."""

    loss: float
    lr: float
    weight_decay: float
    teacher_momentum: float
    teacher_temp: float
    grads: Weights
    """Before clipping."""
    clipped: Weights
    """As the optimiser gets them: clipped, and without the last layer's while it is frozen."""
    student: Weights
    teacher: Weights
    center: Tensor


def run(
    weights: Mapping[str, Tensor], batches: Iterable[list[NDArray[np.uint8]]], arguments: Arguments
) -> Iterator[Step]:
    """Train from `weights` (student and teacher alike), a step for each batch.

    A batch is the list of an image's crops in the published order, globals first: uint8 [B, S, S, 3] each.
    """
    a = arguments
    student = {name: x.detach().double() if x.is_floating_point() else x for name, x in weights.items()}
    teacher = dict(student)  # no tensor below is written to, each is replaced
    frozen = {name for name in student if "running_" in name or "num_batches" in name}
    if a.norm_last_layer:
        frozen.add("head.last_layer.weight_g")
    trained = [name for name in student if name not in frozen]
    moments: dict[str, dict[str, Any]] = {}
    center = torch.zeros(len(student["head.last_layer.weight_v"]), dtype=torch.float64)
    lrs = cosine_table(a, a.lr * a.global_batch_size / 256, a.min_lr, warmup_epochs=a.warmup_epochs)
    decays = cosine_table(a, a.weight_decay, a.weight_decay_end)
    momenta = cosine_table(a, a.momentum_teacher, a.momentum_teacher_end)
    temps = temperature_table(a)

    for step, batch in enumerate(batches):
        epoch = step // a.steps_per_epoch
        lr, decay, momentum, temp = (float(x) for x in (lrs[step], decays[step], momenta[step], temps[epoch]))
        crops = [normalised(crop) for crop in batch]

        # The teacher sees the two global crops, the student all.
        with torch.no_grad():
            teacher_logits = multi_crop(teacher, crops[:2], a)
        for name in trained:
            student[name].requires_grad_(True)
        loss = pair_loss(
            teacher_logits, multi_crop(student, crops, a), center, temp, a.student_temp, len(crops)
        )
        gradients = torch.autograd.grad(loss, [student[name] for name in trained])
        for name in trained:
            student[name] = student[name].detach()
        grads = dict(zip(trained, gradients, strict=True))

        # The centre moves once the loss has used it, by the teacher's raw logits.
        center = center * a.center_momentum + teacher_logits.mean(0) * (1 - a.center_momentum)

        clipped = {name: clip(grad, a.clip_grad) for name, grad in grads.items()}
        if epoch < a.freeze_last_layer:
            clipped = {name: grad for name, grad in clipped.items() if "last_layer" not in name}
        for name, grad in clipped.items():
            no_decay = name.endswith(".bias") or student[name].ndim == 1
            wd = 0.0 if no_decay else decay
            update = {"adamw": adamw, "sgd": sgd, "lars": lars}[a.optimizer]
            student[name] = update(student[name], grad, moments.setdefault(name, {}), lr, wd)

        # The teacher follows the student that the step has made; buffers stay each network's own.
        for name in trained + [n for n in frozen if "last_layer" in n]:
            teacher[name] = momentum * teacher[name] + (1 - momentum) * student[name]

        yield Step(
            loss=loss.item(),
            lr=lr,
            weight_decay=decay,
            teacher_momentum=momentum,
            teacher_temp=temp,
            grads=grads,
            clipped=clipped,
            student=dict(student),
            teacher=dict(teacher),
            center=center.clone(),
        )


# Pixels and crops


def normalised(images: NDArray[np.uint8]) -> Tensor:
    """uint8 [B, S, S, 3] -> float64 [B, 3, S, S]."""
    x = (images.astype(np.float64) / 255 - np.array(MEAN)) / np.array(STD)
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


def multi_crop(w: Weights, crops: list[Tensor], a: Arguments) -> Tensor:
    """Crops of equal size that follow each other pass the backbone as one batch, all pass the head as one: [V*B, K]."""
    features = []
    start = 0
    while start < len(crops):
        end = start
        while end < len(crops) and crops[end].shape[-1] == crops[start].shape[-1]:
            end += 1
        features.append(vit(w, torch.cat(crops[start:end]), a))
        start = end
    return head(w, torch.cat(features))


# Backbone


def vit(w: Weights, x: Tensor, a: Arguments) -> Tensor:
    """[N, 3, S, S] -> [N, D], the class token after the last norm."""
    p, grid = a.patch_size, x.shape[-1] // a.patch_size
    patches = (
        x.reshape(len(x), 3, grid, p, grid, p)
        .permute(0, 2, 4, 1, 3, 5)
        .reshape(len(x), grid * grid, 3 * p * p)
    )
    kernel = w["backbone.patch_embed.proj.weight"].flatten(1)
    tokens = patches @ kernel.T + w["backbone.patch_embed.proj.bias"]
    tokens = torch.cat([w["backbone.cls_token"].expand(len(x), -1, -1), tokens], dim=1)
    tokens = tokens + position_embedding(w["backbone.pos_embed"], grid, a.pos_embed)
    block = 0
    while f"backbone.blocks.{block}.norm1.weight" in w:
        name = f"backbone.blocks.{block}"
        tokens = tokens + attention(w, f"{name}.attn", layer_norm(w, f"{name}.norm1", tokens), a.num_heads)
        hidden = gelu(linear(w, f"{name}.mlp.fc1", layer_norm(w, f"{name}.norm2", tokens)))
        tokens = tokens + linear(w, f"{name}.mlp.fc2", hidden)
        block += 1
    return layer_norm(w, "backbone.norm", tokens)[:, 0]


def attention(w: Weights, name: str, x: Tensor, num_heads: int) -> Tensor:
    """[N, T, D] -> [N, T, D]."""
    N, T, D = x.shape
    q, k, v = linear(w, f"{name}.qkv", x).reshape(N, T, 3, num_heads, D // num_heads).permute(2, 0, 3, 1, 4)
    scores = torch.einsum("nhtd,nhsd->nhts", q, k) / math.sqrt(D // num_heads)
    scores = torch.exp(scores - scores.amax(-1, keepdim=True))
    mixed = torch.einsum("nhts,nhsd->nthd", scores / scores.sum(-1, keepdim=True), v)
    return linear(w, f"{name}.proj", mixed.reshape(N, T, D))


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def layer_norm(w: Weights, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + 1e-6) * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def position_embedding(pos_embed: Tensor, grid: int, rule: str) -> Tensor:
    """[1, 1 + n*n, D] -> [1, 1 + grid*grid, D]: the class token's as it is, the others' resampled."""
    n = math.isqrt(pos_embed.shape[1] - 1)
    if grid == n:
        return pos_embed
    weights = official_taps(n, grid) if rule == "official" else antialiased_taps(n, grid)
    square = pos_embed[0, 1:].reshape(n, n, -1)
    resampled = torch.einsum("yi,xj,ijd->yxd", weights, weights, square)
    return torch.cat([pos_embed[:, :1], resampled.reshape(1, grid * grid, -1)], dim=1)


def official_taps(n: int, grid: int) -> Tensor:
    """Bicubic [grid, n] without antialiasing, for the scale factor (grid + 0.1) / n."""
    scale = (grid + 0.1) / n
    taps = torch.zeros(grid, n, dtype=torch.float64)
    for i in range(grid):
        source = (i + 0.5) / scale - 0.5
        for j in range(math.floor(source) - 1, math.floor(source) + 3):
            taps[i, min(max(j, 0), n - 1)] += cubic(source - j, -0.75)
    return taps


def antialiased_taps(n: int, grid: int) -> Tensor:
    """Bicubic [grid, n] with a kernel as wide as the shrinkage, which is timm's rule."""
    scale = n / grid
    wide = max(scale, 1.0)
    taps = torch.zeros(grid, n, dtype=torch.float64)
    for i in range(grid):
        for j in range(n):
            taps[i, j] = cubic((j + 0.5 - scale * (i + 0.5)) / wide, -0.5)
    return taps / taps.sum(1, keepdim=True)


def cubic(x: float, a: float) -> float:
    """Keys' kernel."""
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    if x < 2:
        return a * (x**3 - 5 * x**2 + 8 * x - 4)
    return 0.0


# Head


def head(w: Weights, x: Tensor) -> Tensor:
    """[N, D] -> [N, K]: linear layers, between them GELU after a batch norm if there is one; cosines, times g."""
    layers = sorted(
        int(name.split(".")[2]) for name in w if name.startswith("head.mlp.") and name.endswith(".bias")
    )
    for layer in layers:
        name = f"head.mlp.{layer}"
        if w[f"{name}.weight"].ndim == 2:
            # An activation stands before each linear layer but the first.
            x = linear(w, name, gelu(x) if layer > 0 else x)
        else:
            x = batch_norm(w, name, x)
    x = x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    v, g = w["head.last_layer.weight_v"], w["head.last_layer.weight_g"]
    return x @ (g * v / v.norm(dim=1, keepdim=True)).T


def batch_norm(w: Weights, name: str, x: Tensor) -> Tensor:
    """By the batch's own statistics; the running ones move by a tenth, with the unbiased variance."""
    mean, variance = x.mean(0), ((x - x.mean(0)) ** 2).mean(0)
    with torch.no_grad():
        unbiased = variance * len(x) / (len(x) - 1)
        w[f"{name}.running_mean"] = 0.9 * w[f"{name}.running_mean"] + 0.1 * mean
        w[f"{name}.running_var"] = 0.9 * w[f"{name}.running_var"] + 0.1 * unbiased
    return (x - mean) / torch.sqrt(variance + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


# Loss


def pair_loss(
    teacher_logits: Tensor,
    student_logits: Tensor,
    center: Tensor,
    teacher_temp: float,
    student_temp: float,
    num_crops: int,
) -> Tensor:
    """Mean cross-entropy over the pairs of a teacher's global crop and a student's crop that is another one."""
    targets = [torch.softmax((t - center) / teacher_temp, dim=-1) for t in teacher_logits.chunk(2)]
    guesses = [torch.log_softmax(s / student_temp, dim=-1) for s in student_logits.chunk(num_crops)]
    total, pairs = torch.zeros((), dtype=torch.float64), 0
    for g, q in enumerate(targets):
        for v, log_p in enumerate(guesses):
            if v == g:
                continue
            total = total - (q.detach() * log_p).sum(-1).mean()
            pairs += 1
    return total / pairs


# Gradients and optimisers


def clip(grad: Tensor, max_norm: float) -> Tensor:
    """One tensor's gradient by its own norm; 0 is no clipping."""
    if not max_norm:
        return grad
    coefficient = max_norm / (math.sqrt(float((grad**2).sum())) + 1e-6)
    return grad * coefficient if coefficient < 1 else grad


def adamw(p: Tensor, grad: Tensor, state: dict[str, Any], lr: float, wd: float) -> Tensor:
    t = state["t"] = state.get("t", 0) + 1
    m = state["m"] = 0.9 * state.get("m", torch.zeros_like(p)) + 0.1 * grad
    v = state["v"] = 0.999 * state.get("v", torch.zeros_like(p)) + 0.001 * grad**2
    p = p - lr * wd * p
    return p - lr * (m / (1 - 0.9**t)) / (torch.sqrt(v / (1 - 0.999**t)) + 1e-8)


def sgd(p: Tensor, grad: Tensor, state: dict[str, Any], lr: float, wd: float) -> Tensor:
    state["mu"] = 0.9 * state.get("mu", torch.zeros_like(p)) + grad + wd * p
    return p - lr * state["mu"]


def lars(p: Tensor, grad: Tensor, state: dict[str, Any], lr: float, wd: float) -> Tensor:
    """Vectors are neither decayed nor adapted; the trust ratio is that of the decayed gradient."""
    update = grad
    if p.ndim != 1:
        update = grad + wd * p
        param_norm, update_norm = float(p.norm()), float(update.norm())
        update = update * (0.001 * param_norm / update_norm if param_norm > 0 and update_norm > 0 else 1.0)
    state["mu"] = 0.9 * state.get("mu", torch.zeros_like(p)) + update
    return p - lr * state["mu"]


# Tables


def cosine_table(a: Arguments, base: float, final: float, *, warmup_epochs: int = 0) -> NDArray[np.float64]:
    """A value per step: an even ramp from 0 with both ends, then half a cosine that stops one step short of `final`."""
    ramp = np.linspace(0, base, warmup_epochs * a.steps_per_epoch)
    num_rest = a.epochs * a.steps_per_epoch - len(ramp)
    rest = final + 0.5 * (base - final) * (1 + np.cos(np.pi * np.arange(num_rest) / num_rest))
    return np.concatenate([ramp, rest])


def temperature_table(a: Arguments) -> NDArray[np.float64]:
    """A value per epoch."""
    stairs = np.linspace(a.warmup_teacher_temp, a.teacher_temp, a.warmup_teacher_temp_epochs)
    return np.concatenate([stairs, np.full(a.epochs - len(stairs), a.teacher_temp)])
