"""Networks, files and loading as the published DINO code has them, from its paper and its files' names.

Nothing of models/ or pipeline/ stands below: an exported file that loads here is one that others can load.
"""

import argparse
import io
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

ARGS: dict[str, Any] = {"arch": "vit_own", "patch_size": 4, "out_dim": 32, "norm_last_layer": True}


class PatchEmbed(nn.Module):
    def __init__(self, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) * (dim // self.num_heads) ** -0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, dim))


class MLP(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """The published ViT at any size: position embeddings resized by the factor (n + 0.1) / native."""

    def __init__(
        self, *, size: int = 16, patch: int = 4, dim: int = 32, depth: int = 2, num_heads: int = 2
    ) -> None:
        super().__init__()
        self.patch = patch
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (size // patch) ** 2, dim))
        self.patch_embed = PatchEmbed(dim, patch)
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def positions(self, height: int, width: int) -> Tensor:
        native = int((self.pos_embed.shape[1] - 1) ** 0.5)
        if height == width == native:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].reshape(1, native, native, -1).permute(0, 3, 1, 2)
        scale = ((height + 0.1) / native, (width + 0.1) / native)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = (n // self.patch for n in x.shape[-2:])
        tokens = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], dim=1) + self.positions(height, width)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]


class Head(nn.Module):
    """The published head, weight-normed by torch's old `weight_norm`, as then."""

    def __init__(
        self, dim: int, *, out_dim: int = 32, hidden: int = 48, bottleneck: int = 16, num_layers: int = 3,
        use_bn: bool = False, norm_last_layer: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        if num_layers == 1:
            self.mlp: nn.Module = nn.Linear(dim, bottleneck)
        else:
            layers: list[nn.Module] = [nn.Linear(dim, hidden)]
            for i in range(1, num_layers):
                layers += [nn.BatchNorm1d(hidden)] if use_bn else []
                layers += [nn.GELU(), nn.Linear(hidden, hidden if i < num_layers - 1 else bottleneck)]
            self.mlp = nn.Sequential(*layers)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # there is a new one, with other names
            self.last_layer = nn.utils.weight_norm(nn.Linear(bottleneck, out_dim, bias=False))
        if norm_last_layer:
            self.last_layer.weight_g.data.fill_(1)
            self.last_layer.weight_g.requires_grad = False

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class MultiCropWrapper(nn.Module):
    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


class Wrapped(nn.Module):
    """Stands for DDP: its state dict says `module.` first."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class Loss(nn.Module):
    def __init__(self, out_dim: int) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(1, out_dim))


def cosine_scheduler(base: float, final: float, steps: int) -> NDArray[np.float64]:
    """One value per step, from `base` to `final` along half a cosine."""
    return final + 0.5 * (base - final) * (1 + np.cos(np.pi * np.arange(steps) / steps))


class Run:
    """What main_dino.py has in memory: networks, loss, optimiser. The two networks differ, as after some steps."""

    def __init__(self, *, backbone: Any = ViT, size: int = 16, optimizer: str = "adamw", **head: Any) -> None:
        self.size = size

        def network() -> MultiCropWrapper:
            body = backbone()
            dim = body(torch.zeros(2, 3, size, size)).shape[1]
            return MultiCropWrapper(body, Head(dim, **head))

        student, teacher = network(), network()
        self.has_batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in student.modules())
        self.student: Wrapped = Wrapped(student)
        self.teacher: nn.Module = Wrapped(teacher) if self.has_batch_norm else teacher
        self.loss = Loss(student.head.last_layer.weight_g.shape[0])
        self.optimizer = published_optimizer(optimizer, self.student)

    @property
    def networks(self) -> tuple[nn.Module, nn.Module]:
        """Student and teacher without their wrappers."""
        return self.student.module, self.teacher.module if self.has_batch_norm else self.teacher

    def train(self, steps: int = 2) -> "Run":
        """Steps of an arbitrary loss under the published schedules, which are numpy arrays.

        Their values, numpy scalars, go into the optimizer's groups, and from there into every file.
        """
        lr_schedule = cosine_scheduler(0.01, 1e-4, steps)
        wd_schedule = cosine_scheduler(0.04, 0.4, steps)
        for it in range(steps):
            for i, group in enumerate(self.optimizer.param_groups):
                group["lr"] = lr_schedule[it]
                if i == 0:  # only the first group is decayed
                    group["weight_decay"] = wd_schedule[it]
            self.optimizer.zero_grad()
            self.student.module(torch.randn(4, 3, self.size, self.size)).square().mean().backward()
            self.optimizer.step()
        self.loss.center.normal_()
        return self

    def state(self, args: Mapping[str, Any] = ARGS) -> dict[str, Any]:
        """As main_dino.py saves it after epoch 6."""
        return {
            "student": self.student.state_dict(),
            "teacher": self.teacher.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": 7,
            "args": argparse.Namespace(**args),
            "fp16_scaler": {"scale": 65536.0, "growth_tracker": 3},
            "dino_loss": self.loss.state_dict(),
        }

    def restart(self, data: bytes) -> int:
        """As utils.restart_from_checkpoint does: each part by load_state_dict, not strictly. Returns the epoch.

        What the published code would only print is asserted: nothing may be missing or too much.
        """
        state = torch.load(io.BytesIO(data), map_location="cpu")
        for part in (self.student, self.teacher, self.loss):
            key = {self.student: "student", self.teacher: "teacher", self.loss: "dino_loss"}[part]
            answer = part.load_state_dict(state[key], strict=False)
            assert (answer.missing_keys, answer.unexpected_keys) == ([], []), key
        self.optimizer.load_state_dict(state["optimizer"])
        return state["epoch"]


def load_pretrained_weights(model: nn.Module, data: bytes) -> None:
    """As the evaluation scripts do: the teacher's names without `module.` and `backbone.`, not strictly."""
    state = torch.load(io.BytesIO(data), map_location="cpu")["teacher"]
    state = {k.replace("module.", "").replace("backbone.", ""): v for k, v in state.items()}
    answer = model.load_state_dict(state, strict=False)
    assert answer.missing_keys == []


def published_optimizer(name: str, student: nn.Module) -> torch.optim.Optimizer:
    """Two groups: decayed, and biases with 1-D parameters."""
    decayed, plain = [], []
    for key, p in student.named_parameters():
        if p.requires_grad:
            (plain if key.endswith(".bias") or p.ndim == 1 else decayed).append(p)
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    if name == "adamw":
        return torch.optim.AdamW(groups)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0.01, momentum=0.9)
    return LARS(groups)


class LARS(torch.optim.Optimizer):
    """The published LARS as far as files know it: its groups' settings and its state `mu`."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        settings = {"lr": 0.01, "weight_decay": 0.0, "momentum": 0.9, "eta": 0.001}
        super().__init__(groups, settings | {"weight_decay_filter": None, "lars_adaptation_filter": None})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad
                if p.ndim != 1:
                    update = update + group["weight_decay"] * p
                    update = update * group["eta"] * p.norm() / update.norm()
                mu = self.state[p].setdefault("mu", torch.zeros_like(p))
                mu.mul_(group["momentum"]).add_(update)
                p.add_(mu, alpha=-group["lr"])


def saved(state: Any, *, legacy: bool = False) -> bytes:
    """The bytes of a file as torch.save writes it; `legacy` is how it did when the published files were made."""
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()
