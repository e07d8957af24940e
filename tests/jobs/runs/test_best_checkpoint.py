"""The best checkpoint of a run: named at its end and in its report, and addressed by --step best."""

import json
from pathlib import Path

import pytest
import yaml
from tiny_run import write_run

from dinoray.jobs.cli.arguments import CommandLine
from dinoray.jobs.export import main as export
from dinoray.jobs.runs.open_checkpoint import open_network
from dinoray.jobs.runs.result import describe_result, write_result
from dinoray.models.errors import ConfigError
from dinoray.pipeline.reporting.run_report import build_report
from dinoray.pipeline.storage.files import Directory

STEPS = (2, 4, 6)
BEST = "best checkpoint: step 4, k-NN 60.0% (k=20)"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, which scored best at its second checkpoint, and better before the first."""
    folder = write_run(tmp_path_factory.mktemp("runs") / "tiny", steps=STEPS)
    scores = dict(zip((1, *STEPS), (0.9, 0.5, 0.6, 0.4), strict=True))
    step = {"loss": 1.0, "verdict": "healthy", "skipped_steps": 0, "bad_images": 0}
    lines = [{"step": at, "knn_20": score, "majority": 0.1} for at, score in scores.items()]
    lines += [{"step": at, **step} for at in STEPS]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def test_a_run_names_it_at_its_end_and_in_its_report(run: Path) -> None:
    write_result(Directory(str(run)))
    fall = "uality peaked at step 1 and has fallen by 50.0 points since: k-NN 90.0% (k=20), now 40.0%"
    lines, page = describe_result(Directory(str(run))).splitlines(), build_report(Directory(str(run)))
    assert {BEST, f"q{fall}"} <= set(lines)
    assert f"B{BEST[1:]}." in page
    assert f"Q{fall}." in page


def test_it_is_addressed_as_a_step(run: Path, tmp_path: Path) -> None:
    assert open_network(str(run), "best", "teacher").step == 4
    export([str(run), "--step", "best", "--format", "state_dict", "--out", str(tmp_path)])
    assert (tmp_path / "teacher_step_00000004.json").exists()


@pytest.mark.parametrize(
    ("options", "step", "line"),
    [
        (
            [],
            4,
            "exporting the best checkpoint: step 4, k-NN 60.0% (k=20); not the newest, step 6 (--step last)",
        ),
        (["--step", "last"], 6, None),
    ],
)
def test_it_is_what_export_takes_unless_another_is_asked_for(
    options: list[str],
    step: int,
    line: str | None,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    export([str(run), *options, "--format", "state_dict", "--out", str(tmp_path)])
    assert [path.name for path in tmp_path.glob("*.json")] == [f"teacher_step_{step:08d}.json"]
    printed = capsys.readouterr().out.splitlines()
    assert [each for each in printed if each.startswith("exporting")] == ([line] if line else [])


def test_without_scores_export_takes_the_newest_and_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "tiny", steps=STEPS)
    export([str(run), "--format", "state_dict"])
    assert (run / "export" / "teacher_step_00000006.json").exists()
    line = "exporting the newest checkpoint, step_00000006: none has a score"
    assert capsys.readouterr().out.splitlines()[0] == line


def test_a_run_that_was_not_evaluated_has_none_and_the_newest_is_there(tmp_path: Path) -> None:
    run = write_run(tmp_path / "tiny", steps=STEPS)
    with pytest.raises(
        ConfigError, match=r"--step best: no checkpoint of .*leave --step out for the newest$"
    ):
        open_network(str(run), "best", "teacher")
    assert open_network(str(run), None, "teacher").step == STEPS[-1]


@pytest.mark.parametrize("wrong", ["worst", "4.5", ""])
def test_a_step_is_a_number_or_best(wrong: str) -> None:
    parser = CommandLine("export")
    parser.add_network()
    right = ["4", "best", "last"]
    assert [parser.parse_args(["--step", one]).step for one in right] == [4, "best", "last"]
    with pytest.raises(ConfigError, match=rf"--step: invalid step value: '{wrong}'"):
        parser.parse_args(["--step", wrong])


def run_from(
    folder: Path, *, start: float, init_path: str | None = None, num_val: int = 1000, key: str = "from"
) -> Path:
    """A finished run whose checkpoints score 50, 60 and 40 %, from weights at `init_path`, if any."""
    run = write_run(folder / "tiny", steps=STEPS)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["init"][key] = init_path
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    scores = dict(zip((0, *STEPS), (start, 0.5, 0.6, 0.4), strict=True))
    step = {"loss": 1.0, "verdict": "healthy", "skipped_steps": 0, "bad_images": 0}
    lines = [
        {"step": at, "knn_20": score, "majority": 0.1, "num_val": num_val} for at, score in scores.items()
    ]
    lines += [{"step": at, **step} for at in STEPS]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return run


BEATEN = (
    "the start was better than every checkpoint: nothing to export but the start; k-NN 60.0% (k=20) at step 4 is 30.0 "
    "points below the start, 90.0% (standard error 1.8); one seed"
)


@pytest.mark.parametrize("key", ["from", "path"])  # path: as earlier versions wrote
def test_a_start_that_is_not_beaten_is_the_only_thing_to_export(key: str, tmp_path: Path) -> None:
    run = run_from(tmp_path, start=0.9, init_path="/weights/dinov2.pth", key=key)
    write_result(Directory(str(run)))
    assert BEATEN in describe_result(Directory(str(run))).splitlines()
    assert f"T{BEATEN[1:]}." in build_report(Directory(str(run)))
    with pytest.raises(ConfigError, match="nothing to export but the start") as error:
        export([str(run), "--format", "state_dict"])
    remedy = "Take the weights that it started from, /weights/dinov2.pth; or pass --step 4 to export"
    assert remedy in str(error.value)
    assert not (run / "export").exists()
    export([str(run), "--step", "4", "--format", "state_dict"])
    assert (run / "export" / "teacher_step_00000004.json").exists()


@pytest.mark.parametrize(
    ("start", "num_val", "init_path", "words"),
    [
        (0.9, 1000, None, BEATEN),  # random weights are nothing to take instead
        (
            0.61,
            1000,
            "w.pth",
            "no checkpoint differs from the start by more than noise: k-NN 60.0% (k=20) at step 4",
        ),
        (
            0.2,
            1000,
            "w.pth",
            "the best checkpoint beats the start: k-NN 60.0% (k=20) at step 4 is 40.0 points above",
        ),
    ],
)
def test_otherwise_export_says_how_the_checkpoint_stands_beside_the_start(
    start: float,
    num_val: int,
    init_path: str | None,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    export(
        [str(run_from(tmp_path, start=start, init_path=init_path, num_val=num_val)), "--format", "state_dict"]
    )
    assert capsys.readouterr().out.splitlines()[1].startswith(words)
