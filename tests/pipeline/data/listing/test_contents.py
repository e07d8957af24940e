"""What lies at `data.path` besides images: output of this program, archives, dates, and wrong addresses."""

from pathlib import Path

import pytest
from samples import parquet, write_all

from dinoray.jobs import pack
from dinoray.jobs.runs.data_lines import data_lines
from dinoray.models.errors import ConfigError, DataError
from dinoray.pipeline.data.manifests.manifest import DataConfig, build_manifest
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.evaluation.class_names import class_mismatch, overlap_warnings
from dinoray.pipeline.evaluation.config import EvalConfig
from dinoray.pipeline.evaluation.labels import held_out, labelled_sources

PHOTOS = {f"{i}.jpg": b"x" for i in range(3)}
RUN = {"config.yaml": b"", "environment.json": b"{}", "crops.png": b"x", "attention/step.png": b"x"}


def text_of(source: Source) -> str:
    """What commands print about the images."""
    return "\n".join(data_lines(source))


def opened(folder: Path, files: dict[str, bytes], **settings: object) -> Source:
    write_all(folder, files)
    config = DataConfig.model_validate({"path": str(folder), **settings})
    return Source(config, build_manifest(config))


def below(folder: str, files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{folder}/{name}": data for name, data in files.items()}


def test_run_directories_and_studies_are_passed_over(tmp_path: Path) -> None:
    files = PHOTOS | below("runs/a", RUN) | below("runs/b", RUN) | {"runs/mine.jpg": b"x"}
    files |= below("runs/s", RUN | {"study.json": b"{}"}) | below("runs/s/trials/0000", RUN)
    source = opened(tmp_path, files)
    assert source.manifest.table["key"].to_pylist() == [*PHOTOS, "runs/mine.jpg"]
    assert text_of(source).endswith("\nignored: 2 run directories (runs/a, runs/b), 1 study (runs/s)")


def test_the_lease_of_a_run_that_is_being_begun_is_not_counted(tmp_path: Path) -> None:
    files = PHOTOS | {"runs/new/lease-00000003.json": b"{}", "runs/s/lease.json": b"{}"}
    assert "ignored" not in text_of(opened(tmp_path / "leases", files))
    assert "ignored: 1 .txt" in text_of(opened(tmp_path / "others", PHOTOS | {"lease.txt": b"x"}))


def test_a_folder_of_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"output of this program .1 run directory .a"):
        opened(tmp_path, below("a", RUN))
    with pytest.raises(DataError, match=r"is a run directory"):
        opened(tmp_path / "a", {})


def test_packed_sets_are_data_unless_images_lie_beside_them(tmp_path: Path) -> None:
    packed = {"_about/pack.json": b"{}", "p.parquet": parquet({"image": [b"x"] * 2})}
    assert opened(tmp_path, below("one", packed)).num_images == 2
    assert "ignored: 1 packed set (one)" in text_of(opened(tmp_path, PHOTOS))


@pytest.mark.parametrize(
    "files",
    [
        [f"2023/{month:02}" for month in range(1, 13)],
        ["2022/1/31", "2023/2/1"],
        ["100CANON", "101_PANA"],
        ["DCIM/Camera", "DCIM/Screenshots"],
    ],
)
def test_dates_and_cameras_are_no_classes(tmp_path: Path, files: list[str]) -> None:
    source = opened(tmp_path, {f"{folder}/{i}.jpg": b"x" for folder in files for i in range(4)})
    assert "the folders are named by" in text_of(source)
    assert not source.has_labels


def test_numbered_folders_stay_classes(tmp_path: Path) -> None:
    source = opened(tmp_path, {f"{folder}/{i}.jpg": b"x" for folder in (1, 999, 2000) for i in range(4)})
    assert "3 class folders" in text_of(source)


def test_flat_validation_folder_is_not_proposed(tmp_path: Path) -> None:
    files = {f"train/{name}/{i}.jpg": b"x" for name in ("cat", "dog") for i in range(4)} | below(
        "val", PHOTOS
    )
    line = text_of(opened(tmp_path, files))
    assert f"data.path={tmp_path}/train or data.exclude='[/val]' keeps them apart" in line


def test_archives_and_patterns_are_named_with_a_remedy(tmp_path: Path) -> None:
    write_all(tmp_path, {"a.zip": b"x", "b.tar.gz": b"x"})
    for path in (tmp_path, tmp_path / "a.zip"):
        with pytest.raises(DataError, match=r"ignored: .*1 .zip; .*unpack .zip: "):
            build_manifest(DataConfig(path=str(path)))
    with pytest.raises(DataError, match=r"data.include='/\*.jpg'$"):
        build_manifest(DataConfig(path=f"{tmp_path}/*.jpg"))
    assert "ignored: 1 .tar.gz, 1 .zip; decompress .tar.gz with gunzip" in text_of(opened(tmp_path, PHOTOS))


def test_keys_that_repeat_are_refused_with_counts(tmp_path: Path) -> None:
    data = parquet({"image": [b"x"] * 40, "what": [i % 20 for i in range(40)]}, row_group_size=40)
    with pytest.raises(ConfigError, match=r"'what'.*first 40 rows .* hold 20 different values"):
        opened(tmp_path, {"a.parquet": data}, key_column="what")


@pytest.mark.parametrize("repeat", [1, 40])
def test_held_out_labels_that_never_repeat_are_warned_of(tmp_path: Path, repeat: int) -> None:
    data = parquet({"image": [b"x"] * 400, "n": [i // repeat for i in range(400)]})
    sides = held_out(
        opened(tmp_path, {"a.parquet": data}, label_column="n"), max_train_images=999, max_val_images=99
    )
    assert sides is not None
    found = class_mismatch(*sides, EvalConfig())
    assert (found is not None and found.is_disjoint) == (repeat == 1)
    if found:
        assert "gives 400 classes to 400 images" in found.text


def test_images_that_vote_for_themselves_are_warned_of(tmp_path: Path) -> None:
    write_all(tmp_path, {f"{side}/{c}/{i}.jpg": b"x" for side in "ab" for c in ("x", "y") for i in range(4)})
    for data, val, warned in (("a", "a", 1), ("", "a", 1), ("a", "", 1), ("a", "b", 0)):
        config = EvalConfig(val_path=str(tmp_path / val))
        sides = labelled_sources(DataConfig(path=str(tmp_path / data)), config)
        assert len(overlap_warnings(sides, config)) == warned


def test_a_wrong_evaluation_path_is_named_first(tmp_path: Path) -> None:
    write_all(tmp_path, PHOTOS)
    with pytest.raises(DataError, match=r"^eval.val_path=/nope: there is no such"):
        labelled_sources(DataConfig(path=str(tmp_path)), EvalConfig(val_path="/nope"))


def test_names_of_labels_are_proposed_and_the_remedy_works(tmp_path: Path) -> None:
    table = {"image": [b"x"] * 4, "label": [0, 1] * 2, "label_name": ["cat", "dog"] * 2}
    write_all(tmp_path, {"t/a.parquet": parquet(table), "v/cat/1.jpg": b"x", "v/dog/1.jpg": b"x"})
    config, data = EvalConfig(val_path=f"{tmp_path}/v"), DataConfig(path=f"{tmp_path}/t")
    sides = labelled_sources(data, config)
    assert sides is not None
    found = class_mismatch(*sides, config)
    assert found is not None
    assert "set data.label_column=label_name, or" in found.text
    sides = labelled_sources(data.model_copy(update={"label_column": "label_name"}), config)
    assert sides is not None
    assert class_mismatch(*sides, config) is None


def test_pack_names_its_own_argument(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^argument source=/nope: there is no such folder"):
        pack.main(["/nope", "--out", str(tmp_path / "out")])
