"""Runs whose attention is drawn, made by hand, and the attention job within this process."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import encode
from no_ray import forbid_ray
from tiny import NUM_IMAGES, tiny_batch, tiny_config

from dinoray.jobs import attention
from dinoray.jobs.cli.main import run_main
from dinoray.pipeline.data.decoding.decode import decode
from dinoray.pipeline.figures.attention_sheet import attention_figure
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.run_dir import SNAPSHOT, checkpoint_name
from dinoray.pipeline.tracking.run_log import MetricsLog
from dinoray.pipeline.training.bad_images import Quarantine
from dinoray.pipeline.training.checkpoint import save_checkpoint
from dinoray.pipeline.training.state import build_state
from dinoray.pipeline.training.step import train_step

Run = Callable[..., tuple[int, list[str], list[str]]]


def noise(height: int = 20, width: int = 30, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return encode(pixels, "PNG")


EVALUATED = (0, 4, 8)


def evaluate_run(folder: Path, **changes: dict[str, Any]) -> Path:
    """What the evaluations of a run leave behind which learns fast: their figures, and no checkpoint at all."""
    state = build_state(tiny_config(optim={"base_lr": 2.0}, **changes), num_images=NUM_IMAGES)
    pictures = [(f"{i}.png", decode(noise(seed=i), max_pixels=10_000)) for i in range(2)]
    log = MetricsLog(Directory(str(folder)), num_images=NUM_IMAGES)
    for step in EVALUATED:
        while state.step < step:
            train_step(state, tiny_batch(state.config, seed=state.step))
        sheet = attention_figure(
            state.dino.teacher.backbone, pictures, state.config.crops, title=f"step {step}"
        )
        if sheet is not None:
            log.picture("attention", step, sheet)
    log.close()
    return folder


def make_run(folder: Path, *, steps: tuple[int, ...] = (0, 1, 2), **changes: dict[str, Any]) -> Path:
    """A run directory with checkpoints committed at these steps, and one that was not."""
    state = build_state(tiny_config(**changes), num_images=NUM_IMAGES)
    for step in (*steps, steps[-1] + 1):
        while state.step < step:
            train_step(state, tiny_batch(state.config, seed=state.step))
        checkpoint = folder / "checkpoints" / checkpoint_name(step)
        checkpoint.mkdir(parents=True)
        save_checkpoint(state, checkpoint, num_images=NUM_IMAGES, quarantine=Quarantine())
    results = [{"checkpoint_dir_name": checkpoint_name(step)} for step in steps]
    (folder / "checkpoints" / SNAPSHOT).write_text(json.dumps({"checkpoint_results": results}))
    return folder


def attention_job(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """What runs the job as `python -m` does; it returns exit code, lines of stdout, lines of stderr."""

    def run(*arguments: object) -> tuple[int, list[str], list[str]]:
        monkeypatch.setattr(sys, "argv", ["job", *map(str, arguments)])
        code: Any = 0
        try:
            run_main(attention.main)
        except SystemExit as exit_:
            code = exit_.code
        output, errors = capsys.readouterr()
        assert "Traceback" not in output + errors
        return code, output.splitlines(), errors.splitlines()

    forbid_ray(monkeypatch)
    return run
