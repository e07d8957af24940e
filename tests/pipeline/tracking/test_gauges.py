"""What Prometheus finds of a run at a Ray node, and what the dashboard for Grafana asks it for."""

import contextlib
import json
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from paths import ROOT
from ray_head import ray_head

from dinoray.pipeline.tracking.prometheus import GAUGES, PREFIX

DASHBOARD = json.loads((ROOT / "deploy" / "grafana.json").read_text())
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]

PROGRAM = """
import math, ray, sys
ray.init(address=sys.argv[1], log_to_driver=False)

@ray.remote(num_cpus=0)
class Worker:
    def __init__(self):
        from dinoray.pipeline.tracking.prometheus import Gauges
        self.gauges = Gauges("plants/0003", total_steps=810)

    def log(self, step, values):
        self.gauges.log(step, values)

    def set_start(self, scores):
        self.gauges.set_start(scores)

worker = Worker.remote()
ray.get(worker.set_start.remote({"step": 0, "knn_10": 0.3, "knn_20": 0.125}))
ray.get(worker.log.remote(10, {"loss": math.nan, "images_per_second": 1.0}))
ray.get(worker.log.remote(20, {"loss": 5.5, "images_per_second": 288.5, "verdict": "healthy", "lr": 0.1}))
ray.get(worker.log.remote(10, {"knn_20": 0.25}))  # an evaluation that arrives after later steps
sys.stdin.readline()
"""


@pytest.mark.ray
def test_prometheus_finds_the_newest_values_at_the_node() -> None:
    with ray_head() as head:  # at Ray's own interval: some go missing at half a second
        program = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, head.gcs],
            env=head.env | {"PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            stdin=subprocess.PIPE,
        )
        try:
            deadline = time.monotonic() + 120
            values: dict[str, float] = {}
            while values.get("ray_dinoray_knn_20") != 0.25:
                assert program.poll() is None, "the program ended"
                assert time.monotonic() < deadline, values
                time.sleep(0.2)
                values = scrape(head.temp_dir, run="plants/0003")
        finally:
            program.kill()
            program.wait()
    assert values == {
        "ray_dinoray_step": 20,
        "ray_dinoray_total_steps": 810,
        "ray_dinoray_loss": 5.5,
        "ray_dinoray_images_per_second": 288.5,
        "ray_dinoray_knn_20": 0.25,
        "ray_dinoray_start_knn_20": 0.125,
    }


def scrape(temp_dir: Path, *, run: str) -> dict[str, float]:
    """Our gauges of a run, found as Prometheus finds them: Ray names its addresses in a file."""
    (found,) = json.loads((temp_dir / "prom_metrics_service_discovery.json").read_text())
    values = {}
    for address in found["targets"]:
        with (
            contextlib.suppress(OSError),  # named, and not up yet
            urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer,
        ):
            lines = re.findall(r"^(ray_dinoray_\w+)\{(.*)\} (\S+)$", answer.read().decode(), re.MULTILINE)
            values |= {name: float(value) for name, tags, value in lines if f'run="{run}"' in tags}
    return values


def test_every_gauge_is_drawn_and_nothing_else_is_asked_for() -> None:
    names = {name for text in EXPRESSIONS for name in re.findall(r"ray_\w+", text)}
    assert names == {f"ray_{PREFIX}{name}" for name in GAUGES}


def test_every_panel_is_of_the_runs_that_are_chosen_and_of_the_chosen_source() -> None:
    source = {"type": "prometheus", "uid": "${datasource}"}
    for panel in DASHBOARD["panels"]:
        assert panel["datasource"] == source, panel["title"]
        assert panel["targets"], panel["title"]
    for expression in EXPRESSIONS:
        selectors = re.findall(r"ray_\w+(\{[^}]*\})?", expression)
        assert set(selectors) == {'{run=~"$run"}'}, expression
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["query"] == "prometheus"
    assert variables["run"]["query"]["query"] == f"label_values(ray_{PREFIX}step, run)"
    assert variables["run"]["datasource"] == source


def test_panels_lie_beside_each_other_on_a_grid_of_24_columns() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
