"""What lies at `data.path` is detected: folders, columns and labels, the line about it, and that it is kept."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from samples import parquet, put_all, write_all
from servers import S3Server

from dinoray.jobs.runs.data_lines import data_lines
from dinoray.models.errors import ConfigError
from dinoray.pipeline.data.decoding.decode import decode
from dinoray.pipeline.data.demo_images import draw_demo_image
from dinoray.pipeline.data.listing.folder_labels import folder_label
from dinoray.pipeline.data.manifests.manifest import DataConfig, build_manifest, load_or_build
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.evaluation.config import EvalConfig
from dinoray.pipeline.evaluation.labels import held_out, labelled_sources
from dinoray.pipeline.storage.files import Directory

ROWS = 12
IMAGE = draw_demo_image("dots", "train", 0)
LOOSE = {f"{i}.jpg": b"x" for i in range(ROWS)}
CLASSES = {f"{label}/{i}.jpg": b"x" for label in ("cat", "dog", "owl") for i in range(4)}


def text_of(source: Source) -> str:
    """What commands print about the images."""
    return "\n".join(data_lines(source))


def detect(folder: Path, files: Mapping[str, bytes] | None = None, **settings: Any) -> Source:
    write_all(folder, dict(files or {}))
    config = DataConfig(path=str(folder), **settings)
    return Source(config, build_manifest(config))


def line(source: Source) -> str:
    return text_of(source).replace(source.manifest.path, "PATH")


FOLDERS: dict[str, tuple[dict[str, bytes], str, set[str | None]]] = {
    "loose": (LOOSE, "data: 12 images at PATH (no labels: there are no class folders)", {None}),
    "one image": ({"a.jpg": b"x"}, "data: 1 image at PATH (no labels: there are no class folders)", {None}),
    "class folders": (
        CLASSES,
        "data: 12 images in 3 class folders at PATH (labels from folder names; data.label_from_parent=false "
        "ignores them)",
        {"cat", "dog", "owl"},
    ),
    "class folders among others": (
        {f"pets/{name}": data for name, data in CLASSES.items()} | {"notes.txt": b""},
        "data: 12 images in 3 class folders at PATH (labels from folder names; data.label_from_parent=false "
        "ignores them)\nignored: 1 .txt",
        {"cat", "dog", "owl"},
    ),
    "some loose": (
        CLASSES | {"extra.jpg": b"x"},
        "data: 13 images in 3 class folders (1 outside of them) at PATH (labels from folder names; "
        "data.label_from_parent=false ignores them)",
        {"cat", "dog", "owl", None},
    ),
    "most loose": (
        {"a/1.jpg": b"x", "a/2.jpg": b"x", "b/1.jpg": b"x", "b/2.jpg": b"x"} | LOOSE,
        "data: 16 images at PATH (no labels: most images lie outside of class folders; "
        "data.label_from_parent=true takes folder names as labels)",
        {None},
    ),
    "one folder": (
        {f"all/{name}": data for name, data in LOOSE.items()},
        "data: 12 images at PATH (no labels: one folder makes no classes; "
        "data.label_from_parent=true takes folder names as labels)",
        {None},
    ),
    "a folder per image": (
        {f"{i}-x/a.jpg": b"x" for i in range(5)},
        "data: 5 images at PATH (no labels: the 5 folders hold hardly more than an image each; "
        "data.label_from_parent=true takes folder names as labels)",
        {None},
    ),
    "numbered shards": (
        {f"0000{i % 3}/{i}.jpg": b"x" for i in range(ROWS)},
        "data: 12 images at PATH (no labels: the folders are named by numbers or dates; "
        "data.label_from_parent=true takes folder names as labels)",
        {None},
    ),
    "years and months": (
        {f"{2019 + i % 3}-05/{i}.jpg": b"x" for i in range(ROWS)},
        "data: 12 images at PATH (no labels: the folders are named by numbers or dates; "
        "data.label_from_parent=true takes folder names as labels)",
        {None},
    ),
    "digits": (
        {f"{i % 3}/{i}.jpg": b"x" for i in range(ROWS)},
        "data: 12 images in 3 class folders at PATH (labels from folder names; data.label_from_parent=false "
        "ignores them)",
        {"0", "1", "2"},
    ),
    "train and val": (
        {f"{part}/{name}": data for part in ("val", "train") for name, data in CLASSES.items()},
        "data: 24 images in 3 class folders at PATH (labels from folder names; data.label_from_parent=false "
        "ignores them; train, val are all trained on; data.path=PATH/train eval.val_path=PATH/val or "
        "data.exclude='[/val]' keeps them apart)",
        {"cat", "dog", "owl"},
    ),
    "train and test without classes": (
        {f"{part}/{name}": data for part in ("test", "train") for name, data in LOOSE.items()},
        "data: 24 images at PATH (no labels: there are no class folders; data.label_from_parent=true takes folder "
        "names as labels; train, test are all trained on; data.path=PATH/train or data.exclude='[/test]' keeps them "
        "apart)",
        {None},
    ),
    "pairs": (
        {f"split=train/label={name}": data for name, data in CLASSES.items()},
        "data: 12 images in 3 class folders at PATH (labels from folder names; data.label_from_parent=false "
        "ignores them)",
        {"cat", "dog", "owl"},
    ),
    "images beside a table about them": (
        LOOSE | {"metadata.parquet": parquet({"url": ["a", "b"]})},
        "data: 12 images at PATH (no labels: there are no class folders)\nignored: 1 .parquet",
        {None},
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_are_told_apart_in_one_line(tmp_path: Path, case: str) -> None:
    files, expected, labels = FOLDERS[case]
    source = detect(tmp_path, files)
    assert line(source) == expected
    assert set(source.manifest.table["label"].to_pylist()) == labels
    assert source.has_labels == (labels != {None})


def test_settings_override_what_folders_look_like(tmp_path: Path) -> None:
    write_all(tmp_path, CLASSES)
    plain = detect(tmp_path, label_from_parent=False)
    assert (plain.has_labels, line(plain)) == (False, "data: 12 images at PATH (no labels)")
    forced = detect(tmp_path / "one", {"all/1.jpg": b"x", "2.jpg": b"x"}, label_from_parent=True)
    assert (
        line(forced)
        == "data: 2 images in 1 class folder (1 outside of them) at PATH (labels from folder names)"
    )


def columns_of(source: Source) -> tuple[str | None, ...]:
    config = source.config
    return config.image_column, config.key_column, config.label_column


def hub_metadata(**features: Any) -> dict[bytes, bytes]:
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}


def struct_of_bytes(num_rows: int = ROWS) -> pa.Array:
    return pa.array([{"bytes": IMAGE, "path": None}] * num_rows)


CLASS_LABEL = {"names": ["cat", "dog"], "_type": "ClassLabel"}
HALVES = [i % 2 for i in range(ROWS)]
NUMBERED = [f"{i:09}" for i in range(ROWS)]
IMAGES = pa.array([IMAGE] * ROWS, pa.binary())
SCHEMAS: dict[str, tuple[pa.Table, tuple[str | None, ...], list[str]]] = {
    "packed": (
        pa.table({"image": IMAGES, "key": NUMBERED, "label": [f"c{i}" for i in HALVES]}),
        ("image", "key", "label"),
        ["images from column 'image', keys from column 'key'", "labels from column 'label'"],
    ),
    "packed without labels": (
        pa.table({"image": IMAGES, "key": NUMBERED, "label": pa.nulls(ROWS, pa.string())}),
        ("image", "key", None),
        ["no labels: column 'label' is empty; data.label_column=label takes it"],
    ),
    "Hugging Face": (
        pa.table({"img": struct_of_bytes(), "fine_label": HALVES, "text": NUMBERED}),
        ("img", None, "fine_label"),
        ["labels from column 'fine_label'; data.label_column=null ignores them"],
    ),
    "Hugging Face with names of its own": (
        pa.table(
            {"mask": struct_of_bytes(), "scan": struct_of_bytes(), "tissue": HALVES}
        ).replace_schema_metadata(
            hub_metadata(scan={"_type": "Image"}, tissue=CLASS_LABEL, mask={"_type": "Value"})
        ),
        ("scan", None, "tissue"),
        ["column 'scan' holds the images; data.image_column=mask takes another"],
    ),
    "img2dataset": (
        pa.table({"url": NUMBERED, "key": NUMBERED, "status": ["success"] * ROWS, "webp": IMAGES}),
        ("webp", "key", None),
        ["no labels: no column is named like one; data.label_column=NAME takes one"],
    ),
    "WebDataset on the Hub": (
        pa.table({"jpg": struct_of_bytes(), "cls": HALVES, "__key__": NUMBERED, "__url__": ["u"] * ROWS}),
        ("jpg", "__key__", "cls"),
        [],
    ),
    "one label": (
        pa.table({"image": IMAGES, "label": [7] * ROWS}),
        ("image", None, None),
        ["no labels: column 'label' holds one class"],
    ),
    "an id that repeats": (
        pa.table({"image": IMAGES, "image_id": HALVES, "id": list(range(ROWS))}),
        ("image", "id", None),
        [],
    ),
    "an embedding beside the image": (
        pa.table({"embedding": pa.array([b"\0\1"] * ROWS), "frame": IMAGES}),
        ("frame", None, None),
        ["column 'frame' holds the images; data.image_column=embedding takes another"],
    ),
    "two images": (
        pa.table({"left": IMAGES, "right": IMAGES}),
        ("left", None, None),
        ["column 'left' holds the images; data.image_column=right takes another"],
    ),
    "a score and a list are no labels": (
        pa.table({"image": IMAGES, "target": [0.5] * ROWS, "labels": [[1]] * ROWS}),
        ("image", None, None),
        [],
    ),
}


@pytest.mark.parametrize("case", SCHEMAS)
def test_columns_are_found_and_named_in_the_line(tmp_path: Path, case: str) -> None:
    table, expected, words = SCHEMAS[case]
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=5)
    source = detect(tmp_path)
    assert columns_of(source) == expected
    for word in words:
        assert word in line(source)
    for fetched in source.fetch(range(ROWS)):
        assert fetched.data == IMAGE
        assert (fetched.label is None) == (expected[2] is None)


def test_a_file_as_hugging_face_datasets_writes_it() -> None:
    """Written by `datasets` 5.2: Dataset.from_dict(rows, Features(image=Image(), label=ClassLabel(...))).to_parquet."""
    source = detect(Path(__file__).with_name("huggingface_dataset.parquet"))
    assert columns_of(source) == ("image", None, "label")
    assert (
        "data: 12 images in 1 Parquet file at PATH (images from column 'image'; labels from column 'label'"
        in line(source)
    )
    found = source.fetch(range(12))
    assert [fetched.label for fetched in found] == ["cat", "dog", "owl"] * 4
    assert {decode(fetched.data or b"", max_pixels=1000).shape for fetched in found} == {(16, 16, 3)}


def test_shards_of_several_splits_in_one_folder_are_noted(tmp_path: Path) -> None:
    shard = parquet({"image": [IMAGE] * 2, "label": [0, 1]})
    files = {f"{part}-00000-of-00001.parquet": shard for part in ("test", "train", "validation")}
    note = (
        "train, test, validation are all trained on; data.exclude='[/test-*, /validation-*]' keeps them apart"
    )
    assert note in line(detect(tmp_path / "one", files))
    apart = {f"{name.partition('-')[0]}/{name}": data for name, data in files.items()}
    root = tmp_path / "apart"
    note = f"data.path={root}/train eval.val_path={root}/test or data.exclude='[/test, /validation]' keeps them apart"
    assert note in text_of(detect(root, apart))
    assert "all trained on" not in line(detect(root / "train"))
    sides = labelled_sources(DataConfig(path=f"{root}/train"), EvalConfig(val_path=f"{root}/test"))
    assert sides is not None
    assert [side.num_images for side in sides] == [2, 2]


def test_settings_override_what_columns_look_like(tmp_path: Path) -> None:
    pq.write_table(SCHEMAS["packed"][0].append_column("mask", IMAGES), tmp_path / "a.parquet")
    asked = {"image_column": "mask", "key_column": None, "label_column": "key"}
    source = detect(tmp_path, **asked)
    assert columns_of(source) == ("mask", None, "key")
    assert "images from column 'mask'; labels from column 'key'" in line(source)
    assert columns_of(detect(tmp_path, label_column=None)) == ("image", "key", None)


def test_labels_of_partitioned_shards_are_in_their_folders(tmp_path: Path) -> None:
    shard = parquet({"image": [IMAGE] * 2})
    source = detect(tmp_path, {"label=cat/a.parquet": shard, "label=a%20dog/b.parquet": shard})
    assert [fetched.label for fetched in source.fetch(range(4))] == ["a dog", "a dog", "cat", "cat"]
    assert "in 2 Parquet files in 2 class folders" in line(source)
    assert not detect(tmp_path, label_from_parent=False).has_labels
    assert not detect(tmp_path, label_column=None).has_labels
    by_name = detect(tmp_path, label_column="label", label_from_parent=False)
    assert [fetched.label for fetched in by_name.fetch(range(4))] == ["a dog", "a dog", "cat", "cat"]
    with pytest.raises(
        ConfigError, match=r"set data\.label_from_parent=true and leave out data\.label_column"
    ):
        detect(tmp_path, label_column="class")
    assert detect(tmp_path, label_from_parent=True).has_labels  # the remedy
    with pytest.raises(ConfigError, match="both say where labels are"):
        detect(tmp_path, label_from_parent=True, label_column="label")


@pytest.mark.parametrize(
    ("folders", "label"),
    [([], None), (["a", "b"], "b"), (["label=x", "year=2019"], "x"), (["year=2019"], "year=2019")],
)
def test_the_label_of_a_file(folders: list[str], label: str | None) -> None:
    assert folder_label(folders) == label


def test_what_was_detected_is_kept_with_the_run(tmp_path: Path) -> None:
    config = DataConfig(path=str(tmp_path / "data"))
    write_all(tmp_path / "data", CLASSES)
    run = Directory(str(tmp_path / "run"))
    first = Source(config, load_or_build(config, run))
    run.write("config.yaml", b"")  # the run has begun
    write_all(tmp_path / "data", {f"{i}.jpg": b"x" for i in range(40)})  # now most are loose
    again = Source(config, load_or_build(config, run))
    assert (again.config, again.manifest, line(again)) == (first.config, first.manifest, line(first))
    assert Source(config, build_manifest(config)).config != first.config
    explicit = config.model_copy(update={"label_from_parent": True})
    assert load_or_build(explicit, run) == first.manifest
    with pytest.raises(
        ConfigError, match=r"label_from_parent=False, but the manifest .* was listed with True"
    ):
        load_or_build(config.model_copy(update={"label_from_parent": False}), run)


def test_a_manifest_of_explicit_settings_holds_for_a_run_that_has_begun(tmp_path: Path) -> None:
    write_all(tmp_path / "data", CLASSES)
    explicit = DataConfig(
        path=str(tmp_path / "data"), key_column=None, label_column=None, label_from_parent=False
    )
    run = Directory(str(tmp_path / "run"))
    load_or_build(explicit, run)
    config = DataConfig(path=str(tmp_path / "data"))
    assert Source(config, load_or_build(config, run)).has_labels  # the attempt had not begun
    load_or_build(explicit, run)
    run.write("config.yaml", b"")
    assert not Source(config, load_or_build(config, run)).has_labels


def test_the_held_out_part_is_a_fixed_fifth_of_the_labelled_images(tmp_path: Path) -> None:
    source = detect(tmp_path, {f"{c}/{i}.jpg": b"x" for c in "ab" for i in range(50)} | {"z.jpg": b"x"})
    split = held_out(source, max_train_images=50_000, max_val_images=10_000)
    assert split is not None
    train, val = ([side.key(i) for i in range(side.num_images)] for side in split)
    assert (len(train), len(val)) == (80, 20)
    assert sorted(train + val) == sorted({source.key(i) for i in range(101)} - {"z.jpg"})
    assert {key[0] for key in val} == {"a", "b"}
    again = held_out(detect(tmp_path), max_train_images=30, max_val_images=7)
    assert again is not None
    few = [[side.key(i) for i in range(side.num_images)] for side in again]
    assert [len(keys) for keys in few] == [30, 7]
    assert not set(few[0]) & set(few[1])
    assert held_out(detect(tmp_path, label_from_parent=False), max_train_images=9, max_val_images=9) is None


def test_the_held_out_part_of_rows_has_their_own_labels(tmp_path: Path) -> None:
    pq.write_table(SCHEMAS["packed"][0], tmp_path / "a.parquet", row_group_size=5)
    source = detect(tmp_path)
    split = held_out(source, max_train_images=99, max_val_images=99)
    assert split is not None
    whole = {fetched.key: fetched.label for fetched in source.fetch(range(ROWS))}
    parts = [fetched for side in split for fetched in side.fetch(range(side.num_images))]
    assert {fetched.key: fetched.label for fetched in parts} == whole
    np.testing.assert_equal([side.num_images for side in split], [10, 2])


@pytest.mark.parametrize("statistics", [True, False])
def test_rows_without_a_label_are_not_evaluated(tmp_path: Path, statistics: bool) -> None:
    labels = ["a", "b"] * 5 + [None] * 5 + ["a", None, "b", "b", "a"] + ["a"] * 5
    table = pa.table({"image": pa.array([IMAGE] * 25), "key": [str(i) for i in range(25)], "label": labels})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=5, write_statistics=statistics)
    source = detect(tmp_path)
    assert ("6 rows have no label" in line(source)) == statistics
    split = held_out(source, max_train_images=99, max_val_images=99)
    assert split is not None
    found = [fetched for side in split for fetched in side.fetch(range(side.num_images))]
    assert sorted(int(f.key) for f in found) == [i for i, label in enumerate(labels) if label]
    sides = labelled_sources(DataConfig(path=str(tmp_path)), EvalConfig(val_path=str(tmp_path)))
    assert sides is not None
    assert [side.num_images for side in sides] == [19, 19]


@pytest.mark.s3
def test_a_bucket_is_told_apart_as_a_folder_is(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    files = {f"i/{name}": data for name, data in CLASSES.items()} | {f"l/{k}": v for k, v in LOOSE.items()}
    pq.write_table(SCHEMAS["an embedding beside the image"][0], tmp_path / "a.parquet")
    put_all(s3, bucket, {**files, "p/a.parquet": (tmp_path / "a.parquet").read_bytes()})
    for prefix, words in (
        ("i", "3 class folders"),
        ("l", "no labels"),
        ("p", "column 'frame' holds the images"),
    ):
        config = DataConfig(path=f"s3://{bucket}/{prefix}")
        assert words in text_of(Source(config, build_manifest(config)))
