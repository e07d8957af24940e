"""A checkpoint for others: a backbone's file for timm or torch, a whole checkpoint for the published code, a card.

Stands after checkpoint.py. What is written is loaded back as its user will load it, and compared, before anybody
gets it. ONNX is onnx_export.py's. No Ray here, and no writing to a run.
"""

import io
import json
import re
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save

from models.backbone import embed_dim
from models.interop import MARK, to_official
from models.settings import ConfigError, DinorayError, number, one_line
from pipeline.algorithm import DINOConfig
from pipeline.checkpoint import Frozen, load_checkpoint, read_meta
from pipeline.storage import Directory, MissingObject
from pipeline.training import build_state

CARD_FORMAT = 1
_OFFICIAL_NAMES = re.compile(
    r"cls_token|pos_embed|(patch_embed\.proj|norm|blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12]))\.(weight|bias)"
    r"|(conv1|bn1|layer[1-4]\.\d+\.(conv[123]|bn[123]|downsample\.[01]))"
    r"\.(weight|bias|running_mean|running_var|num_batches_tracked)"
)


def timm_arguments(frozen: Frozen) -> dict[str, Any]:
    """Keyword arguments with which `timm.create_model(name, num_classes=0, ...)` builds this backbone."""
    config, size = frozen.config.backbone, frozen.config.crops.global_crop_size
    for extra in ({"img_size": size, "dynamic_img_size": True}, {"img_size": size}, {}):
        arguments = {**extra, **config.kwargs}
        try:
            timm.create_model(config.name, pretrained=False, num_classes=0, **arguments)
        except TypeError:  # this family has no such argument
            continue
        return arguments
    raise DinorayError(
        f"{config.name} cannot be built by timm {timm.__version__} as it was; export it with another"
    )


def export_timm(frozen: Frozen) -> bytes:
    """The backbone as safetensors under timm's names, known to load strictly and to compute the same, to the bit."""
    weights = {k: v.contiguous() for k, v in frozen.weights.items()}
    data = save(weights, metadata={"format": "pt", MARK: frozen.config.backbone.pos_embed})
    arguments = timm_arguments(frozen)
    name, size = frozen.config.backbone.name, frozen.config.crops.global_crop_size
    if frozen.config.backbone.pos_embed == "official":
        size = arguments.get("img_size", size)  # timm resizes otherwise: the same is only what is not resized
    with tempfile.TemporaryDirectory(prefix="dinoray-export-") as scratch:
        path = Path(scratch) / "backbone.safetensors"
        path.write_bytes(data)
        try:
            model = timm.create_model(name, checkpoint_path=str(path), num_classes=0, **arguments).eval()
        except Exception as error:  # whatever timm makes of it
            reason = one_line(error)
            raise DinorayError(
                f"timm does not load the backbone that was to be exported: {reason}"
            ) from error
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = frozen.backbone()(images), model(images)
    if not torch.equal(ours, theirs):
        raise DinorayError(
            f"timm's {name} computes other features from these weights, by up to "
            f"{float((ours - theirs).abs().max()):.1e}; nothing is written"
        )
    return data


def export_state_dict(frozen: Frozen) -> bytes:
    """The backbone's state dict as `torch.save` writes it; loads with weights_only=True."""
    state = OrderedDict((k, v.contiguous()) for k, v in frozen.weights.items())
    # Where torch keeps versions there is room to say how position embeddings are resized (models/interop.py).
    state._metadata = {"": {"version": 1, MARK: frozen.config.backbone.pos_embed}}  # type: ignore[attr-defined]
    return _saved(state)


def export_official(folder: Path) -> bytes:
    """The checkpoint in the local `folder`, whole, as the published code saves and resumes it.

    ConfigError for a backbone that the published code lacks: it knows plain ViTs and torchvision's ResNets.
    """
    meta = read_meta(folder)
    config = DINOConfig.model_validate(meta["config"])
    state = build_state(config, num_images=meta["num_images"])
    load_checkpoint(state, folder)
    strange = [k for k in state.dino.student.backbone.state_dict() if not _OFFICIAL_NAMES.fullmatch(k)]
    if strange:  # the published code would leave them out without a word
        raise ConfigError(
            f"--format official: the published code has no network with {strange[0]}, which {config.backbone.name} "
            "has; take --format timm"
        )
    epoch = round(state.step / state.schedule.steps(1))  # the published code resumes at whole epochs
    return _saved(to_official(state.dino, state.optimizer, epoch=epoch, args=official_args(config)))


def official_args(config: DINOConfig) -> dict[str, Any]:
    """The settings under the names of the published code's parser, for as much as it knows of them.

    `arch` is timm's name where the published code has none for the backbone.
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
        MARK: c.backbone.pos_embed,
    }


def knn_scores(run: Directory, step: int) -> dict[str, Any] | None:
    """The run's k-NN scores at `step`, or the last before it, with the step they are of; None when there are none."""
    try:
        lines = run.read("metrics.jsonl").decode(errors="replace").splitlines()
    except MissingObject:
        return None
    found = None
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # cut off by a kill
            continue
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            continue
        scores = {k: v for k, v in record.items() if k.startswith("knn_") or k == "majority"}
        if record["step"] <= step and any(k.startswith("knn_") for k in scores):
            found = {"step": record["step"], **scores}
    return found


def model_card(
    frozen: Frozen,
    meta: dict[str, Any],
    *,
    which: str,
    version: str,
    data_path: str | None,
    knn: dict[str, Any] | None,
) -> dict[str, Any]:
    """What somebody who has nothing but the file must know, as plain JSON values. `meta` is the checkpoint's."""
    config, crops = frozen.config, frozen.config.crops
    size = crops.global_crop_size
    return {
        "format": CARD_FORMAT,
        "network": which,
        "model": config.backbone.name,
        "create_model_kwargs": {"num_classes": 0, **timm_arguments(frozen)},
        "embed_dim": embed_dim(frozen.backbone()),
        "pos_embed": config.backbone.pos_embed,
        "input": {
            "size": size,
            "resize": f"shorter side to {round(size * 256 / 224)}, bicubic, antialiased; then the centre",
            "range": "RGB in [0, 1], then (x - mean) / std",
            "mean": list(crops.pixel_mean),
            "std": list(crops.pixel_std),
        },
        "training": {
            "data": data_path,
            "num_images": meta["num_images"],
            "step": meta["step"],
            "total_steps": meta["total_steps"],
            "epochs": config.train.epochs,
            "config": config.model_dump(mode="json"),
        },
        "knn": knn,
        "versions": {"dinoray": version, "torch": torch.__version__, "timm": timm.__version__},
    }


def _official_arch(config: DINOConfig) -> tuple[str, int]:
    """The published code's name of the backbone and its patch size; timm's name where it has none."""
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
