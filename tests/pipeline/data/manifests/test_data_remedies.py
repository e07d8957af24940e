"""Data that cannot be listed as they were asked for: once the message's remedy is followed, they are."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from remedies import command_to_run, settings_to_set
from samples import parquet, write_all

from dinoray.jobs import manifest as manifest_job
from dinoray.jobs.cli.config import apply_overrides
from dinoray.models.errors import ConfigError, DataError, DinorayError
from dinoray.pipeline.data.manifests.manifest import DataConfig, Manifest, build_manifest, load_or_build
from dinoray.pipeline.data.reading.fetched import Fetched
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.storage.files import Directory

Asked = dict[str, Any]
PHOTOS = {f"photos/{i}.jpg": b"x" for i in range(3)}
RUN = {f"run/{name}": b"{}" for name in ("config.yaml", "environment.json")}
TABLE = {"jpeg": [b"1", b"2"], "label": [1, 2], "pair": [[1], [2]], "name": ["a", "b"], "same": ["a", "a"]}
SHARD = {"shards/a.parquet": parquet(TABLE)}


def elsewhere(path: str) -> Callable[[Path, Asked, str], Asked]:
    """Follow by another data.path."""
    return lambda folder, asked, message: {**asked, "path": path}


def without(name: str) -> Callable[[Path, Asked, str], Asked]:
    return lambda folder, asked, message: {key: value for key, value in asked.items() if key != name}


def as_told(folder: Path, asked: Asked, message: str) -> Asked:
    """Follow by the settings that the message names."""
    tree: Asked = apply_overrides({"data": asked}, settings_to_set(message))["data"]
    return tree


def first_named_column(folder: Path, asked: Asked, message: str) -> Asked:
    found = re.search(r"it has '(\w+)'", message)
    assert found
    return {**asked, "image_column": found[1]}


def unpacked(folder: Path, asked: Asked, message: str) -> Asked:
    shutil.unpack_archive(folder / "zips/a.zip", folder / "zips/a")
    return asked


class Wrong(NamedTuple):
    """Settings of `data`, how the message ends, and how it is followed."""

    asked: Asked
    says: str
    follow: Callable[[Path, Asked, str], Asked]


WRONG = {
    "a run directory": Wrong({"path": "run"}, "set it to a folder of images", elsewhere("photos")),
    "runs alone": Wrong({"path": "runs"}, "set it to a folder of images", elsewhere("photos")),
    "no image": Wrong({"path": "texts"}, "check data.path", elsewhere("photos")),
    "archives": Wrong({"path": "zips"}, "unpack .zip: python -m zipfile -e FILE FOLDER", unpacked),
    "a pattern": Wrong(
        {"path": "photos/*.jpg"},
        "data.include='/*.jpg'",
        lambda folder, asked, message: {"path": "photos", "include": "/*.jpg"},
    ),
    "nothing is included": Wrong(
        {"path": "photos", "include": "*.png"}, "check data.include and data.exclude", without("include")
    ),
    "nothing is not excluded": Wrong(
        {"path": "photos", "exclude": "*.jpg"}, "check data.include and data.exclude", without("exclude")
    ),
    "nothing": Wrong({"path": "photoes"}, "check the path", elsewhere("photos")),
    "two kinds": Wrong({"path": "both"}, "point data.path at a folder with one kind", elsewhere("both/p")),
    "no class folders": Wrong(
        {"path": "photos", "label_from_parent": True}, "set data.label_from_parent=false", as_told
    ),
    "a column of images": Wrong(
        {"path": "photos", "label_column": "label"},
        r"unset it (labels of image objects: data.label_from_parent=true)",
        without("label_column"),
    ),
    "no such column": Wrong(
        {"path": "shards", "image_column": "image"}, "to names among these", first_named_column
    ),
    "numbers for images": Wrong(
        {"path": "shards", "image_column": "label"},
        "set data.image_column to such a column",
        lambda folder, asked, message: {**asked, "image_column": "jpeg"},
    ),
    "lists for keys": Wrong(
        {"path": "shards", "key_column": "pair"},
        "set data.key_column and data.label_column to other columns, or to null",
        lambda folder, asked, message: {**asked, "key_column": "name"},
    ),
    "lists for labels": Wrong(
        {"path": "shards", "label_column": "pair"},
        "set data.key_column and data.label_column to other columns, or to null",
        lambda folder, asked, message: {**asked, "label_column": None},
    ),
    "keys that repeat": Wrong(
        {"path": "shards", "key_column": "same"},
        "set another column, or data.key_column=null",
        lambda folder, asked, message: {**asked, "key_column": "name"},
    ),
    "keys that repeat, without keys": Wrong(
        {"path": "shards", "key_column": "same"},
        "set another column, or data.key_column=null",
        lambda folder, asked, message: {**asked, "key_column": None},
    ),
    "no rows": Wrong({"path": "empty"}, "check data.path", elsewhere("shards")),
    "addresses for images": Wrong(
        {"path": "tables"}, "point data.path at the images themselves", elsewhere("photos")
    ),
    "shards in no folder": Wrong(
        {"path": "shards", "label_from_parent": True},
        "or leave data.label_from_parent out",
        without("label_from_parent"),
    ),
    "shards in no folder, with a column": Wrong(
        {"path": "shards", "label_from_parent": True},
        "set data.label_column, or leave data.label_from_parent out",
        lambda folder, asked, message: {"path": "shards", "label_column": "label"},
    ),
    "labels twice": Wrong(
        {"path": "classes", "label_from_parent": True, "label_column": "label"},
        "leave out one of them",
        without("label_column"),
    ),
    "labels twice, the other way": Wrong(
        {"path": "classes", "label_from_parent": True, "label_column": "label"},
        "leave out one of them",
        without("label_from_parent"),
    ),
}


@pytest.fixture
def world(tmp_path: Path) -> Path:
    one = {"image": [b"1"], "label": [1]}
    files = {
        **PHOTOS,
        **RUN,
        **SHARD,
        "texts/a.txt": b"x",
        "tables/a.parquet": parquet({"url": ["http://x"]}),
    }
    files |= {f"runs/{name}": data for name, data in RUN.items()}
    files |= {"both/i/1.jpg": b"x", "both/p/a.parquet": parquet(one)}
    files |= {f"classes/{name}/a.parquet": parquet(one) for name in ("cat", "dog")}
    files["empty/a.parquet"] = parquet({"image": pa.array([], pa.binary())})
    write_all(tmp_path, files)
    shutil.make_archive(str(tmp_path / "zips/a"), "zip", tmp_path / "photos")
    return tmp_path


def listed(folder: Path, asked: Asked) -> Manifest:
    return build_manifest(DataConfig.model_validate({**asked, "path": f"{folder}/{asked['path']}"}))


@pytest.mark.parametrize("mistake", WRONG)
def test_following_the_remedy_gives_a_manifest(mistake: str, world: Path) -> None:
    wrong = WRONG[mistake]
    with pytest.raises(DinorayError) as error:
        listed(world, wrong.asked)
    assert str(error.value).endswith(wrong.says)
    assert listed(world, wrong.follow(world, wrong.asked, str(error.value))).num_images > 0


# data.manifest


def refusal(kind: type[DinorayError], asked: Asked) -> str:
    with pytest.raises(kind) as error:
        build_manifest(DataConfig.model_validate(asked))
    return str(error.value)


def written_by_the_command_of(message: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Run the command that the message names; the file that it then says to set."""
    name, *words = command_to_run(message)
    assert name == "manifest"
    manifest_job.main(words)
    found = re.search(r"data\.manifest=(\S+)", capsys.readouterr().out)
    assert found
    return found[1]


@pytest.mark.parametrize("file", ["manifest-0001.parquet", "pets-0007.parquet", "mine.parquet"])
def test_a_manifest_that_is_missing_is_written_by_the_command_that_is_named(
    file: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {"path": f"{world}/photos", "manifest": f"{world}/lists/{file}"}
    anew = written_by_the_command_of(refusal(DataError, asked), capsys)
    assert build_manifest(DataConfig.model_validate({**asked, "manifest": anew})).num_images == 3
    if file == "manifest-0001.parquet":
        assert anew == asked["manifest"]


@pytest.mark.parametrize("damage", ["torn", "of another version"])
def test_a_manifest_that_is_damaged_is_written_again_once_it_is_deleted(
    damage: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {"path": f"{world}/photos", "manifest": f"{world}/lists/pets-0001.parquet"}
    manifest_job.main([asked["path"], "--out", f"{world}/lists", "--name", "pets"])
    file = Path(asked["manifest"])
    file.write_bytes(b"PAR1" if damage == "torn" else of_another_version(file.read_bytes()))
    capsys.readouterr()
    message = refusal(DataError, asked)
    assert "; delete it, and write another with `dinoray manifest" in message
    file.unlink()
    anew = written_by_the_command_of(message, capsys)
    assert build_manifest(DataConfig.model_validate({**asked, "manifest": anew})).num_images == 3


@pytest.mark.parametrize("name", ["manifest", "pets"])
@pytest.mark.parametrize(
    "other",
    [{"path": "photos"}, {"label_from_parent": False}, {"label_from_parent": False, "key_column": None}],
)
def test_a_manifest_that_does_not_fit_has_two_remedies(
    other: Asked, name: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_all(world, {f"pets/{label}/{i}.jpg": b"x" for label in ("cat", "dog") for i in range(3)})
    manifest_job.main([f"{world}/pets", "--out", f"{world}/lists", "--name", name])
    other = {**other, **({"path": f"{world}/{other['path']}"} if "path" in other else {})}
    asked = {"path": f"{world}/pets", "manifest": f"{world}/lists/{name}-0001.parquet"} | other
    message = refusal(ConfigError, asked)
    build_manifest(DataConfig.model_validate(as_told(world, asked, message)))
    capsys.readouterr()
    anew = written_by_the_command_of(message, capsys)
    assert build_manifest(DataConfig.model_validate({**asked, "manifest": anew})).num_images in (3, 6)


# The manifest of a run


def of_another_version(data: bytes) -> bytes:
    """The same manifest as another version of the program would have written it."""
    table = pq.read_table(pa.BufferReader(data))
    ((key, about),) = table.schema.metadata.items()
    told = {**json.loads(about), "version": 99}
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({key: json.dumps(told)}), sink)
    return bytes(sink.getvalue().to_pybytes())


def begun(world: Path) -> tuple[DataConfig, Directory]:
    """A run that has begun on the photos."""
    config, run = DataConfig(path=f"{world}/photos"), Directory(f"{world}/begun")
    load_or_build(config, run)
    run.write("config.yaml", b"")
    return config, run


@pytest.mark.parametrize("damage", [lambda data: data[:-20], of_another_version], ids=["torn", "version"])
def test_a_run_lists_again_once_its_manifest_is_deleted(
    world: Path, damage: Callable[[bytes], bytes]
) -> None:
    config, run = begun(world)
    run.write("manifest.parquet", damage(run.read("manifest.parquet")))
    with pytest.raises(DataError, match=rf"; delete it to list {world}/photos again$"):
        load_or_build(config, run)
    run.delete("manifest.parquet")
    assert load_or_build(config, run).num_images == 3


def test_a_run_on_other_images_wants_another_name_or_its_own_again(world: Path) -> None:
    config, run = begun(world)
    other = DataConfig(path=f"{world}/both/i")
    with pytest.raises(ConfigError, match=r"; give the run another name, or set the old value$"):
        load_or_build(other, run)
    assert load_or_build(other, Directory(f"{world}/another")).num_images == 1
    assert load_or_build(config, run).num_images == 3


@pytest.mark.parametrize("kind", ["images", "rows"])
def test_what_has_changed_is_read_once_the_manifest_is_removed(kind: str, world: Path) -> None:
    file = world / ("photos/1.jpg" if kind == "images" else "shards/a.parquet")
    config = DataConfig(path=str(file.parent))
    run = Directory(f"{world}/of_changed")

    def fetched() -> list[Fetched]:
        source = Source(config, load_or_build(config, run))
        return list(source.fetch(range(source.num_images)))

    assert [one.data for one in fetched() if one.data is None] == []
    grown = parquet({name: [*column, column[0]] for name, column in TABLE.items()}, row_group_size=3)
    file.write_bytes(b"longer" if kind == "images" else grown)
    changed = [one for one in fetched() if one.data is None]
    assert changed
    assert all(str(one.reason).endswith("; remove the manifest to list the data again") for one in changed)
    run.delete("manifest.parquet")
    assert [one.data for one in fetched() if one.data is None] == []
