"""The README's first command, as it stands there: no argument, no data, no GPU."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from jobs_processes import run_job
from PIL import Image

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def check(output: str, run: Path) -> dict[str, Any]:
    """Check what the demo prints and draws; its result."""
    result = json.loads((run / "result.json").read_text())
    before, after = result["before"]["knn_20"], result["after"]["knn_20"]
    assert before > result["after"]["majority"]
    for shown in (
        f"{before:.1%}",
        f"{after:.1%}",
        f"{result['after']['majority']:.1%}",
        str(run / "crops.png"),
    ):
        assert shown in output
    assert re.search(r"step \d+/\d+  loss .* images/s  data wait .* ETA", output)
    assert re.search(r"local 1-6 +32 px +0.1 to 0.4 +0.5 +0.8 +0.2 +0.5 +0", output)  # crop probabilities
    assert (run / "crops.png").read_bytes().startswith(b"\x89PNG")
    (machine,) = json.loads((run / "environment.json").read_text())["hardware"]
    assert machine["CPUs"] == os.cpu_count()  # of which Ray was told more
    page = (run / "report.html").read_text()
    assert f"from {before:.1%} before training to {after:.1%} after {result['steps']} steps" in page
    return dict(result)


def test_the_first_epoch_of_the_demo_needs_nothing_but_the_machine(tmp_path: Path) -> None:
    output = run_job("jobs.pretrain", "train.epochs=1", cwd=tmp_path)
    assert check(output, tmp_path / "runs" / "demo")["steps"] == 33


@pytest.mark.nightly
def test_the_demo_learns_without_any_argument(tmp_path: Path) -> None:
    output = run_job("jobs.pretrain", cwd=tmp_path)
    run = tmp_path / "runs" / "demo"
    result = check(output, run)
    assert result["after"]["knn_20"] > result["before"]["knn_20"] + 0.1
    steps = [
        record["step"] for record in map(json.loads, (run / "metrics.jsonl").open()) if "majority" in record
    ]
    film = run_job("jobs.attention", str(run), "--animate", cwd=tmp_path)
    assert f"({len(steps)} evaluations, steps 0 to {result['steps']}:" in film
    gif = Image.open(run / "attention" / "attention.gif")
    assert gif.n_frames == len(steps) > len(list((run / "checkpoints").glob("step_*")))
