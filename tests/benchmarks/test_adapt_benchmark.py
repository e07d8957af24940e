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


@pytest.mark.nightly  # a minute or two of training
def test_naive_continuation_falls_below_its_start_and_adapt_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "NUM_TRAIN", 60)
    monkeypatch.setattr(benchmark, "NUM_VAL", 60)
    with pytest.raises(SystemExit) as ended:
        benchmark.main(
            ["--seeds", "0", "--pretrain", "200", "--steps", "100", "--picture", str(tmp_path / "adapt.png")]
        )
    output = capsys.readouterr().out
    assert ended.value.code == 0, output
    heads, _, row = (line.split(" | ") for line in output.splitlines() if line.startswith("|"))
    cells = dict(zip(heads, row, strict=True))
    assert int(cells["naive, stopped at"]) < 100
    assert cells["adapt, stopped at"].strip(" |") == "-"
    assert (tmp_path / "adapt.png").stat().st_size > 0
