"""Jobs that refuse what they are given: once the message's remedy is followed, they go on."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from exports import checkpoint, run_directory, trained
from no_ray import RayStarted, forbid_ray
from remedies import settings_to_set
from samples import write_all
from study_configs import study
from tiny import tiny_config
from tiny_run import NAME, STEP, write_images, write_run

from dinoray.jobs import embed, evaluate, export, manifest, pack, tune
from dinoray.jobs.cli.config import load_config, load_run_config
from dinoray.jobs.runs.open_checkpoint import open_network
from dinoray.jobs.runs.prober import Prober
from dinoray.jobs.runs.result import write_result
from dinoray.jobs.runs.run_size import check_images
from dinoray.jobs.runs.scoring import chosen_probes
from dinoray.jobs.studies.config import first_points, space_of
from dinoray.jobs.studies.resources import check_growth, check_study_size
from dinoray.jobs.tune import _check_name
from dinoray.models.errors import ConfigError, DataError, DinorayError, ResourceError
from dinoray.pipeline.evaluation.config import LABEL_FREE
from dinoray.pipeline.evaluation.features import Features
from dinoray.pipeline.storage.files import Directory


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of images without labels."""
    folder = tmp_path_factory.mktemp("remedies")
    write_images(folder / "train", "train", labels=("dots", "rings"), per_label=4)
    return write_run(folder / "run", f"data.path={folder}/train", "eval.val_path=null")


# Images


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_all(tmp_path, {f"a/{i}.jpg": b"x" for i in range(3)} | {"b/1.jpg": b"x"})
    return tmp_path


@pytest.mark.parametrize(
    ("wrong", "says", "followed"),
    [
        (["a", "--out=a/lists"], "; choose another --out", ["a", "--out=lists"]),
        (["a", "--out=lists", "--name=a/b"], "e.g. --name=photos", ["a", "--out=lists", "--name=photos"]),
        (["a", "--out=lists", "train.epochs=1"], "; leave it out", ["a", "--out=lists"]),
        (["a", "--out=lists", "data.path=b"], "; leave them out", ["a", "--out=lists"]),
        (["a", "--out=/proc/none"], "; set --out to a folder that you may write to", ["a", "--out=lists"]),
        (["none", "--out=lists"], "; check the path", ["a", "--out=lists"]),
        (["b", "--out=old"], "; choose another --name or --out", ["b", "--out=old", "--name=b"]),
        (["b", "--out=old"], "; choose another --name or --out", ["b", "--out=lists"]),
    ],
)
def test_a_manifest_is_written(
    wrong: Sequence[str], says: str, followed: Sequence[str], images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(images)
    manifest.main(["a", "--out=old"])
    with pytest.raises(DinorayError, match=f"{re.escape(says)}$"):
        manifest.main(wrong)
    manifest.main(followed)


@pytest.mark.parametrize(
    ("wrong", "says", "followed"),
    [
        (["--out=a/packed"], "; choose another --out", ["--out=packed"]),
        (["--out=packed", "train.epochs=2"], "; leave it out", ["--out=packed"]),
        (
            ["--out=packed", "--one-pass", "--duplicates=near"],
            "; leave out one of them",
            ["--out=packed", "--duplicates=near"],
        ),
        (
            ["--out=packed", "crops.local_crop_size=8"],
            "(crops.* goes with --shrink); leave it out",
            ["--out=packed", "crops.local_crop_size=8", "--shrink"],
        ),
    ],
)
def test_a_packing_starts(
    wrong: Sequence[str], says: str, followed: Sequence[str], images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_ray(monkeypatch)
    monkeypatch.chdir(images)
    with pytest.raises(ConfigError, match=f"{re.escape(says)}$"):
        pack.main(["a", *wrong])
    with pytest.raises(RayStarted):
        pack.main(["a", *followed])


@pytest.mark.parametrize(
    ("wrong", "says", "followed"),
    [
        (["crops.global_crop_size=48"], "can be set here; leave it out$", []),
        (["--image-size=33"], r"; take the size of its global crops, (\d+)$", ["--image-size={}"]),
        (["--rows-per-file=100000000"], r"; set at most (\d+), which fit 1 GiB$", ["--rows-per-file={}"]),
    ],
)
def test_an_embedding_starts(
    wrong: Sequence[str],
    says: str,
    followed: Sequence[str],
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forbid_ray(monkeypatch)
    words = [str(run), f"{run.parent}/train", f"--out={tmp_path}/out"]
    with pytest.raises(ConfigError, match=says) as error:
        embed.main([*words, *wrong])
    found = re.search(says, str(error.value))
    assert found
    with pytest.raises(RayStarted):
        embed.main([*words, *(word.format(*found.groups()) for word in followed)])


@pytest.mark.parametrize(("add", "settings"), [(1, []), (0, ["{}"])])
def test_a_batch_has_images_enough(add: int, settings: Sequence[str]) -> None:
    """Add images, or set what the message says."""
    config = load_config("demo", None, ["data.path=/x"])
    size = config.train.global_batch_size
    with pytest.raises(ConfigError, match=r", or add images$") as error:
        check_images(config, size - 1)
    if settings:
        config = load_config("demo", None, ["data.path=/x", *settings_to_set(str(error.value))])
    check_images(config, size - 1 + add)


def test_a_single_image_gets_company() -> None:
    config = load_config("demo", None, ["data.path=/x", "train.global_batch_size=2"])
    with pytest.raises(ConfigError, match=r"; add images$"):
        check_images(config, 1)
    check_images(config, 2)


# Checkpoints


def test_a_step_is_left_out_or_one_of_those_that_there_are(run: Path) -> None:
    lone = f"{run}/checkpoints/{NAME}"
    with pytest.raises(ConfigError, match=r"; leave --step out, or give the run directory$"):
        open_network(lone, STEP + 1, "teacher")
    assert open_network(lone, None, "teacher").step == STEP
    with pytest.raises(ConfigError, match=r"is not among step_0*(\d+) of .*; choose one of these$") as error:
        open_network(str(run), STEP + 1, "teacher")
    found = re.search(r"among step_0*(\d+)", str(error.value))
    assert found
    assert open_network(str(run), int(found[1]), "teacher").step == STEP


def test_a_folder_without_checkpoints_gives_way_to_a_run_with_one(run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"; give the directory of a run that has written one$"):
        open_network(str(tmp_path), None, "teacher")
    assert open_network(str(run), None, "teacher").step == STEP


@pytest.mark.parametrize(
    ("wrong", "says", "followed"),
    [
        (["{lone}"], "; pass --out FOLDER", ["{lone}", "--out={out}"]),
        (["{lone}", "--out={out}", "--step=2"], "; leave --step out", ["{lone}", "--out={out}"]),
        (["{run}", "--license=my own"], "e.g. apache-2.0, or other", ["{run}", "--license=apache-2.0"]),
        (["{run}", "--license=my own"], "e.g. apache-2.0, or other", ["{run}", "--license=other"]),
        (["{lone}/none"], "; give the directory of a run that has written one", ["{run}"]),
    ],
)
def test_an_export_is_written(
    wrong: Sequence[str], says: str, followed: Sequence[str], tmp_path: Path
) -> None:
    state = trained(tiny_config())
    places = {"lone": checkpoint(state, tmp_path / "lone"), "run": run_directory(tmp_path / "run", state)}

    def words(arguments: Sequence[str]) -> list[str]:
        return [*(one.format(out=tmp_path / "out", **places) for one in arguments), "--format=state_dict"]

    with pytest.raises(DinorayError, match=f"{re.escape(says)}$"):
        export.main(words(wrong))
    export.main(words(followed))


# Evaluations


def test_probes_are_those_that_the_images_allow() -> None:
    with pytest.raises(ConfigError, match=r", or pass --probes ([\w,]+)$") as error:
        chosen_probes("knn", labelled=False)
    assert chosen_probes(str(error.value).rpartition(" ")[2], labelled=False) == [*LABEL_FREE]
    assert chosen_probes("knn", labelled=True) == ["knn"]
    with pytest.raises(ConfigError, match=r"must be one of ") as error:
        chosen_probes("knnn", labelled=True)
    chosen_probes(str(error.value).partition("must be one of ")[2].replace(" ", ""), labelled=True)


def test_a_classification_starts_once_it_has_labelled_images(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_ray(monkeypatch)
    with pytest.raises(
        ConfigError, match=r"; give labelled images, e\.g\. eval\.val_path=\S+ eval\.train_path="
    ):
        evaluate.main([str(run), "--probes=knn"])
    paths = [f"eval.val_path={run.parent}/train", f"eval.train_path={run.parent}/train"]
    with pytest.raises(RayStarted):
        evaluate.main([str(run), "--probes=knn", *paths])


def test_a_lone_checkpoint_is_evaluated_on_images_that_are_set(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_ray(monkeypatch)
    lone = str(shutil.copytree(run / "checkpoints" / NAME, tmp_path / NAME))
    with pytest.raises(ConfigError, match=r"^data\.path: must be set, e\.g\. data\.path="):
        evaluate.main([lone])
    with pytest.raises(RayStarted):
        evaluate.main([lone, f"data.path={run.parent}/train"])


def test_images_without_labels_are_ones_that_can_be_read(run: Path) -> None:
    prober = Prober.__new__(Prober)  # without the Ray that its constructor needs
    prober._config = load_run_config(Directory(str(run)))
    nothing = Features(np.empty((0, 0), np.float32), [], 3)
    with pytest.raises(DataError, match=r"\(3 unreadable\); set data\.path to readable images$"):
        prober._label_free(nothing, ["rankme"])
    some = Features(np.eye(3, dtype=np.float32), ["", "", ""], 0)
    assert prober._label_free(some, ["rankme"])["num_images"] == 3


# Studies

WARMUP = "tune.space={loss.warmup_teacher_temp_epochs: {int: [2, 6]}, loss.teacher_temp: [0.03, 0.04]}"


def test_a_growing_cluster_is_a_cluster() -> None:
    with pytest.raises(
        ResourceError, match=r"; leave it out, or run the study on a cluster with `dinoray submit`$"
    ):
        check_growth(study("tune.cluster_cpus=64"), is_local=True)
    check_growth(study(), is_local=True)
    check_growth(study("tune.cluster_cpus=64"), is_local=False)


def test_batches_above_the_images_are_left_out() -> None:
    space = "tune.space={train.global_batch_size: [64, %s]}"
    config = study(space % 4096, "tune.scheduler=none")
    with pytest.raises(ConfigError, match=r"; leave out values above (\d+)$") as error:
        check_study_size(config, space_of(config), 1000)
    config = study(space % str(error.value).rpartition(" ")[2], "tune.scheduler=none")
    check_study_size(config, space_of(config), 1000)


@pytest.mark.parametrize(
    ("wrong", "says", "followed"),
    [
        ([WARMUP, "tune.epochs=2"], "; leave it out or raise tune.epochs", [WARMUP, "tune.epochs=20"]),
        (["tune.space={qqq.zzz: [1, 2]}"], "; leave it out", []),
        (
            ["tune.space={train.seed: [1, 2]}"],
            "; set tune.confirm_seeds to repeat the best trials",
            ["tune.confirm_seeds=4"],
        ),
        (["tune.space={train.epochs: [1, 2]}"], "; set tune.epochs", ["tune.epochs=2"]),
        (["tune.first=[{qqq.zzz: 1}]"], "; leave it out of tune.first", []),
        (
            ["tune.first=[{loss.teacher_tmp: 0.05}]"],
            "did you mean loss.teacher_temp or loss.warmup_teacher_temp_epochs?",
            ["tune.first=[{loss.teacher_temp: 0.05}]"],
        ),
    ],
)
def test_a_space_is_searched(wrong: Sequence[str], says: str, followed: Sequence[str]) -> None:
    def search(overrides: Sequence[str]) -> None:
        config = study("tune.trials=9", *overrides)
        first_points(config, space_of(config))

    with pytest.raises(ConfigError, match=f"{re.escape(says)}$"):
        search(wrong)
    search(followed)


@pytest.mark.parametrize("followed", ["another name", "--resume"])
def test_a_name_in_use_is_another_or_resumed(followed: str, tmp_path: Path) -> None:
    mine = [f"storage_path={tmp_path}", "name=s"]
    (tmp_path / "s").mkdir()
    (tmp_path / "s/config.yaml").write_text(study(*mine).to_yaml())
    (tmp_path / "s/study.json").write_text("{}")
    changed = study(*mine, "tune.searcher=random")
    with pytest.raises(ConfigError, match=r": choose another name=\.\.\., or pass --resume to continue with"):
        _check_name(Directory(f"{tmp_path}/s"), changed, resume=False)
    if followed == "--resume":
        _check_name(Directory(f"{tmp_path}/s"), changed, resume=True)
    else:
        _check_name(Directory(f"{tmp_path}/t"), changed, resume=False)


@pytest.mark.parametrize("scheduler", ["pb2", "asha"])
def test_the_name_of_a_run_or_a_population_is_another(scheduler: str, tmp_path: Path) -> None:
    mine = [f"storage_path={tmp_path}", "name=s", "tune.scheduler=pb2"]
    mine += ["tune.space={loss.teacher_temp: {uniform: [0.04, 0.06]}}"]
    (tmp_path / "s").mkdir()
    (tmp_path / "s/config.yaml").write_text(study(*mine).to_yaml())
    (tmp_path / "s" / ("study.json" if scheduler == "asha" else "metrics.jsonl")).write_text("{}")
    with pytest.raises(ConfigError, match=r": choose another name=\.\.\.$"):
        tune.main([*mine, f"tune.scheduler={scheduler}", "--resume"])
    other = study(*mine, f"tune.scheduler={scheduler}", "name=t")
    _check_name(Directory(f"{tmp_path}/t"), other, resume=False)


def test_a_run_that_lost_its_metrics_is_trained_again(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match=r"; train again under another name=\.\.\.$"):
        write_result(Directory(str(tmp_path)))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    write_result(Directory(f"{tmp_path}/other"))
