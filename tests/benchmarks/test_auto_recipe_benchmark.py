"""benchmarks/auto_recipe.py at toy size: it trains, repeats the best trial, and judges by the spread of seeds."""

from pathlib import Path

import auto_recipe as benchmark
import pytest
from samples import write_all

from dinoray.pipeline.data.demo_images import draw_demo_image


def test_it_runs_to_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part, number in (("train", 12), ("val", 4)):
        files = {
            f"{part}/{label}/{i}.jpg": draw_demo_image(label, part, i)
            for label in ("dots", "rings")
            for i in range(number)
        }
        write_all(tmp_path / "toys", files)
    few = ["--no-digits", "--trials", "2", "--images", "24", "--seeds", "0", "1", "--threads", "1"]
    benchmark.main(["--photos", str(tmp_path / "toys"), *few])
    output = capsys.readouterr().out
    assert (
        "## toys: 24 images of 96 x 96 pixels (median), 3 channels, 2 classes; no GPU, 2 CPU cores" in output
    )
    assert "colour histogram: " in output
    rows = [line.split(" | ")[0] for line in output.splitlines() if line.startswith("| ")]
    named = [
        "| auto, seed 0",
        "| auto, seed 1",
        "| trial 1, seed 0",
        "| trial 2, seed 0",
        "| best trial, seed 1",
    ]
    assert rows == ["| run", *named]
    assert output.splitlines()[-1].startswith("auto ")


def test_the_verdict_is_by_the_spread_of_seeds() -> None:
    assert benchmark.verdict([0.40, 0.42], [0.41, 0.43], 0.5).endswith(": within the noise")
    assert benchmark.verdict([0.40, 0.401], [0.45, 0.451], 0.5).endswith(": below the noise")


def test_the_digits_are_split_and_gray() -> None:
    pytest.importorskip("sklearn")
    digits = benchmark.read_digits()
    assert (len(digits.train), len(digits.val), digits.facts().channels) == (1437, 360, 1)
    assert {image.shape for _, image in digits.train} == {(32, 32, 3)}
