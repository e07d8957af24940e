"""The command manifest: what it writes and prints, what has changed at a second call, and runs that use the file."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import parquet, put_all, write_all
from servers import S3Server

from dinoray.jobs import manifest as job
from dinoray.jobs.runs.listing import describe_objects, newest_number
from dinoray.models.errors import ConfigError, DataError
from dinoray.pipeline.data.manifests.changes import changes_between
from dinoray.pipeline.data.manifests.manifest import DataConfig, Manifest, build_manifest, load_or_build
from dinoray.pipeline.evaluation.config import EvalConfig
from dinoray.pipeline.evaluation.labels import labelled_sources
from dinoray.pipeline.storage import pages
from dinoray.pipeline.storage.files import Directory

Printed = pytest.CaptureFixture[str]


def run(capsys: Printed, *arguments: str) -> list[str]:
    """What the command prints."""
    job.main(arguments)
    return capsys.readouterr().out.splitlines()


@pytest.mark.s3
def test_a_second_call_on_a_grown_bucket_writes_a_new_manifest_and_tells_the_difference(
    s3: S3Server, bucket: str, tmp_path: Path, capsys: Printed
) -> None:
    put_all(s3, bucket, {f"data/{name}.jpg": b"1" for name in "abcd"} | {"data/e.PNG": b"x" * 20_000})
    put_all(s3, bucket, {"data/notes.txt": b"1"})
    path, out = f"s3://{bucket}/data", str(tmp_path / "lists")
    first = run(capsys, path, "--out", out, "--name", "pets")
    assert first[0] == f"data: 5 images at {path} (no labels: there are no class folders)"
    assert first[1:5] == [
        "ignored: 1 .txt",
        "names: 4 .jpg, 1 .png",
        "sizes: 4 below 10 kB, 1 below 100 kB; 0.000 GB in all",
        f"manifest: {out}/pets-0001.parquet",
    ]
    assert first[-1].endswith(f"dinoray pretrain data.path={path} data.manifest={out}/pets-0001.parquet")

    put_all(s3, bucket, {f"data/new{number}.jpg": b"1" for number in range(5)} | {"data/b.jpg": b"2"})
    s3.client().delete_object(Bucket=bucket, Key="data/a.jpg")
    second = run(capsys, path, "--out", out, "--name", "pets")
    start = second.index(f"manifest: {out}/pets-0002.parquet")
    assert second[start + 1 : -1] == [
        "since pets-0001.parquet: 5 new, 1 gone, 1 changed",
        "  new: data/new0.jpg, data/new1.jpg, data/new2.jpg and 2 more",
        "  gone: data/a.jpg",
        "  changed: data/b.jpg",
    ]
    third = run(capsys, path, "--out", out, "--name", "pets")
    assert f"nothing has changed since {out}/pets-0002.parquet" in third
    assert sorted(file.name for file in Path(out).iterdir()) == ["pets-0001.parquet", "pets-0002.parquet"]


@pytest.mark.s3
def test_storage_classes_are_listed_and_archived_images_counted(
    s3: S3Server, bucket: str, tmp_path: Path, capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes = ["GLACIER", "STANDARD", "GLACIER_IR", "DEEP_ARCHIVE", "GLACIER"]
    for name, kind in zip("abcde", classes, strict=True):
        s3.client().put_object(Bucket=bucket, Key=f"data/{name}.jpg", Body=b"1", StorageClass=kind)
    first, *lines = run(capsys, f"s3://{bucket}/data", "--out", str(tmp_path))
    archived = "3 archived (2 GLACIER, 1 DEEP_ARCHIVE): bad images unless they have been restored"
    assert first.startswith("data: 5 images at ")
    assert archived in first
    assert "storage classes: 2 GLACIER, 1 STANDARD, 1 GLACIER_IR, 1 DEEP_ARCHIVE" in lines
    config = DataConfig(path=f"s3://{bucket}/data")
    listed = build_manifest(config).table
    expected = [None if kind == "STANDARD" else kind for kind in classes]
    assert listed["storage_class"].to_pylist() == expected
    monkeypatch.setattr(pages, "_OBJECT", re.compile("(?!)"))  # botocore reads the same
    assert build_manifest(config).table.equals(listed)


def test_runs_take_the_images_of_a_manifest_whatever_has_come_since(tmp_path: Path, capsys: Printed) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    write_all(data, {f"{name}.jpg": b"1" for name in "abc"})
    run(capsys, str(data), "--out", str(out))
    write_all(data, {"d.jpg": b"1"})
    config = DataConfig(path=str(data), manifest=str(out / "manifest-0001.parquet"))
    expected = ["a.jpg", "b.jpg", "c.jpg"]
    assert build_manifest(config).table["key"].to_pylist() == expected
    directory = Directory(str(tmp_path / "run"))
    assert (
        load_or_build(DataConfig(path=str(data)), directory).num_images == 4
    )  # an attempt that did not begin
    first = load_or_build(config, directory)
    directory.write("config.yaml", b"")
    (out / "manifest-0001.parquet").unlink()
    again = load_or_build(config, directory)  # the run has its own copy
    assert first.table["key"].to_pylist() == again.table["key"].to_pylist() == expected
    assert again.table.equals(first.table)


def test_other_images_than_those_of_data_path_are_listed(tmp_path: Path, capsys: Printed) -> None:
    """As those of eval.val_path, which the manifest does not hold."""
    for part in ("train", "val"):
        write_all(tmp_path / part, {f"{name}/{i}.jpg": b"1" for name in ("cat", "dog") for i in range(2)})
    run(capsys, str(tmp_path / "train"), "--out", str(tmp_path / "out"))
    write_all(tmp_path / "train", {"cat/9.jpg": b"1"})
    manifest = str(tmp_path / "out/manifest-0001.parquet")
    data = DataConfig(path=str(tmp_path / "train"), manifest=manifest)
    found = labelled_sources(data, EvalConfig(val_path=str(tmp_path / "val")))
    assert found is not None
    assert [side.num_images for side in found] == [4, 4]


def test_a_manifest_that_does_not_fit_is_refused_with_the_remedy(tmp_path: Path, capsys: Printed) -> None:
    data, other = tmp_path / "data", tmp_path / "other"
    write_all(data, {f"{name}/{i}.jpg": b"1" for name in ("cat", "dog") for i in range(2)})
    write_all(other, {"x.jpg": b"1"})
    run(capsys, str(data), "--out", str(tmp_path / "out"))
    file = str(tmp_path / "out/manifest-0001.parquet")

    def error(kind: type[Exception], **settings: Any) -> str:
        with pytest.raises(kind) as caught:
            build_manifest(DataConfig.model_validate({"path": str(data), "manifest": file, **settings}))
        return str(caught.value)

    text = error(ConfigError, path=str(other))
    assert text == (
        f"data.path='{other}', but data.manifest={file} was listed with '{data}'; set data.path={data}, "
        f"or data.manifest to what `dinoray manifest {other} --out {tmp_path}/out --name manifest2` writes"
    )
    build_manifest(DataConfig(path=str(data), manifest=file))  # with the first remedy
    assert "was listed with True; set data.label_from_parent=true" in error(
        ConfigError, label_from_parent=False
    )
    missing = error(DataError, manifest=f"{tmp_path}/none.parquet")
    assert missing.endswith(
        f"there is no such file; write one with `dinoray manifest {data} --out {tmp_path}`"
    )
    Path(file).write_bytes(b"PAR1")
    assert f"data.manifest={file} is damaged" in error(DataError)


def test_what_cannot_be_done_is_refused(tmp_path: Path, capsys: Printed) -> None:
    write_all(tmp_path, {"a/1.jpg": b"1", "b/1.jpg": b"1"})
    data, out = str(tmp_path / "a"), str(tmp_path / "out")
    for arguments, kind, rule in [
        ([data, "--out", f"{data}/lists"], ConfigError, "where it would be listed; choose another --out$"),
        ([data, "--out", out, "--name", "a/b"], ConfigError, "must be letters, .* e.g. --name=photos$"),
        ([data, "--out", out, "train.epochs=1"], ConfigError, "can be set here; leave it out$"),
        (
            [data, "--out", out, "data.manifest=x"],
            ConfigError,
            f"what is listed is {data}, the first argument; leave them out$",
        ),
        (
            [data, "--out", out, "data={manifest: x}"],
            ConfigError,
            "can be set here; leave it out$",
        ),
        (
            [data, "--out", out, "data.path=x"],
            ConfigError,
            "what is listed is .*, the first argument; leave them out$",
        ),
        ([data, "--out", "/proc/none"], DataError, "^--out=/proc/none: no file can be made there"),
        (
            [f"{tmp_path}/none", "--out", out],
            DataError,
            "^argument data=.*no such folder or file; check the path$",
        ),
    ]:
        with pytest.raises(kind, match=rule):
            job.main(arguments)
    run(capsys, data, "--out", out)
    with pytest.raises(ConfigError, match=r"choose another --name or --out$"):
        job.main([str(tmp_path / "b"), "--out", out])
    run(capsys, str(tmp_path / "b"), "--out", out, "--name", "b")


def test_parquet_is_counted_by_shards_and_row_groups(tmp_path: Path, capsys: Printed) -> None:
    data, out = tmp_path / "data", str(tmp_path / "out")
    write_all(data, {f"{i}.parquet": parquet({"image": [b"x"] * 6}) for i in range(3)})
    lines = run(capsys, str(data), "--out", out)
    assert lines[0].startswith("data: 18 images in 3 Parquet files")
    assert lines[1:3] == ["row groups: 9", "names: 3 .parquet"]
    write_all(data, {"1.parquet": parquet({"image": [b"y"] * 8}), "3.parquet": parquet({"image": [b"x"]})})
    assert "since manifest-0001.parquet: 1 new, 0 gone, 1 changed" in run(capsys, str(data), "--out", out)


def manifest_of(sizes: dict[str, int]) -> Manifest:
    keys = sorted(sizes, key=str.encode)
    columns = {
        "key": pa.array(keys, pa.large_string()),
        "size": pa.array([sizes[k] for k in keys], pa.int64()),
    }
    columns |= {"etag": pa.array([f"{sizes[k] % 5}" for k in keys], pa.string())}
    columns |= {"label": pa.nulls(len(keys), pa.string())}
    return Manifest(pa.table(columns), "images", "s3://bucket", 0, {"path": "s3://bucket"})


contents = st.dictionaries(st.text(st.characters(codec="utf-8"), min_size=1, max_size=3), st.integers(0, 20))


@given(contents, contents)
def test_changes_are_those_of_two_dictionaries(old: dict[str, int], new: dict[str, int]) -> None:
    found = [set(keys.to_pylist()) for keys in changes_between(manifest_of(old), manifest_of(new))]
    changed = {key for key in old.keys() & new.keys() if old[key] != new[key]}
    assert found == [new.keys() - old.keys(), old.keys() - new.keys(), changed]


@given(st.dictionaries(st.text("ab./J", min_size=1, max_size=6), st.integers(0, 2 * 10**7), min_size=1))
def test_counts_by_name_and_size_add_up(sizes: dict[str, int]) -> None:
    names, by_size, *bad = describe_objects(manifest_of(sizes), most_bytes=10**7)
    numbers = [
        int(number.replace(",", "")) for number in re.findall(r"([\d,]+) (?:\.|without|others)", names)
    ]
    assert sum(numbers) == len(sizes)
    ranges, total = by_size.removeprefix("sizes: ").split("; ")
    found = {
        label: int(count) for count, label in re.findall(r"(\d+) ([a-z0-9 ]+[kM]B(?: or more)?)", ranges)
    }
    edges = {"below 10 kB": 10**4, "below 100 kB": 10**5, "below 1 MB": 10**6, "below 10 MB": 10**7}
    low = 0
    for label, high in edges.items():
        assert found.get(label, 0) == sum(low <= size < high for size in sizes.values())
        low = high
    assert found.get("10 MB or more", 0) == sum(size >= low for size in sizes.values())
    assert total == f"{np.sum([*sizes.values()]) / 1e9:,.3f} GB in all"
    assert len(bad) == any(size == 0 or size > 10**7 for size in sizes.values())


def test_the_newest_of_a_folder_has_the_highest_number() -> None:
    names = [
        "a-0001.parquet",
        "a-0012.parquet",
        "a-10000.parquet",
        "a-0099.txt",
        "ab-99999.parquet",
        "a-b-77777.parquet",
    ]
    assert newest_number(names, "a") == 10_000
    assert newest_number(names, "a.b") == 0
