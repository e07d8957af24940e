"""benchmarks/gpu_session.py: a part that fails or hangs costs the others nothing, and nothing in it needs Ray."""

import json
from pathlib import Path

import gpu_session as benchmark
import pytest
from gpu_session import Part
from paths import ROOT


def test_parts_that_fail_or_hang_cost_the_others_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    todo = [
        Part("fails", 60, ("-c", "raise SystemExit(3)")),
        Part("hangs", 0.4, ("-c", "import time; print('begun'); time.sleep(600)")),
        Part("works", 60, ("-c", "import dinoray; print(dinoray.__name__)")),
    ]
    monkeypatch.setattr(benchmark, "parts", lambda out, is_toy: todo)
    assert benchmark.main(["--out", str(tmp_path / "out")]) == 1
    came = json.loads((tmp_path / "out" / "session.json").read_text())
    assert {name: one["result"] for name, one in came.items()} == {
        "fails": "exit code 3",
        "hangs": "over 0 s",
        "works": "done",
    }
    assert capsys.readouterr().out.endswith("== works\ndinoray\n")


def test_no_part_begins_once_the_minutes_are_over(tmp_path: Path) -> None:
    never = Part("never", 60, ("-c", "raise AssertionError"))
    assert benchmark.run([never], tmp_path, seconds=0)["never"]["result"] == "no time"


def test_limits_add_up_to_the_minutes_and_files_are_few(tmp_path: Path) -> None:
    all_parts = benchmark.parts(tmp_path, is_toy=False)
    assert sum(part.seconds for part in all_parts) == 8 * 60
    assert all((ROOT / test).exists() for test in benchmark.TESTS)


@pytest.mark.nightly
def test_all_of_it_runs_at_toy_size_where_there_is_no_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ray.py").write_text("raise ModuleNotFoundError('no Ray here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    out = tmp_path / "out"
    benchmark.main(["--out", str(out), "--toy", "--minutes", "30"])
    came = json.loads((out / "session.json").read_text())
    # Without a GPU, all tests are skipped.
    assert [one["result"] for one in came.values()] == ["done"] * 4, came
    assert all((out / f"{name}.json").exists() for name in list(came)[1:])
