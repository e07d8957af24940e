"""Settings of networks, loss and optimiser. No torch here, since commands without training read them too."""

import re
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from dinoray.models.settings import Auto, Settings

Checkpointing = Literal["none", "selective", "full"]
"""Which blocks compute their activations again in the backward pass: none, every second, or all."""

Compile = Literal["auto", "on", "off"]
"""Whether blocks are compiled by torch.compile; auto: on a GPU, where PyTorch can."""

_PART = re.compile(r"(last_n|lora)\(([1-9]\d{0,4})\)")


class TrainedPart(NamedTuple):
    """The part of the backbone that trains, as `backbone.train` names it."""

    kind: Literal["all", "last_n", "lora"] = "all"
    number: int = 0
    """Blocks of last_n, rank of lora."""

    @classmethod
    def parse(cls, text: str) -> "TrainedPart":
        """Read `all`, `last_n(4)` or `lora(8)`. Raises ValueError for any other text."""
        if text == "all":
            return cls()
        found = _PART.fullmatch(text)
        if found is None:
            raise ValueError(
                f"backbone.train={text} must be all, last_n(BLOCKS) or lora(RANK), a whole number from 1 on; "
                "set backbone.train=last_n(1), in quotes for a shell"
            )
        return cls("lora" if found[1] == "lora" else "last_n", int(found[2]))


_DECIDED_ELSEWHERE = {
    "drop_path_rate": "set backbone.drop_path_rate instead",
    "pretrained": "set backbone.pretrained instead",
    "num_classes": "the backbone has no classifier",
    "in_chans": "set data.channels instead",
    "features_only": "the head takes one vector per image",
    "checkpoint_path": "set init.from instead",
}


TIMM = "timm:"
"""Prefix of a start from weights that timm publishes; the model's name follows, with or without a tag."""


def timm_name(start: str | None) -> str | None:
    """Return NAME of `init.from=timm:NAME`; None for another start."""
    return start.removeprefix(TIMM) if start is not None and start.startswith(TIMM) else None


class BackboneConfig(Settings):
    """Network of student and teacher, from timm."""

    name: str = "vit_small_patch16_224"
    """Any name that `timm.list_models()` knows, with or without a tag of its weights (`.lvd142m`)."""
    pretrained: bool = False
    """As init.from=timm:NAME with NAME of backbone.name, but each node downloads the weights."""
    pos_embed: Literal["timm", "official"] = "timm"
    """Resizing of position embeddings in ViTs: as timm does (antialiased), or as the published DINO code does."""
    drop_path_rate: float = Field(default=0.1, ge=0, lt=1)
    """Stochastic depth of the student, linear from 0 to this rate over the blocks; the teacher has none."""
    train: str = "all"
    """Part that trains: all, last_n(k) its last k blocks, or lora(r) adapters of rank r; the rest stays as it is."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further arguments for `timm.create_model`, e.g. `{patch_size: 8}`."""

    @property
    def trained_part(self) -> TrainedPart:
        """The part that trains."""
        return TrainedPart.parse(self.train)

    @field_validator("train")
    @classmethod
    def _names_a_part(cls, train: str) -> str:
        TrainedPart.parse(train)
        return train

    @field_validator("kwargs")
    @classmethod
    def _are_not_decided_elsewhere(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        for name, where in _DECIDED_ELSEWHERE.items():
            if name in kwargs:
                raise ValueError(f"backbone.kwargs must not hold {name}: {where}; leave out {name}")
        return kwargs


def argument_hint(name: str, value: str) -> str:
    """Return `; ` and the setting for an argument of `timm.create_model` that is no key of the config."""
    if name in _DECIDED_ELSEWHERE:
        return f"; leave out {name}: {_DECIDED_ELSEWHERE[name]}"
    return f"; arguments of the network stand in backbone.kwargs: set backbone.kwargs.{name}={value}"


class HeadConfig(Settings):
    """Projection head of student and teacher."""

    out_dim: Annotated[int, Field(ge=2)] | Auto = 65536
    """K, the number of prototypes; auto: by the number of images."""
    hidden_dim: int = Field(default=2048, ge=1)
    """Width of the MLP's hidden layers."""
    bottleneck_dim: int = Field(default=256, ge=1)
    """Width of the L2-normalised bottleneck."""
    num_layers: int = Field(default=3, ge=1)
    """Linear layers up to and including the bottleneck; the prototype layer is not counted."""
    use_bn: bool = False
    """Batch norm between the MLP's layers, over the batches of all workers."""
    norm_last_layer: bool = True
    """Fix the norm of each prototype to 1, which is more stable; false trains the norms too."""


class LossConfig(Settings):
    """Temperatures and centring of the loss."""

    student_temp: float = Field(default=0.1, gt=0)
    """Temperature of the student's softmax."""
    teacher_temp: Annotated[float, Field(gt=0)] | Auto = 0.04
    """Temperature of the teacher's softmax after warm-up; above 0.07 runs become unstable; auto: by images."""
    warmup_teacher_temp: float = Field(default=0.04, gt=0)
    """Teacher temperature at the start."""
    warmup_teacher_temp_epochs: int = Field(default=0, ge=0)
    """Epochs from `warmup_teacher_temp` to `teacher_temp`, in one linear step per epoch; 0: no warm-up."""
    center_momentum: float = Field(default=0.9, ge=0, lt=1)
    """EMA coefficient of the centre; runs with 0.999 and above are known to collapse."""
    centering: Literal["center", "sinkhorn_knopp", "none"] = "center"
    """Method against collapse: center (moving average), sinkhorn_knopp, or none, which collapses."""
    koleo_weight: float = Field(default=0.0, ge=0)
    """Weight of KoLeo, which spreads the features of each global crop over the batch; DINOv2 has 0.1."""

    @model_validator(mode="after")
    def _warmup_rises(self) -> "LossConfig":
        if self.teacher_temp == "auto":
            return self
        if self.warmup_teacher_temp_epochs and self.warmup_teacher_temp > self.teacher_temp:
            raise ValueError(
                f"warmup_teacher_temp={self.warmup_teacher_temp} must not exceed teacher_temp={self.teacher_temp}; "
                f"set loss.warmup_teacher_temp={self.teacher_temp} or lower"
            )
        return self

    @model_validator(mode="after")
    def _center_has_a_momentum(self) -> "LossConfig":
        if self.centering != "center" and self.center_momentum != 0.9:
            raise ValueError(
                f"center_momentum={self.center_momentum} has no effect with centering={self.centering}: there is no "
                "centre; set loss.centering=center, or leave out center_momentum"
            )
        return self


class TeacherConfig(Settings):
    """Teacher: moving average of the student."""

    teacher_momentum: Annotated[float, Field(ge=0, le=1)] | Auto = 0.996
    """EMA coefficient at the first step; auto: by the number of images, the batch and the steps."""
    final_teacher_momentum: float = Field(default=1.0, ge=0, le=1)
    """EMA coefficient at the last step; it follows a cosine from the first."""


class OptimConfig(Settings):
    """Optimiser, learning rate and weight decay."""

    name: Literal["adamw", "sgd", "lars"] = "adamw"
    """Optimiser: adamw for ViTs, sgd or lars for ResNets."""
    base_lr: float = Field(default=5e-4, gt=0)
    """Peak learning rate at a global batch of 256; scaled linearly with the global batch."""
    min_lr: float = Field(default=1e-6, ge=0)
    """Learning rate at the last step; not scaled with the batch."""
    warmup_epochs: float = Field(default=10, ge=0)
    """Epochs of linear warm-up from 0."""
    weight_decay: float = Field(default=0.04, ge=0)
    """Weight decay at the first step; biases and 1-D parameters have none."""
    final_weight_decay: float = Field(default=0.4, ge=0)
    """Weight decay at the last step; it follows a cosine from the first."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of SGD and LARS."""
    clip_grad: float = Field(default=3.0, ge=0)
    """Maximum L2 norm of the gradient of each parameter tensor; 0: no clipping."""
    freeze_last_layer_epochs: float = Field(default=1, ge=0)
    """Epochs at the start without updates of the prototype layer."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Learning rate of each backbone block, as a factor of the next block's; 1: the same for all."""
    patch_embed_lr_scale: float = Field(default=1.0, gt=0, le=1)
    """Learning rate of the layer that takes the image, as a further factor; DINOv2 and DINOv3 have 0.2."""
