"""Pretraining on real photos helps: run where the photo set lies beside the checkout."""

import json
from pathlib import Path

import pytest
from jobs_processes import run_job
from paths import ROOT

PHOTOS = ROOT.parent / "shared" / "data" / "photos-small"

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(not PHOTOS.exists(), reason="the photo set is not here"),
]


def test_a_short_run_on_photos_beats_the_untrained_network(tmp_path: Path) -> None:
    run_job(
        "jobs.pretrain",
        "--recipe=photos_small",
        "name=photos",
        f"storage_path={tmp_path}",
        f"data.path={PHOTOS}/train",
        f"eval.val_path={PHOTOS}/val",
        # Half the recipe's depth, width and crop sizes: what matters shows in two minutes.
        "crops.global_crop_size=64",
        "crops.local_crop_size=32",
        "backbone.kwargs={embed_dim: 96, depth: 3, num_heads: 3}",
        "optim.base_lr=4e-3",
        "train.epochs=7",
        "resources.train_workers=2",
        "resources.augment_actors=1",
    )
    result = json.loads((tmp_path / "photos" / "result.json").read_text())
    assert result["after"]["knn_20"] > result["before"]["knn_20"] + 0.03
    assert result["after"]["knn_20"] > 3 * result["after"]["majority"]
