"""DINO(nn.Module): student, teacher and centre; the multi-crop forward; the only EMA.

Layers below: backbone, head. The loss is a set of pure functions in loss.py. The training step in
pipeline/training/step.py combines them.
"""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dinoray.models.backbone import build_backbone, embed_dim, has_batch_norm
from dinoray.models.config import BackboneConfig, HeadConfig
from dinoray.models.head import DINOHead
from dinoray.models.partial import freeze, share, shared_names
from dinoray.models.settings import number


class Output(NamedTuple):
    """Output for n crops: logits [n, K] float32 and the backbone's features [n, D]."""

    logits: Tensor
    features: Tensor


class MultiCropNet(nn.Module):
    """Backbone and head applied to crops of several sizes."""

    backbone_is_frozen = False
    """True: the backbone is in eval mode and its forward keeps nothing for a backward pass."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, crops: list[Tensor]) -> Output:
        """Map [N_i, 3, H_i, W_i] per size to logits [sum N_i, K] and features [sum N_i, D], in that order.

        One backbone forward per resolution: neighbouring groups of one size share it, and its batch-norm
        statistics, as published. One head forward for all crops.
        """
        groups: list[list[Tensor]] = []
        for x in crops:
            if groups and groups[-1][0].shape[1:] == x.shape[1:]:
                groups[-1].append(x)
            else:
                groups.append([x])
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.backbone_is_frozen):
            features = torch.cat([self.backbone(torch.cat(g) if len(g) > 1 else g[0]) for g in groups])
        return Output(self.head(features), features)

    def train(self, mode: bool = True) -> "MultiCropNet":
        """Set the network to `mode`, and a frozen backbone to eval mode: no draws, no new batch statistics."""
        super().train(mode)
        self.backbone.train(mode and not self.backbone_is_frozen)
        return self


class DINO(nn.Module):
    """Student, teacher and centre. The two networks are bit-identical at the start.

    With `backbone.train` other than all, the frozen part of the backbones is one in memory. `shared` has its names in
    the networks' state dicts.

    `center` [K] float32 is a buffer here and outside of `student`, so wrapping the student in DDP never
    broadcasts it.
    """

    center: Tensor
    _frozen: list[nn.Parameter]
    """Of the student's backbone, frozen for now."""

    def __init__(
        self,
        backbone: BackboneConfig,
        head: HeadConfig,
        *,
        crop_sizes: tuple[int, ...],
        pretrained: bool = False,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        build = partial(_network, backbone, head, crop_sizes, in_chans=in_chans)
        self.student = build(drop_path_rate=backbone.drop_path_rate, pretrained=pretrained)
        self.teacher = build(drop_path_rate=0.0, pretrained=False)
        for network in (self.student, self.teacher):
            freeze(network.backbone, backbone, crop_size=min(crop_sizes))
        self.shared = frozenset(f"backbone.{name}" for name in shared_names(self.student.backbone))
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        share(self.student, self.teacher, self.shared)
        self.register_buffer("center", torch.zeros(number(head.out_dim)))
        self._frozen = []
        self.train()

    def train(self, mode: bool = True) -> "DINO":
        """Set the student to `mode`.

        The teacher is in eval mode, unless it has batch norm: then it uses `mode`.
        """
        super().train(mode)
        self.teacher.train(mode and has_batch_norm(self.teacher))
        return self

    def freeze_backbone(self) -> None:
        """Let only the heads learn, until `thaw_backbone`: no bit of either backbone changes, its buffers included."""
        self._frozen = [p for p in self.student.backbone.parameters() if p.requires_grad]
        self._set_frozen(True)

    def thaw_backbone(self) -> None:
        """Let the backbone learn again: what learnt before it was frozen."""
        self._set_frozen(False)
        self._frozen = []

    def _set_frozen(self, is_frozen: bool) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(not is_frozen)
        self.student.backbone_is_frozen = self.teacher.backbone_is_frozen = is_frozen
        self.train(self.training)

    @torch.no_grad()
    def teacher_output(self, global_crops: Tensor) -> Output:
        """Map global crops [G*B, 3, H, W] to logits [G*B, K] and features.

        The teacher gets no local crops.
        """
        return self.teacher([global_crops])

    @torch.no_grad()
    def update_teacher(self, momentum: float, is_finite: Tensor) -> None:
        """Set teacher <- momentum * teacher + (1 - momentum) * student, over parameters not shared, in float32.

        Only if `is_finite`, a 0-d bool on the device which the host does not read. A frozen backbone is left out.
        """
        learn = (net.head if net.backbone_is_frozen else net for net in (self.teacher, self.student))
        pairs = zip(*(net.parameters() for net in learn), strict=True)
        apart = [(own, theirs) for own, theirs in pairs if own is not theirs]
        teacher: list[Tensor] = [own for own, _ in apart]
        student: list[Tensor] = [theirs for _, theirs in apart]
        # Selected, not weighted with 0: a student with NaN would make the teacher NaN.
        for new, old in zip(
            torch._foreach_lerp(teacher, student, weight=1.0 - momentum), teacher, strict=True
        ):
            torch.where(is_finite, new, old, out=old)

    def student_state(self) -> dict[str, Tensor]:
        """Return the student's state dict without the part that is in the teacher's too."""
        return {name: x for name, x in self.student.state_dict().items() if name not in self.shared}

    def load_states(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> None:
        """Load a `student_state` and a teacher's state dict strictly. Raises as `load_state_dict`."""
        self.teacher.load_state_dict(teacher)
        self.student.load_state_dict({**{name: teacher[name] for name in self.shared}, **student})


def crop_major(crops: Tensor) -> Tensor:
    """Convert [B, V, H, W, C] (rows per image) to [V*B, C, H, W] (rows per crop), the layout of the loss."""
    return crops.permute(1, 0, 4, 2, 3).flatten(0, 1)


def _network(
    backbone: BackboneConfig,
    head: HeadConfig,
    crop_sizes: tuple[int, ...],
    *,
    drop_path_rate: float,
    pretrained: bool,
    in_chans: int,
) -> MultiCropNet:
    body = build_backbone(
        backbone,
        crop_sizes=crop_sizes,
        drop_path_rate=drop_path_rate,
        pretrained=pretrained,
        in_chans=in_chans,
    )
    return MultiCropNet(body, DINOHead(head, in_dim=embed_dim(body)))
