"""The storm of faults: its table, and once, for some steps, the storm itself."""

import json
from pathlib import Path

import chaos
import pytest
from chaos import Hit, ledger


def test_the_ledger_counts_faults_by_kind_and_all_of_them() -> None:
    hits = [
        Hit("driver killed", 10, 5, resumed_seconds=20, recovered_seconds=30, steps_repeated=4),
        Hit("driver killed", 50, 9, resumed_seconds=24, recovered_seconds=40, steps_repeated=1),
        Hit("node lost", 70, 9, noticed_seconds=6, resumed_seconds=26, recovered_seconds=28),
        Hit("augment actor killed", 90, 20, recovered_seconds=1),
        Hit("augment actor killed", 95, 20),
    ]
    assert ledger(hits).splitlines()[2:] == [
        "| augment actor killed | 2 | 0 | - | - | 1 | 1 |",
        "| driver killed | 2 | 5 | - | 22 | 35 | 40 |",
        "| node lost | 1 | 0 | 6 | 26 | 28 | 28 |",
        "| all | 5 | 5 | 6 | 24 | 29 | 40 |",
    ]


@pytest.mark.nightly
@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.slow
def test_a_run_in_a_storm_ends_with_the_weights_of_a_calm_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hits = tmp_path / "hits.json"
    chaos.main(["--steps", "400", "--mtbf-seconds", "20", "--seed", "1", "--json", str(hits)])
    assert "weights equal bit for bit, each step logged once" in capsys.readouterr().out
    assert json.loads(hits.read_text())["1"]
