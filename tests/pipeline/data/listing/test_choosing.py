"""Which images are used: patterns, lists of keys with labels, and the folder that is the label; local and on S3."""

import io
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from samples import parquet, put_all, write_all
from servers import S3Server

from dinoray.jobs.cli.config import apply_overrides
from dinoray.jobs.runs.data_lines import data_lines
from dinoray.models.errors import ConfigError, DataError
from dinoray.pipeline.data.listing.choosing import Patterns, pattern_remedy, regex_of
from dinoray.pipeline.data.manifests.manifest import DataConfig, Manifest, build_manifest
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.evaluation.config import EvalConfig
from dinoray.pipeline.evaluation.labels import held_out, labelled_sources

IMAGE = b"\xff\xd8\xff"
FILES = {
    **{f"train/{name}/{n}.jpg": IMAGE for name in ("cat", "dog") for n in range(4)},
    **{f"val/{name}/{n}.jpg": IMAGE for name in ("cat", "dog") for n in range(2)},
    "train/cat/9.PNG": IMAGE,
    "notes.txt": b"x",
    **{f"runs/a/{name}": b"{}" for name in ("config.yaml", "environment.json", "crops.png")},
}


def listed(path: Path | str, **settings: Any) -> Manifest:
    return build_manifest(DataConfig.model_validate({"path": str(path), **settings}))


def labels_of(manifest: Manifest) -> dict[str, str | None]:
    return dict(zip(manifest.table["key"].to_pylist(), manifest.table["label"].to_pylist(), strict=True))


# Patterns


@pytest.mark.parametrize(
    ("pattern", "matches", "others"),
    [
        ("*.jpg", ["a.jpg", "a/b/c.jpg", "a.jpg/x"], ["a.jpeg", "ajpg"]),
        ("val", ["val/a/1.jpg", "a/val/1.jpg", "val"], ["vals/1.jpg", "a/1val"]),
        ("/val", ["val/1.jpg"], ["a/val/1.jpg"]),
        ("val/", ["val/1.jpg", "a/val/1.jpg"], ["value/1.jpg"]),
        ("a/*.png", ["a/1.png"], ["a/b/1.png", "x/a/1.png"]),
        ("a/**/b", ["a/b/1", "a/x/y/b/1"], ["a/xb/1"]),
        ("a/**", ["a/1", "a/b/1"], ["b/a/1"]),
        ("**/x.jpg", ["x.jpg", "a/b/x.jpg"], ["ax.jpg"]),
        ("[a-c]?.{jpg,png}", ["b1.jpg", "q/c2.png"], ["d1.jpg", "b.jpg", "b1.gif"]),
        ("[!a]*", ["b", "x/b"], ["a"]),
        ("[^a]", ["^", "a"], ["b"]),
        ("a+b(1).jpg", ["a+b(1).jpg"], ["aab(1).jpg"]),
        ("été*", ["étés.jpg"], ["ete.jpg"]),
        ("{a,b*}/1", ["a/1", "bcd/1"], ["c/1"]),
    ],
)
def test_patterns_choose_names_and_folders(pattern: str, matches: list[str], others: list[str]) -> None:
    chosen = Patterns([pattern], []).chosen(pa.array(matches + others))
    assert chosen.to_pylist() == [True] * len(matches) + [False] * len(others)
    kept = Patterns([], [pattern]).chosen(pa.array(matches + others))
    assert kept.to_pylist() == [False] * len(matches) + [True] * len(others)


@given(st.text("ab.*?[]!-{},\\+(", min_size=1, max_size=8), st.text("ab.-{},", min_size=1, max_size=5))
def test_any_text_is_a_pattern_and_means_what_a_shell_means(pattern: str, name: str) -> None:
    matched = pc.match_substring_regex(pa.array([name]), regex_of(pattern))[0].as_py()
    if not set("[]{}") & set(pattern):
        assert matched == fnmatchcase(name, pattern)


@pytest.mark.parametrize("text", ["*.jpg", "{a,b}", "!x", '["*.jpg", val]', "[val]", "a: b"])
def test_a_pattern_on_the_command_line_needs_no_quotes_of_yaml(text: str) -> None:
    tree = apply_overrides({}, [f"data.include={text}"])
    found = DataConfig(path="x", include=tree["data"]["include"]).include
    assert found == {'["*.jpg", val]': ("*.jpg", "val"), "[val]": ("val",)}.get(text, (text,))


@pytest.mark.s3
@pytest.mark.parametrize("store", ["local", "s3"])
def test_what_is_included_and_not_excluded_is_used(
    store: str, s3: S3Server, bucket: str, tmp_path: Path
) -> None:
    if store == "s3":
        put_all(s3, bucket, {f"d/{name}": data for name, data in FILES.items()})
    else:
        write_all(tmp_path / "d", FILES)
    path = f"s3://{bucket}/d" if store == "s3" else str(tmp_path / "d")
    manifest = listed(path, include=["*.jpg", "*.png"], exclude=["/val"])
    prefix = "d/" if store == "s3" else ""
    assert labels_of(manifest) == {
        f"{prefix}train/{name}/{n}.jpg": name for name in ("cat", "dog") for n in range(4)
    }
    line = data_lines(Source(DataConfig(path=path), manifest))[1]
    # The run directory is recognised, although its marks are not included: 4 of val, 1 PNG, a text, 2 marks.
    assert line == "ignored: 8 left out by data.include and data.exclude, 1 run directory (runs/a)"
    with pytest.raises(DataError, match=r"no images under .*; check data.include and data.exclude$"):
        listed(path, include="*.gif")


def test_the_remedy_for_splits_trained_on_together_works(tmp_path: Path) -> None:
    write_all(tmp_path, FILES)
    (note,) = (note for note in listed(tmp_path).notes if "all trained on" in note)
    setting = re.search(r"or data\.exclude='([^']+)'", note)
    assert setting
    data = apply_overrides({"data": {"path": str(tmp_path)}}, [f"data.exclude={setting[1]}"])["data"]
    assert not any("all trained on" in note for note in listed(**data).notes)
    sides = labelled_sources(DataConfig(**data), EvalConfig(val_path=f"{tmp_path}/val"))
    assert sides is not None  # what is excluded from training may be evaluated on
    assert [side.num_images for side in sides] == [9, 4]


@pytest.mark.parametrize(
    ("folders", "excluded"),
    [
        (("coco/train2017", "coco/val2017"), "[/coco/val2017]"),
        (("images/train", "images/test"), "[/images/test]"),
        (("Train", "Validation"), "[/Validation]"),
    ],
)
def test_splits_are_found_at_any_depth(folders: tuple[str, str], excluded: str, tmp_path: Path) -> None:
    write_all(tmp_path, {f"{folder}/{n}.jpg": IMAGE for folder in folders for n in range(3)})
    manifest = listed(tmp_path)
    assert any(f"data.exclude='{excluded}'" in note for note in manifest.notes)
    assert set(labels_of(manifest).values()) == {None}


def test_splits_of_parquet_in_a_folder_are_noted(tmp_path: Path) -> None:
    shard = parquet({"image": [IMAGE] * 2, "label": [0, 1]})
    names = ("train-00000-of-00001", "test-00000-of-00001")
    write_all(tmp_path, {f"data/{name}.parquet": shard for name in names})
    assert any("data.exclude='[/data/test-*]' keeps them apart" in note for note in listed(tmp_path).notes)
    assert listed(tmp_path, exclude=["/data/test-*"]).num_images == 2


def test_a_pattern_in_a_path_is_sent_where_it_belongs() -> None:
    assert pattern_remedy("data.path", "s3://b/a/*/x?.jpg") == (
        "a pattern belongs in data.include: set data.path=s3://b/a data.include='/*/x?.jpg'"
    )
    assert pattern_remedy("eval.val_path", "/a/*.jpg") == (
        "patterns are not supported there: set eval.val_path to a folder"
    )
    assert pattern_remedy("data.path", "/a/b c") is None


# Lists


def as_csv(columns: dict[str, Any], **options: Any) -> bytes:
    sink = io.BytesIO()
    pa_csv.write_csv(pa.table(columns), sink, pa_csv.WriteOptions(**options))
    return sink.getvalue()


KEYS = ["train/cat/0.jpg", "./train/dog/1.jpg", "gone.jpg", "train/cat/0.jpg", "", "val/cat/1.jpg"]
LABELS = ["a", "b", "c", "other", "d", None]
LISTS = {
    "list.csv": as_csv({"file_name": KEYS, "label": LABELS}),
    "list.tsv": as_csv({"label": LABELS, "Path": KEYS}, delimiter="\t"),
    "list.parquet": parquet({"key": KEYS, "label": pa.array(LABELS).dictionary_encode()}),
    "bom.csv": b"\xef\xbb\xbf" + as_csv({"image": KEYS, "class": LABELS}),
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_chooses_images_and_has_their_labels(name: str, tmp_path: Path) -> None:
    write_all(tmp_path, {f"d/{key}": data for key, data in FILES.items()} | {f"d/{name}": LISTS[name]})
    config = DataConfig(path=f"{tmp_path}/d", image_list=f"{tmp_path}/d/{name}")
    manifest = build_manifest(config)
    assert labels_of(manifest) == {"train/cat/0.jpg": "a", "train/dog/1.jpg": "b", "val/cat/1.jpg": None}
    images = Source(config, Manifest.from_bytes(manifest.to_bytes(), config))
    assert images.has_labels
    data, ignored = data_lines(images)
    column = images.config.label_column
    assert f"labels from column {column!r} of data.image_list" in data
    assert "1 keys of data.image_list are not there: gone.jpg" in data
    assert "2 rows of data.image_list are empty or repeat a key" in data
    assert "10 not in data.image_list" in ignored
    assert [fetched.label for fetched in images.fetch(range(3))] == ["a", "b", None]
    sides = held_out(images, max_train_images=9, max_val_images=9)
    assert sides is not None
    assert sum(side.num_images for side in sides) == 2


@pytest.mark.s3
def test_a_list_in_a_bucket_names_objects_whatever_their_names(s3: S3Server, bucket: str) -> None:
    names = [f"s3://{bucket}/d/a.dat", "b.jpg", "shard.json"]
    put_all(s3, bucket, {f"d/{name}": IMAGE for name in ("a.dat", "b.jpg", "c.jpg", "shard.json")})
    put_all(s3, bucket, {"lists/keys.txt": "\n".join(names).encode()})
    manifest = listed(f"s3://{bucket}/d", image_list=f"s3://{bucket}/lists/keys.txt")
    assert [*labels_of(manifest)] == ["d/a.dat", "d/b.jpg", "d/shard.json"]
    assert [(one.kind, one.number) for one in manifest.ignored] == [("unnamed", 1)]


def test_a_list_of_keys_alone_leaves_labels_to_folders(tmp_path: Path) -> None:
    keys = [key for key in FILES if key.endswith(".jpg")]
    write_all(
        tmp_path, {f"d/{key}": data for key, data in FILES.items()} | {"keys.txt": "\n".join(keys).encode()}
    )
    manifest = listed(tmp_path / "d", image_list=str(tmp_path / "keys.txt"))
    assert {*labels_of(manifest).values()} == {"cat", "dog"}
    assert manifest.detected["label_from_parent"] is True


WRONG: dict[str, tuple[dict[str, bytes], dict[str, Any], str]] = {
    "no file": ({}, {}, "there is no such file; check the path"),
    "no table": ({"l.csv": b"a,b\n1\n"}, {}, "is neither CSV nor Parquet .*; write a column of keys"),
    "no column of keys": (
        {"l.csv": b"what,label\nx,y\n"},
        {},
        "has no column of keys; it has what, label; set data.key_column to one of them",
    ),
    "another column": (
        {"l.csv": b"key,label\nx,y\n"},
        {"key_column": "kee"},
        "has no column 'kee'; it has key, label",
    ),
    "no such labels": (
        {"l.csv": b"key,label\nx,y\n"},
        {"label_column": "species"},
        "has no column 'species'; .*; set data.label_column to one of them, or to null",
    ),
    "keys that are no text": (
        {"l.csv": parquet({"key": [[1], [2]]})},
        {},
        r"column 'key' is of type list<.*>, which is no text; set data.key_column to another",
    ),
    "other keys": (
        {"l.csv": b"key\nd/x.jpg\n"},
        {},
        r"none of its 1 keys is at data.path: it has d/x.jpg, there is .*; write keys relative to data.path",
    ),
    "two places": (
        {"l.csv": b"key,label\na/1.jpg,y\n"},
        {"label_from_parent": True},
        "both say where labels are; set data.label_column=null",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_list_that_does_not_fit_is_named_with_a_remedy(case: str, tmp_path: Path) -> None:
    files, settings, message = WRONG[case]
    write_all(tmp_path, {**files, "d/a/1.jpg": IMAGE})
    with pytest.raises((ConfigError, DataError), match=message):
        listed(tmp_path / "d", image_list=str(tmp_path / "l.csv"), **settings)


# Labels of folders


@pytest.mark.parametrize(
    ("level", "labels"),
    [
        (-1, {"a", "b"}),
        (0, {"cat", "dog"}),
        (1, {"split=x"}),
        (-3, {"cat", "dog"}),
        ("split", {"x"}),
        (2, {"a", "b"}),
    ],
)
def test_any_folder_may_be_the_label(level: int | str, labels: set[str], tmp_path: Path) -> None:
    files = {
        f"{name}/split=x/{part}/{n}.jpg": IMAGE for name in ("cat", "dog") for part in "ab" for n in range(2)
    }
    write_all(tmp_path, files)
    config = DataConfig(path=str(tmp_path), label_level=level)
    manifest = build_manifest(config)
    assert {*labels_of(manifest).values()} == labels
    assert Source(config, manifest).has_labels
    assert listed(tmp_path, label_level=level, label_from_parent=True).table == manifest.table


def test_parquet_has_the_label_of_any_folder_too(tmp_path: Path) -> None:
    shard = parquet({"image": [IMAGE] * 2})
    write_all(tmp_path, {f"{name}/part=1/a.parquet": shard for name in ("cat", "dog")})
    config = DataConfig(path=str(tmp_path), label_level=0)
    assert [one.label for one in Source(config, build_manifest(config)).fetch(range(4))] == ["cat"] * 2 + [
        "dog"
    ] * 2


def test_a_level_that_no_image_has_is_refused(tmp_path: Path) -> None:
    write_all(tmp_path, FILES)
    with pytest.raises(
        ConfigError, match=r"data.label_level=7, but no image .* lies in such a folder; set another"
    ):
        listed(tmp_path, label_level=7)
    with pytest.raises(ValidationError, match="leave out one of them"):
        DataConfig(path="x", label_level=0, label_from_parent=False)
