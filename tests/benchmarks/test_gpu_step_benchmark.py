"""benchmarks/gpu_step.py at toy size: it runs, and the plain step learns what ours learns."""

import json
from pathlib import Path

import gpu_step as benchmark
import pytest
import torch
from part_clock import PARTS, PartClock
from tiny import NUM_IMAGES, TINY_RESNET, tiny_config

from dinoray.models.errors import ConfigError, ResourceError
from dinoray.pipeline.training import step as training
from dinoray.pipeline.training.state import TrainState, build_state

TOY = ["crops.global_crop_size=32", "crops.local_crop_size=16", "crops.num_local_crops=2"]
TOY += ["head.out_dim=64", "head.hidden_dim=32"]
FEW = ["--steps", "1", "--rounds", "1", "--model", "test_vit"]
CPU = torch.device("cpu")


def test_it_runs_to_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    benchmark.main([*TOY, *FEW, "--batch", "2", "3", "--json", str(out)])
    facts = json.loads(out.read_text())
    assert [(row["batch"], row["step"]) for row in facts["rows"]] == [
        (batch, step) for batch in (2, 3) for step in ("dinoray", "plain")
    ]
    for row in facts["rows"]:
        assert set(row["parts_ms"]) == set(PARTS)
        assert min(row["parts_ms"].values()) > 0
        assert row["peak_bytes"] > 1e6
        assert 0 < row["mfu"] < 1
    assert capsys.readouterr().out.splitlines()[-6].startswith("| model | batch | step | images/s |")


def test_a_batch_that_does_not_fit_is_a_row_and_the_next_one_follows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = training.train_step

    def limited(state: TrainState, batch: dict) -> dict:
        if len(batch["global_crops"]) > 2:
            raise ResourceError("it does not fit")
        return run(state, batch)

    monkeypatch.setattr(benchmark, "train_step", limited)
    benchmark.main([*TOY, *FEW, "--batch", "3", "2", "--only", "dinoray"])
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert rows[0].startswith("| test_vit | 3 | dinoray | does not fit |")
    assert rows[1].startswith("| test_vit | 2 | dinoray | ")


def test_eager_and_compiled_blocks_are_measured_beside_one_plain_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(TrainState, "compile", lambda state: asked.append(state.config.train.compile))
    benchmark.main([*TOY, *FEW, "--batch", "2", "--compile", "off", "on"])
    rows = [row.split(" | ")[2] for row in capsys.readouterr().out.splitlines()[-3:]]
    assert rows == ["dinoray, compile off", "dinoray, compile on", "plain"]
    assert asked == ["off", "on"]


def test_a_wrong_setting_ends_in_one_line() -> None:
    with pytest.raises(ConfigError, match="out_dims"):
        benchmark.config_of(["head.out_dims=3"], "test_vit", 2)
    with pytest.raises(ConfigError, match="'batch' is no setting"):
        benchmark.config_of(["batch"], "test_vit", 2)


@pytest.mark.parametrize("backbone", [{}, TINY_RESNET])
def test_the_plain_step_has_our_losses(backbone: dict) -> None:
    """Two implementations of one algorithm, through warm-up, freeze and clipping."""
    config = tiny_config(
        optim={"warmup_epochs": 0.5, "freeze_last_layer_epochs": 0.3, "clip_grad": 0.5}, backbone=backbone
    )
    state = build_state(config, num_images=NUM_IMAGES)
    crops = benchmark.noise(config, 4, CPU)
    plain = benchmark.PlainStep(state.dino, config, state.schedule, CPU)
    views = list(benchmark.views(crops, config, CPU))
    for _ in range(8):
        ours = float(training.train_step(state, crops)["loss"])
        assert plain(views) == pytest.approx(ours, rel=2e-5)
    # Beyond the loss, which the freeze and the temperature may hide.
    torch.testing.assert_close(plain.center, state.dino.center, rtol=1e-3, atol=1e-5)


def test_marks_divide_the_whole_step() -> None:
    clock = PartClock(CPU)
    for _ in range(2):
        clock.start()
        sum(range(100_000))
        clock.mark("loss")
        clock.stop()
    parts = clock.read()
    assert parts["loss"] > parts["other"] > 0
    assert parts["EMA"] == 0
