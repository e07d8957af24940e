"""The facts about an exported network as JSON values: model, training, scores, preprocessing, licence, versions.

readme_card.py turns them into the README.md of each export. No Ray here, and no writing to a run.
"""

import json
from typing import Any, NamedTuple

import timm
import torch

from dinoray.models.backbone import embed_dim
from dinoray.models.config import timm_name
from dinoray.models.errors import redact_credentials
from dinoray.pipeline.augment.config import CropsConfig
from dinoray.pipeline.export.timm_export import evaluation_size, timm_arguments
from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.files import Directory, MissingObject
from dinoray.pipeline.storage.run_dir import checkpoint_name
from dinoray.pipeline.tracking.records import read_records
from dinoray.pipeline.training.checkpoint import FrozenBackbone

CARD_FORMAT = 2
_SCORES = ("knn_", "majority", "linear", "rankme", "lidar", "cluster_learnability", "intrinsic_dim")
_NO_SCORES = ("linear_table",)


class RunFacts(NamedTuple):
    """Settings that a run's config.yaml holds and its checkpoints do not; None if the run is unknown."""

    name: str | None = None
    recipe: str | None = None
    data_path: str | None = None
    image_size: int | None = None
    """`eval.image_size`."""
    init_path: str | None = None
    init_load: str | None = None


def model_card(
    frozen: FrozenBackbone,
    meta: dict[str, Any],
    *,
    which: str,
    version: str,
    run: RunFacts,
    scores: dict[str, Any],
    license_id: str = "unknown",
) -> dict[str, Any]:
    """Return all facts that a user of an export needs, as plain JSON values.

    `meta` is the checkpoint's meta.json.
    """
    config, crops = frozen.config, frozen.config.crops
    size, backbone = evaluation_size(frozen, run.image_size), frozen.backbone()
    short = round(size * 256 / 224)
    return {
        "format": CARD_FORMAT,
        "run": run.name,
        "recipe": run.recipe,
        "network": which,
        "model": config.backbone.name,
        "create_model_kwargs": {"num_classes": 0, **timm_arguments(frozen)},
        "num_parameters": sum(p.numel() for p in backbone.parameters()),
        "embed_dim": embed_dim(backbone),
        "pos_embed": config.backbone.pos_embed if "pos_embed" in frozen.weights else None,
        "input": {
            "size": size,
            "shorter_side": short,
            "resize": f"shorter side to {short}, bicubic, antialiased; then the centre",
            "range": f"{_colours(crops)} in [0, 1], then (x - mean) / std",
            "mean": list(crops.pixel_mean),
            "std": list(crops.pixel_std),
        },
        "training": {
            "data": redact_credentials(run.data_path) if run.data_path else None,
            "num_images": meta["num_images"],
            "step": meta["step"],
            "total_steps": meta["total_steps"],
            "epochs": config.train.epochs,
            "initial_weights": _initial_weights(frozen, run),
            "config": config.model_dump(mode="json"),
        },
        "scores": scores,
        "license": license_id,
        "versions": {"dinoray": version, "torch": torch.__version__, "timm": timm.__version__},
    }


def _colours(crops: CropsConfig) -> str:
    return "RGB" if crops.channels == 3 else f"{crops.channels} channels"


def read_scores(run: Directory, step: int, which: str) -> dict[str, Any]:
    """Return the network's scores from the run directory.

    `during_training` holds the scores at `step`, or the last before it, with their step; only the teacher is
    evaluated during training. `evaluation` holds the measurements of `jobs.evaluate` at `step`. A key without
    scores is missing.
    """
    found = {"during_training": _logged_scores(run, step) if which == "teacher" else None}
    try:
        record = json.loads(run.read(run_dir.evaluation_name(checkpoint_name(step), which)))
        found["evaluation"] = {"step": step, **_scores_in(record)} if _scores_in(record) else None
    except (MissingObject, ValueError):
        pass
    return {kind: scores for kind, scores in found.items() if scores}


def _logged_scores(run: Directory, step: int) -> dict[str, Any] | None:
    found = None
    for record in read_records(run).lines:
        scores = _scores_in(record)
        if record["step"] <= step and any(k != "majority" for k in scores):
            found = {"step": record["step"], **scores}
    return found


def _scores_in(record: Any) -> dict[str, Any]:
    items = record.items() if isinstance(record, dict) else ()
    return {k: v for k, v in items if k.startswith(_SCORES) and k not in _NO_SCORES}


def _initial_weights(frozen: FrozenBackbone, run: RunFacts) -> dict[str, Any] | None:
    """Return the source of the networks' initial weights; None if the run is unknown."""
    backbone = frozen.config.backbone
    name = backbone.name if backbone.pretrained else timm_name(run.init_path)
    if run.init_path is not None and name is None:
        return {"path": redact_credentials(run.init_path), "load": run.init_load}
    if name is not None:
        published = timm.get_pretrained_cfg(name)
        return {
            "timm": getattr(published, "hf_hub_id", None) or name,
            "license": getattr(published, "license", None),
        }
    return {"random": True, "seed": frozen.config.train.seed} if run.name is not None else None
