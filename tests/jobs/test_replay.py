"""A step of a run is repeated in one process: the run's numbers, and what is wrong with it by name."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from no_ray import forbid_ray
from paths import ROOT
from tiny_run import write_images
from trained_run import EVERY, STEPS, trained_runs

from dinoray.jobs import replay
from dinoray.jobs.cli.config import load_run_config
from dinoray.models.errors import ConfigError, DataError, ResourceError
from dinoray.pipeline.data.order import Order
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.training.bad_images import Quarantine
from dinoray.pipeline.training.checkpoint import load_checkpoint, save_checkpoint
from dinoray.pipeline.training.state import build_state

EQUAL = "equal to the run's log, bit for bit (8 values)"
LAST = str(STEPS)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks as small as these take longer with several threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.cpu_count", lambda: 1)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one rank."""
    return trained_runs(tmp_path_factory.mktemp("one"), {"run": ["head.use_bn=true"]})[0]


@pytest.fixture(scope="module")
def runs_of_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of two ranks: with all that a rank does by itself, with batch norm, and one that is soon not finite."""
    runs = {
        "apart": ["head.use_bn=false", "loss.koleo_weight=0.1", "train.accumulate_steps=2"],
        "together": ["head.use_bn=true", "backbone.drop_path_rate=0"],
        "thrown": ["head.use_bn=false", "optim.base_lr=1e38"],
    }
    folders = trained_runs(tmp_path_factory.mktemp("two"), runs, ranks=2)
    return {folder.name: folder for folder in folders}


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`replayed(run, *arguments)` is what the command prints; it starts no Ray and leaves torch as it is."""
    forbid_ray(monkeypatch)
    threads = torch.get_num_threads()

    def call(run: Path, *arguments: str) -> str:
        try:
            replay.main([str(run), *arguments])
        finally:
            torch.set_num_threads(threads)
        return capsys.readouterr().out

    return call


def result(output: str) -> str:
    (line,) = [line for line in output.splitlines() if line.startswith("result ")]
    return line.removeprefix("result").strip()


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_each_step_from_a_checkpoint_is_equal_bit_for_bit_and_nothing_is_written(
    run: Path, replayed: Callable[..., str]
) -> None:
    before = files(run)
    output = replayed(run, "--step", LAST)
    assert f"step {LAST}: 2 steps from step_00000006" in output
    (between,) = [line for line in output.splitlines() if line.startswith("step 7  ")]
    assert between.endswith(EQUAL)
    assert result(output) == EQUAL
    assert output.count("all finite") == 3
    assert "note:" not in output
    assert files(run) == before


def test_a_step_before_the_first_checkpoint_is_repeated_from_the_initial_weights(
    run: Path, replayed: Callable[..., str]
) -> None:
    output = replayed(run, "--step", "2")
    assert "2 steps from initial" in output
    assert result(output) == EQUAL
    output = replayed(run, "--step", LAST, "--checkpoint", "initial")
    assert f"{STEPS} steps from initial" in output
    assert result(output) == EQUAL


def test_the_images_of_the_step_are_listed_with_their_crops(run: Path, replayed: Callable[..., str]) -> None:
    lines = replayed(run, "--step", "5", "--images", "3").splitlines()
    first = next(n for n, line in enumerate(lines) if line.split()[:1] == ["position"])
    rows = [line.split() for line in lines[first + 1 : first + 4]]
    source_order = Order(24, seed=0).locate(range(32, 35))[1]
    keys = sorted(
        path.relative_to(run.parent / "images").as_posix() for path in run.parent.glob("images/*/*")
    )
    assert [(row[0], row[1], row[5]) for row in rows] == [
        (str(32 + n), "0", keys[image]) for n, image in enumerate(source_order)
    ]
    assert all(int(row[2]) <= float(row[3]) <= int(row[4]) for row in rows)
    assert lines[first + 4].strip() == "and 5 more images; --images 8 prints all"


def test_a_step_alone_runs_on_the_weights_of_the_checkpoint(run: Path, replayed: Callable[..., str]) -> None:
    output = replayed(run, "--step", LAST, "--alone")
    assert "1 step from step_00000006" in output
    assert "note: --alone leaves out 1 of the steps between step_00000006 and step 8" in output
    assert result(output).startswith("differs from the run's log by ")
    assert result(replayed(run, "--step", "7", "--alone")) == EQUAL


def test_other_settings_are_tried_and_named(run: Path, replayed: Callable[..., str]) -> None:
    output = replayed(run, "--step", "7", "loss.student_temp=0.2", "train.precision=bf16")
    assert "bf16" in output
    assert "note: with other settings than the run's: loss.student_temp=0.2 train.precision=bf16" in output
    assert result(output).startswith("differs from the run's log by ")


def test_colours_made_by_the_step_are_those_that_the_run_had_from_its_cpus(
    run: Path, replayed: Callable[..., str]
) -> None:
    output = replayed(run, "--step", "7", "crops.photometric=device")
    assert result(output) == EQUAL
    images = [line for line in output.splitlines() if line.endswith(".jpg")]
    assert images
    assert set(images) <= set(replayed(run, "--step", "7").splitlines())


# Ranks


def test_the_steps_of_two_ranks_are_repeated_one_rank_after_the_other(
    runs_of_two_ranks: dict[str, Path], replayed: Callable[..., str]
) -> None:
    run = runs_of_two_ranks["apart"]
    output = replayed(run, "--step", "7")
    assert "2 ranks one after the other" in output
    assert "note:" not in output
    assert _largest_difference(output) < 1e-6
    ranks = [line.split()[1] for line in output.splitlines() if line.endswith(".jpg")]
    assert ranks == ["0"] * 4 + ["1"] * 4
    # As one rank, the draws of stochastic depth would be others.
    alone = replayed(run, "--step", "7", "resources.train_workers=1")
    assert _largest_difference(alone) > 1e-4


def test_a_step_of_an_elastic_run_has_the_ranks_that_it_had(
    runs_of_two_ranks: dict[str, Path], tmp_path: Path, replayed: Callable[..., str]
) -> None:
    run = Path(shutil.copytree(runs_of_two_ranks["apart"], tmp_path / "run"))
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(re.sub("train_workers: 2", "train_workers: [1, 4]", config))
    output = replayed(run, "--step", "8")
    assert "2 ranks one after the other" in output
    assert _largest_difference(output) < 1e-6
    assert "note:" not in output

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[6]["train_workers"] = 1
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = replayed(run, "--step", "8")
    assert "2 ranks one after the other" in output
    assert "note: some of the steps up to this one were run by 1 train workers, not 2" in output


def test_with_batch_norm_the_ranks_are_passed_at_once_and_what_differs_is_named(
    runs_of_two_ranks: dict[str, Path], replayed: Callable[..., str]
) -> None:
    run = runs_of_two_ranks["together"]
    output = replayed(run, "--step", "7")
    assert "2 ranks at once" in output
    assert "note:" not in output
    assert _largest_difference(output) < 1e-5
    output = replayed(run, "--step", "7", "backbone.drop_path_rate=0.1")
    assert "note: stochastic depth: the 2 ranks are passed at once, with the draws of rank 0" in output


def _largest_difference(output: str) -> float:
    text = result(output)
    return 0.0 if text == EQUAL else float(text.partition(" by ")[2].split()[0])


def test_a_run_of_an_earlier_version_is_repeated_within_rounding(
    tmp_path: Path, replayed: Callable[..., str]
) -> None:
    """Its log was written by train workers of Ray, on another machine."""
    images = write_images(tmp_path / "images", "train", labels=("dots", "rings", "stripes"), per_label=8)
    run = shutil.copytree(ROOT / "tests" / "end_to_end" / "earlier_run", tmp_path / "run")
    table = pq.read_table(run / "manifest.parquet")
    about = {k: v.replace(b"/data/images", str(images).encode()) for k, v in table.schema.metadata.items()}
    pq.write_table(table.replace_schema_metadata(about), run / "manifest.parquet")
    config = (run / "config.yaml").read_text().replace("path: images", f"path: {images}")
    (run / "config.yaml").write_text(config)
    output = replayed(run, "--step", "9", "--checkpoint", "initial")
    assert _largest_difference(output) < 1e-4


# What went wrong


def test_a_step_that_is_not_finite_is_traced_to_its_image_rank_and_module(
    runs_of_two_ranks: dict[str, Path], replayed: Callable[..., str]
) -> None:
    run = runs_of_two_ranks["thrown"]
    output = replayed(run, "--step", "2")
    assert result(output) == EQUAL
    lines = [line.partition("  ")[::2] for line in output.splitlines()]
    said = {name: text.strip() for name, text in lines if name}
    assert said["loss"].split() == ["nan", "nan", "equal"]
    assert said["weights before"] == "all finite"
    assert said["first output"].startswith("student backbone.")
    assert "its inputs are finite" in said["first output"]
    assert said["gradients"].startswith("not finite: ")
    assert "step 1  " not in said
    assert output.count("not finite\n") == 8  # each image


# Images


def test_images_that_are_gone_are_named_and_images_that_were_bad_then_are_not(
    tmp_path: Path, replayed: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained_runs(tmp_path, {"run": []}, bad="checks/00.jpg")[0]
    position = json.loads((run / "quarantine.jsonl").read_text())["positions"][0]
    output = replayed(run, "--step", str(position // 8 + 1))
    assert result(output) == EQUAL
    assert "checks/00.jpg  replaced: corrupt, " in output
    # Of another step, and not the bad one.
    images = (line.split()[5] for line in replayed(run, "--step", "5").splitlines() if line.endswith(".jpg"))
    gone = next(images)
    (tmp_path / "images" / gone).unlink()
    with pytest.raises(
        DataError, match=rf"^1 images .* replaced by others here: {gone} \(.*\); restore them"
    ):
        replayed(run, "--step", "5")
    assert f"{gone}  replaced: missing, " in capsys.readouterr().out


def test_images_that_are_not_those_of_the_log_or_of_the_capture_are_named(
    run: Path, tmp_path: Path, replayed: Callable[..., str]
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    replaced = {"key": "blobs/09.jpg", "status": "unreachable", "reason": "told so", "positions": [50]}
    (copy / "quarantine.jsonl").write_text(json.dumps(replaced))
    (copy / "capture").mkdir()
    capture = {"step": 7, "rank": 0, "world_size": 2, "reason": "uniform collapse", "positions": [48, 56]}
    (copy / "capture" / "step_00000007.json").write_text(json.dumps({**capture, "keys": ["other.jpg"] * 8}))
    with pytest.raises(
        ConfigError, match=r"choose a step, e\.g\. `dinoray replay .* --step 7`; captured steps: 7 \("
    ):
        replayed(copy)
    output = replayed(copy, "--step", "7")
    assert "captured by the run: uniform collapse, rank 0 of 2" in output
    assert "fp32, 2 ranks at once" in output
    assert "note: replaced by other images in the run, and used here: " in output
    assert "note: the manifest names other images for this step than its capture does" in output


def test_the_images_of_a_trial_are_those_of_its_study(
    run: Path, tmp_path: Path, replayed: Callable[..., str]
) -> None:
    trial = shutil.copytree(run, tmp_path / "trials" / "0000")
    (trial / "manifest.parquet").rename(tmp_path / "manifest.parquet")
    assert result(replayed(trial, "--step", "7")) == EQUAL


# Errors, and their remedies


def test_a_step_that_the_run_does_not_have_is_refused(run: Path, replayed: Callable[..., str]) -> None:
    with pytest.raises(ConfigError, match=rf"--step 9 must be at most {STEPS}, "):
        replayed(run, "--step", str(STEPS + 1))
    with pytest.raises(
        ConfigError, match=r"--step is missing; pass --step N, the step to repeat; .* has captured none$"
    ):
        replayed(run)
    with pytest.raises(ConfigError, match=r"--step: invalid positive number value: '0'"):
        replayed(run, "--step", "0")


def test_a_checkpoint_that_is_not_before_the_step_is_refused(run: Path, replayed: Callable[..., str]) -> None:
    with pytest.raises(ConfigError, match=r"choose one of step_00000003, initial$"):
        replayed(run, "--step", "5", "--checkpoint", "step_00000006")
    assert "2 steps from step_00000003" in replayed(run, "--step", "5", "--checkpoint", "step_00000003")


def test_without_a_checkpoint_before_the_step_another_step_or_the_initial_weights_are_offered(
    run: Path, tmp_path: Path, replayed: Callable[..., str]
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(copy / "checkpoints" / f"step_{EVERY:08d}")
    with pytest.raises(DataError, match=r"pass --step 7 or a later one, or pass --checkpoint initial"):
        replayed(copy, "--step", "5")
    assert "1 step from step_00000006" in replayed(copy, "--step", "7")
    assert "5 steps from initial" in replayed(copy, "--step", "5", "--checkpoint", "initial")


def test_a_checkpoint_that_is_damaged_is_refused_and_the_one_before_it_is_used(
    run: Path, tmp_path: Path, replayed: Callable[..., str]
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "checkpoints" / "step_00000006" / "student.safetensors").write_bytes(b"torn")
    output = replayed(copy, "--step", "7")
    assert "warning: checkpoint step_00000006 is refused: student.safetensors has 4 bytes" in output
    assert "4 steps from step_00000003" in output
    assert result(output) == EQUAL
    with pytest.raises(DataError, match=r"step_00000006 is damaged"):
        replayed(copy, "--step", "7", "--checkpoint", "step_00000006")


def test_a_checkpoint_that_is_not_finite_is_refused_unless_it_is_asked_for(
    run: Path, tmp_path: Path, replayed: Callable[..., str]
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    last = copy / "checkpoints" / "step_00000006"
    state = build_state(load_run_config(Directory(str(copy))).algorithm(), num_images=24)
    load_checkpoint(state, last)
    state.dino.center[0] = float("nan")
    save_checkpoint(state, last, num_images=24, quarantine=Quarantine())
    output = replayed(copy, "--step", "7")
    assert "warning: checkpoint step_00000006 is refused: the centre has NaN" in output
    assert "4 steps from step_00000003" in output
    output = replayed(copy, "--step", "7", "--checkpoint", "step_00000006")
    assert "weights before    not finite: center" in output
    assert result(output).endswith(": loss is nan, not " + result(output).rpartition(" ")[2])


def test_a_run_without_its_manifest_or_without_a_gpu_says_so(
    run: Path, tmp_path: Path, replayed: Callable[..., str]
) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ResourceError, match=r"pass --device cpu$"):
            replayed(run, "--step", "7", "--device", "cuda")
    copy = shutil.copytree(run, tmp_path / "run")
    manifest = (copy / "manifest.parquet").read_bytes()
    (copy / "manifest.parquet").unlink()
    with pytest.raises(DataError, match=r"has no manifest\.parquet, .*; restore it from a copy$"):
        replayed(copy, "--step", "7")
    Directory(str(copy)).write("manifest.parquet", manifest)
    assert result(replayed(copy, "--step", "7", "--device", "cpu")) == EQUAL
    with pytest.raises(ConfigError, match=r"is not a run directory"):
        replayed(tmp_path, "--step", "1")
