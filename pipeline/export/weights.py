"""A checkpoint in `torch.save` format: a backbone's state dict, or a full checkpoint for the published code.

This module stands after training/checkpoint.py. timm_export.py and onnx_export.py write the other formats,
model_card.py describes all of them. No Ray here, and no writing to a run.
"""

import io
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from dinoray.models.errors import ConfigError
from dinoray.models.lora import merged
from dinoray.models.published.checkpoint import POS_EMBED_KEY, to_official
from dinoray.models.settings import number
from dinoray.pipeline.training.checkpoint import FrozenBackbone, load_checkpoint, read_meta
from dinoray.pipeline.training.config import DINOConfig
from dinoray.pipeline.training.state import TrainState, build_state

_OFFICIAL_NAMES = re.compile(
    r"cls_token|pos_embed|(patch_embed\.proj|norm|blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12]))\.(weight|bias)"
    r"|(conv1|bn1|layer[1-4]\.\d+\.(conv[123]|bn[123]|downsample\.[01]))"
    r"\.(weight|bias|running_mean|running_var|num_batches_tracked)"
)


def export_state_dict(frozen: FrozenBackbone) -> bytes:
    """Return the backbone's state dict in `torch.save` format; it loads with weights_only=True."""
    state = OrderedDict((k, v.contiguous()) for k, v in frozen.weights.items())
    # torch's slot for versions has room for the resizing rule of position embeddings.
    state._metadata = {"": {"version": 1, POS_EMBED_KEY: frozen.config.backbone.pos_embed}}  # type: ignore[attr-defined]
    return _saved(state)


def export_official(folder: Path, *, address: str | None = None) -> bytes:
    """Return the whole checkpoint in the local `folder` in the format of the published code, which resumes
    it.

    `address`: of the checkpoint, if `folder` is a copy of it. After partial training it has no moments of what did not
    train, and adapters are merged.

    Raises ConfigError for a backbone that the published code lacks: it supports plain ViTs and torchvision's
    ResNets.
    """
    meta = read_meta(folder, address=address)
    config = DINOConfig.model_validate(meta["config"])
    state = build_state(config, num_images=meta["num_images"], resumed=True)
    load_checkpoint(state, folder, address=address)
    if config.backbone.train != "all":
        state = _trained_in_full(state, num_images=meta["num_images"])
    state.dino.thaw_backbone()  # the published optimiser has a place for each parameter that learns some time
    strange = [k for k in state.dino.student.backbone.state_dict() if not _OFFICIAL_NAMES.fullmatch(k)]
    if strange:  # the published code would silently leave them out
        raise ConfigError(
            f"--format official: the published code has no network with {strange[0]}, which {config.backbone.name} "
            "has; take --format timm"
        )
    epoch = round(state.step / state.schedule.steps(1))  # the published code resumes at whole epochs
    return _saved(to_official(state.dino, state.optimizer, epoch=epoch, args=official_args(config)))


def _trained_in_full(state: TrainState, *, num_images: int) -> TrainState:
    """Return a state of the same step, weights and moments in which the whole backbone trains."""
    backbone = state.config.backbone.model_copy(update={"train": "all"})
    config = state.config.model_copy(update={"backbone": backbone})
    whole = build_state(config, num_images=num_images, resumed=True)
    whole.dino.load_states(merged(state.dino.student.state_dict()), merged(state.dino.teacher.state_dict()))
    whole.dino.center.copy_(state.dino.center)
    whole.step = state.step
    theirs = dict(whole.dino.student.named_parameters())
    for name, parameter in state.dino.student.named_parameters():
        if name in theirs and parameter in state.optimizer.state:
            whole.optimizer.state[theirs[name]] = state.optimizer.state[parameter]
    return whole


def official_args(config: DINOConfig) -> dict[str, Any]:
    """Return the settings under the names of the published code's parser, as far as it has such settings.

    `arch` is timm's name if the published code has no name for the backbone.
    """
    c = config
    arch, patch_size = _official_arch(config)
    epochs = c.train.epochs
    return {
        "arch": arch,
        "patch_size": patch_size,
        "out_dim": number(c.head.out_dim),
        "norm_last_layer": c.head.norm_last_layer,
        "use_bn_in_head": c.head.use_bn,
        "momentum_teacher": number(c.teacher.teacher_momentum),
        "warmup_teacher_temp": c.loss.warmup_teacher_temp,
        "teacher_temp": number(c.loss.teacher_temp),
        "warmup_teacher_temp_epochs": c.loss.warmup_teacher_temp_epochs,
        "use_fp16": False,
        "weight_decay": c.optim.weight_decay,
        "weight_decay_end": c.optim.final_weight_decay,
        "clip_grad": c.optim.clip_grad,
        "batch_size_per_gpu": c.train.global_batch_size,
        "epochs": int(epochs) if epochs == int(epochs) else epochs,
        "freeze_last_layer": round(c.optim.freeze_last_layer_epochs),
        "lr": c.optim.base_lr,
        "warmup_epochs": round(c.optim.warmup_epochs),
        "min_lr": c.optim.min_lr,
        "optimizer": c.optim.name,
        "drop_path_rate": c.backbone.drop_path_rate,
        "global_crops_scale": tuple(c.crops.global_crop_scale),
        "local_crops_number": c.crops.num_local_crops,
        "local_crops_scale": tuple(c.crops.local_crop_scale),
        "seed": c.train.seed,
        POS_EMBED_KEY: c.backbone.pos_embed,
    }


def _official_arch(config: DINOConfig) -> tuple[str, int]:
    """Return the published code's name of the backbone and its patch size; timm's name if it has none."""
    name, kwargs = config.backbone.name, config.backbone.kwargs
    found = re.match(r"(vit_(?:tiny|small|base))_patch(\d+)_224", name)
    if found is None:
        return name.split(".")[0], 16
    patch_size = int(kwargs.get("patch_size") or found[2])
    is_its_own = kwargs.keys() & {"embed_dim", "depth", "num_heads", "mlp_ratio", "reg_tokens"}
    return name.split(".")[0] if is_its_own else found[1], patch_size


def _saved(state: Any) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()
