"""benchmarks/adapt.py: the guard's column, and the whole of it at toy size."""

from pathlib import Path

import adapt as benchmark
import pytest


@pytest.mark.parametrize(
    ("scores", "step"),
    [
        ([0.50, 0.40, 0.30, 0.30, 0.30], 75),  # the evaluation at step 25 is in the grace
        ([0.50, 0.40, 0.30, 0.50, 0.30], None),  # it must persist
        ([0.50, 0.50, 0.50, 0.30, 0.30], None),  # the second one is that of the last step
        ([0.50, 0.49, 0.49, 0.49, 0.49], None),  # within the standard error of 2.4 points
        ([0.50, 0.60, 0.60, 0.60, 0.60], None),
    ],
)
def test_the_guard_stops_at_the_second_evaluation_below_the_start(
    scores: list[float], step: int | None
) -> None:
    curve = [(25 * i, score) for i, score in enumerate(scores)]
    assert benchmark.stopped_at(curve, grace_steps=40, num_val=900) == step


@pytest.mark.nightly  # beside tests/jobs/cli/test_adapt_recipe.py
def test_it_runs_to_its_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"NUM_FIRST": 12, "NUM_TRAIN": 12, "NUM_VAL": 5, "EVERY": 2}.items():
        monkeypatch.setattr(benchmark, name, value)
    few = ["--seeds", "0", "--pretrain", "2", "--steps", "4", "--picture", str(tmp_path / "adapt.png")]
    with pytest.raises(SystemExit) as ended:
        benchmark.main(few)
    output = capsys.readouterr().out
    heads, _, row = (line.split(" | ") for line in output.splitlines() if line.startswith("|"))
    assert len(heads) == len(row) == 8
    assert {head for head in heads if "stopped at" in head} == {"naive, stopped at", "adapt, stopped at |"}
    wrong = int(output.splitlines()[-1].partition(" of 2 runs ")[0])
    assert ended.value.code == (1 if wrong else 0)
    assert (tmp_path / "adapt.png").stat().st_size > 0
