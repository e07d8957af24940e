"""Classes of an evaluation that no training image has are named before anything is computed."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jobs_processes import TINY
from no_ray import RayStarted, forbid_ray

from dinoray.jobs import pretrain, tune
from dinoray.jobs.cli.config import load_config
from dinoray.models.errors import ConfigError
from dinoray.pipeline.data.demo_images import draw_demo_image
from dinoray.pipeline.data.manifests.manifest import DataConfig, build_manifest
from dinoray.pipeline.data.parquet.parquet_rows import read_column
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.evaluation import class_names
from dinoray.pipeline.evaluation.class_names import Mismatch, class_mismatch
from dinoray.pipeline.evaluation.config import EvalConfig
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.worker.inputs import Inputs


def folders(at: Path, labels: Mapping[str, int]) -> Source:
    """So many images per class, which nothing here decodes."""
    for label, number in labels.items():
        (at / label).mkdir(parents=True)
        for i in range(number):
            (at / label / f"{i}.jpg").write_bytes(b"no picture")
    config = DataConfig(path=str(at), label_from_parent=True)
    return Source(config, build_manifest(config))


def shards(at: Path, *groups: Sequence[str | int | None]) -> Source:
    """A shard per group of labels, two rows a row group."""
    at.mkdir()
    for number, labels in enumerate(groups):
        table = pa.table({"image": [b"no picture"] * len(labels), "label": pa.array(labels)})
        pq.write_table(table, at / f"{number}.parquet", row_group_size=2)
    config = DataConfig(path=str(at), label_column="label", fetch_concurrency=16)
    return Source(config, build_manifest(config))


def compared(train: Source, val: Source, **settings: object) -> Mismatch:
    config = EvalConfig.model_validate({"val_path": val.config.path, **settings})
    found = class_mismatch(train, val, config)
    assert found is not None
    return found


def test_disjoint_classes_are_both_named_with_counts_and_a_remedy(tmp_path: Path) -> None:
    train = folders(tmp_path / "train", dict.fromkeys(("n01", "n02", "n03", "n04", "n05"), 1))
    val = folders(tmp_path / "val", {"tench": 1, "church": 2})
    found = compared(train, val)
    assert found.is_disjoint
    assert found.text == (
        "k-NN and linear accuracy have no meaning, because the classes are disjoint: "
        f"eval.val_path={tmp_path}/val has 2 classes ('church', 'tench'), "
        f"data.path={tmp_path}/train has 5 classes ('n01', 'n02', 'n03' and 2 more); "
        "set eval.train_path and eval.val_path to images that share class names"
    )


def test_following_the_remedy_ends_the_warning(tmp_path: Path) -> None:
    val = folders(tmp_path / "val", {"tench": 1})
    voters = folders(tmp_path / "voters", {"tench": 1, "church": 1})
    assert class_mismatch(voters, val, EvalConfig(val_path="val", train_path="voters")) is None


def test_the_training_set_is_named_by_its_setting(tmp_path: Path) -> None:
    train, val = folders(tmp_path / "a", {"x": 1}), folders(tmp_path / "b", {"y": 1})
    assert f"eval.train_path={tmp_path}/a has 1 class ('x')" in compared(train, val, train_path="a").text


def test_some_classes_without_training_images_are_counted_with_their_images(tmp_path: Path) -> None:
    train = folders(tmp_path / "train", {"a": 1, "b": 1})
    val = folders(tmp_path / "val", {"a": 2, "y": 3, "z": 4})
    found = compared(train, val)
    assert not found.is_disjoint
    assert found.text == (
        f"2 of 3 classes of eval.val_path={tmp_path}/val ('y', 'z') have no training image: "
        f"data.path={tmp_path}/train has 2 classes ('a', 'b'); 7 of 9 validation images count as wrong; "
        "add training images of these classes, or remove the classes from eval.val_path"
    )


def test_classes_that_the_subset_misses_name_the_setting_that_limits_it(tmp_path: Path) -> None:
    train = folders(tmp_path / "train", {"a": 40, "b": 1})
    val = folders(tmp_path / "val", {"a": 1, "b": 1})
    assert class_mismatch(train, val, EvalConfig(val_path="val", max_train_images=41)) is None
    assert "raise eval.max_train_images=2, or" in compared(train, val, max_train_images=2).text


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ({"a": 1, "b": 1}, {"a": 1}),
        ({"a": 1}, {"a": 3}),
    ],
)
def test_shared_classes_are_no_mismatch(tmp_path: Path, train: dict[str, int], val: dict[str, int]) -> None:
    sides = folders(tmp_path / "train", train), folders(tmp_path / "val", val)
    assert class_mismatch(*sides, EvalConfig(val_path="val")) is None


def test_labels_of_parquet_are_compared_as_text(tmp_path: Path) -> None:
    train, val = shards(tmp_path / "train", [0, 1], [2]), shards(tmp_path / "val", ["0", "2", "tench"])
    assert "1 of 3 classes" in (text := compared(train, val).text)
    assert "('tench')" in text
    assert "has 3 classes ('0', '1', '2')" in text


def test_labels_of_parquet_are_read_until_all_classes_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, val = shards(tmp_path / "train", *[["a", "b"]] * 40), shards(tmp_path / "val", ["b"])
    read: list[str] = []

    def counted(uri: str, *args: object, **settings: object) -> list[str | None]:
        read.append(uri)
        return read_column(uri, *args, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(class_names, "read_column", counted)
    assert class_mismatch(train, val, EvalConfig(val_path="val")) is None
    assert len(read) <= 1 + 16  # data.fetch_concurrency


def test_images_without_a_label_have_no_class(tmp_path: Path) -> None:
    train, val = shards(tmp_path / "train", ["", None, " "]), shards(tmp_path / "val", ["a", None])
    found = compared(train, val)
    assert found.is_disjoint
    assert f"data.path={tmp_path}/train has 0 classes; set" in found.text
    assert (
        class_mismatch(val, train, EvalConfig(val_path="val")) is None
    )  # the evaluation names the first one


def test_a_shard_that_is_gone_has_no_classes(tmp_path: Path) -> None:
    train, val = shards(tmp_path / "train", ["a"], ["b"]), shards(tmp_path / "val", ["a", "b"])
    (tmp_path / "train" / "1.parquet").unlink()
    assert "('b')" in compared(train, val).text


def test_a_long_name_with_a_line_end_stays_on_one_line(tmp_path: Path) -> None:
    train, val = shards(tmp_path / "train", ["a"]), shards(tmp_path / "val", ["x\n" + "y" * 500])
    text = compared(train, val).text
    assert "\n" not in text
    assert len(text) < 500


# In the jobs


@pytest.fixture
def disjoint(tmp_path: Path) -> list[str]:
    """Settings of a tiny run with readable images of disjoint classes."""
    for split, label in (("train", "dots"), ("val", "rings")):
        (tmp_path / split / f"[{label}]").mkdir(parents=True)
        for i in range(8):
            file = tmp_path / split / f"[{label}]" / f"{i}.jpg"
            file.write_bytes(draw_demo_image(label, split, i))
    paths = [f"data.path={tmp_path}/train", f"eval.val_path={tmp_path}/val", f"storage_path={tmp_path}/runs"]
    return [*TINY, *paths, "data.label_from_parent=true", "name=tiny"]


def test_pretrain_warns_before_ray_starts(
    disjoint: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forbid_ray(monkeypatch)
    with pytest.raises(RayStarted):
        pretrain.main(["--recipe", "demo", *disjoint])
    lines = capsys.readouterr().out.splitlines()
    warnings = [line for line in lines if line.startswith("warning: ") and "disjoint" in line]
    assert len(warnings) == 1
    assert "('[rings]')" in warnings[0]
    assert "('[dots]')" in warnings[0]


def test_a_run_with_disjoint_classes_counts_as_unlabelled(disjoint: list[str], tmp_path: Path) -> None:
    inputs = Inputs.open(load_config("demo", None, disjoint), Directory(str(tmp_path / "run")))
    assert inputs.labelled is None
    shared = [*disjoint, f"eval.train_path={tmp_path}/val"]
    inputs = Inputs.open(load_config("demo", None, shared), Directory(str(tmp_path / "other")))
    assert inputs.labelled is not None
    assert inputs.mismatch is None


def test_a_study_that_would_rank_by_disjoint_classes_is_refused(
    disjoint: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_ray(monkeypatch)
    study = ["--recipe", "demo", *disjoint]
    with pytest.raises(ConfigError, match=r"disjoint.*or set tune\.objective=rankme"):
        tune.main(study)
    with pytest.raises(RayStarted):
        tune.main([*study, "tune.objective=rankme"])
