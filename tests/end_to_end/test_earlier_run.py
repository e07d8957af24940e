"""A run that an earlier version has written is reported, evaluated and resumed.

earlier_run was written by `jobs.pretrain` before the modules stood in rooms; its pictures are left out.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from jobs_processes import losses
from tiny_run import write_images

from dinoray.pipeline.reporting.run_report import build_report
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.run_dir import committed_steps

EARLIER = Path(__file__).with_name("earlier_run")
LAST_STEP = 9
WAS_AT = b"/data/images"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The run and its images. The manifest names their folder, which was another one."""
    images = write_images(tmp_path / "images", "train", labels=("dots", "rings", "stripes"), per_label=8)
    run = shutil.copytree(EARLIER, tmp_path / EARLIER.name)
    table = pq.read_table(run / "manifest.parquet")
    metadata = {k: v.replace(WAS_AT, str(images).encode()) for k, v in table.schema.metadata.items()}
    pq.write_table(table.replace_schema_metadata(metadata), run / "manifest.parquet")
    return run


def test_it_is_reported(run: Path) -> None:
    page = build_report(Directory(str(run)))
    after = json.loads((run / "result.json").read_text())["after"]["knn_5"]
    assert f"to {after:.1%} after {LAST_STEP} steps" in page
    assert "cannot be read" not in page


@pytest.mark.ray
@pytest.mark.slow
def test_it_is_evaluated_and_resumed(
    run: Path, monkeypatch: pytest.MonkeyPatch, run_here: Callable[..., str]
) -> None:
    monkeypatch.chdir(run.parent)
    after = json.loads((run / "result.json").read_text())["after"]
    before = losses((run / "metrics.jsonl").read_bytes())
    run_here("jobs.evaluate", run.name, "--probes=knn")
    found = json.loads((run / f"evaluation_step_{LAST_STEP:08d}.json").read_text())
    assert found["knn_5"] == pytest.approx(after["knn_5"])

    arguments = [f"--config={run.name}/config.yaml", "--resume", "train.epochs=4"]
    output = run_here("jobs.pretrain", *arguments)
    assert f"resuming from step {LAST_STEP}" in output
    assert committed_steps(Directory(str(run)))[-1] == LAST_STEP + 3
    resumed = losses((run / "metrics.jsonl").read_bytes())
    assert resumed[:LAST_STEP] == before
    assert [step for step, _ in resumed[LAST_STEP:]] == [10, 11, 12]
