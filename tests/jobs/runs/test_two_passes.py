"""Packing Parquet in two passes, one part after the other in this process: what is lost, damaged or somebody else's."""

import json
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_files import encode
from parts_in_process import KilledError, Pool, use_pool
from PIL import Image
from samples import parquet, write_all

from dinoray.jobs import pack
from dinoray.jobs.runs import parts_job
from dinoray.models.errors import ConfigError, DataError
from dinoray.pipeline.storage.local_files import TEMPORARY

LABELS, PER_LABEL = ("a", "b", "c"), 256
FILES = [encode(Image.new("RGB", (8, 8), (number, 0, 0)), "JPEG") for number in range(PER_LABEL)]
NUM_IMAGES = len(LABELS) * PER_LABEL


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Pool:
    return use_pool(monkeypatch)


@pytest.fixture
def source(tmp_path: Path, pool: Pool) -> Path:
    """A file for each label, in row groups of 64."""
    for label in LABELS:
        write_label(tmp_path / "in", label, FILES)
    return tmp_path / "in"


def write_label(folder: Path, label: str, files: list[bytes]) -> None:
    keys = [f"{label} {number}" for number in range(len(files))]
    columns = {"image": files, "key": keys, "label": [label] * len(files)}
    write_all(folder, {f"{label}.parquet": parquet(columns, row_group_size=64)})


def run(source: Path, out: Path, *more: str) -> None:
    pack.main([str(source), f"--out={out}", *more])


def packed(out: Path) -> pa.Table:
    """The table; each image in it has the bytes and the label of its key."""
    parts = sorted(out.glob("part-*.parquet"))
    table = pa.concat_tables([pq.read_table(part).replace_schema_metadata() for part in parts])
    keys = table["key"].to_pylist()
    assert len(set(keys)) == len(keys)
    assert table["label"].to_pylist() == [key.split()[0] for key in keys]
    assert table["image"].to_pylist() == [FILES[int(key.split()[1])] for key in keys]
    summary = json.loads((out / "_about/summary.json").read_text())
    assert (summary["rows_in"], summary["rows_out"]) == (NUM_IMAGES, len(keys))
    bad = [json.loads(line)["key"] for line in (out / "_about/quarantine.jsonl").read_text().splitlines()]
    assert summary["quarantined"] == len(bad) == NUM_IMAGES - len(keys)
    return table


def beside(out: Path) -> Path:
    return out.with_name(f"{out.name}-first-pass")


def killed_in_second_pass(source: Path, out: Path, pool: Pool) -> None:
    """Pass 1 is whole, and of pass 2 there is one part."""

    def kill(number: int) -> None:
        if number == 1:
            pool.in_second_pass = lambda number: None
            raise KilledError

    pool.in_second_pass = kill
    with pytest.raises(KilledError):
        run(source, out)


def test_a_first_pass_with_other_images_than_before_makes_all_parts_anew(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, aside = tmp_path / "out", tmp_path / "aside.parquet"
    write_label(source, "b", [*FILES[:200], *[b""] * 56])
    times = (source / "b.parquet").stat()
    run(source, out, "data.max_bad_fraction=0.1")
    assert packed(out).num_rows == NUM_IMAGES - 56
    shutil.move(source / "b.parquet", aside)  # and back: it is missing while a part is made again
    sorted(out.glob("part-*"))[1].unlink()
    run(source, out, "data.max_bad_fraction=0.5")
    assert "all parts are written again" in capsys.readouterr().out
    assert packed(out).num_rows == NUM_IMAGES - PER_LABEL
    shutil.move(aside, source / "b.parquet")
    assert (source / "b.parquet").stat().st_mtime_ns == times.st_mtime_ns
    sorted(out.glob("part-*"))[0].unlink()
    run(source, out, "data.max_bad_fraction=0.1")
    assert packed(out).num_rows == NUM_IMAGES - 56
    assert not beside(out).exists()


@pytest.mark.parametrize("place", ["page", "footer"])
def test_damage_in_the_first_pass_is_no_bad_image_and_its_remedy_ends_it(
    place: str, source: Path, tmp_path: Path, pool: Pool
) -> None:
    out = tmp_path / "out"
    killed_in_second_pass(source, out, pool)
    part = beside(out) / "part-00001.parquet"
    data = bytearray(part.read_bytes())
    for image in re.finditer(b"\xff\xd8\xff", part.read_bytes()):  # in each, as some have been read already
        data[image.start() + 100] ^= 1
    part.write_bytes(data if place == "page" else data[: len(data) // 2])
    words = "cannot be read" if place == "page" else "is damaged"
    with pytest.raises(DataError, match=rf"^{part}.* {words}.*; delete it and run again"):
        run(source, out)
    assert not (out / "_about/summary.json").exists()
    part.unlink()
    run(source, out)
    assert packed(out).num_rows == NUM_IMAGES


def test_a_first_pass_that_another_job_has_removed_costs_no_image(
    source: Path, tmp_path: Path, pool: Pool
) -> None:
    """The other one has finished the same table meanwhile."""
    out = tmp_path / "out"
    killed_in_second_pass(source, out, pool)

    def overtaken(number: int) -> None:
        pool.in_second_pass = lambda number: None
        run(source, out)

    pool.in_second_pass = overtaken
    with pytest.raises(DataError, match=r"cannot be read .* run again"):
        run(source, out)
    assert packed(out).num_rows == NUM_IMAGES
    run(source, out)
    assert packed(out).num_rows == NUM_IMAGES


def test_what_is_somebody_elses_beside_the_table_is_refused_or_left_alone(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for name in ("mine.parquet", "_about/mine.txt"):
        write_all(beside(out), {name: b"mine"})
        with pytest.raises(ConfigError, match=r"/out-first-pass, which holds other files; move them away"):
            run(source, out)
        (beside(out) / name).unlink()
    run(source, out)  # an empty _about/ is nobody's
    assert not beside(out).exists()
    run(source, beside(out))  # a table that happens to have this name
    capsys.readouterr()
    run(source, out)
    assert f"{out} is finished" in capsys.readouterr().out
    assert packed(beside(out)).num_rows == NUM_IMAGES
    next(out.glob("part-*")).unlink()
    with pytest.raises(ConfigError, match=r"first_pass_of=None.* choose another --out"):
        run(source, out)


def test_what_a_kill_leaves_of_the_first_pass_is_removed_by_the_next_run(
    source: Path, tmp_path: Path
) -> None:
    out, kept = tmp_path / "out", tmp_path / "kept"
    run(source, out)
    next(out.glob("part-*")).unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts_job.PartsJob, "remove", lambda self: None)
        run(source, out)
    shutil.copytree(beside(out), kept)
    write_all(beside(out), {f"part-00000.parquet.0{TEMPORARY}": b"PAR1", "mine.txt": b"mine"})
    run(source, out)
    assert [path.name for path in beside(out).iterdir() if not path.name.endswith(TEMPORARY)] == ["mine.txt"]
    assert (kept / "_about/pack.json").exists()


def test_one_pass_and_two_are_not_mixed_and_an_older_table_goes_on(source: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    run(source, one, "--one-pass")
    run(source, two)
    with pytest.raises(ConfigError, match=r"made with --one-pass=True, not False; set it back"):
        run(source, one)
    with pytest.raises(ConfigError, match=r"made with --one-pass=False, not True; set it back"):
        run(source, two, "--one-pass")
    about = json.loads((one / "_about/pack.json").read_text())
    del about["--one-pass"]  # as tables had it when there was one pass alone
    (one / "_about/pack.json").write_text(json.dumps(about))
    next(one.glob("part-*")).unlink()
    run(source, one)
    assert packed(one).num_rows == packed(two).num_rows == NUM_IMAGES
    assert not beside(one).exists()


def test_images_that_are_all_bad_are_named_and_not_called_an_empty_folder(
    source: Path, tmp_path: Path
) -> None:
    for label in LABELS:
        write_label(source, label, [b""] * PER_LABEL)
    with pytest.raises(DataError, match=r"none of the 768 images can be used; .*quarantine.jsonl names them"):
        run(source, tmp_path / "out", "data.max_bad_fraction=1")
    assert len((beside(tmp_path / "out") / "_about/quarantine.jsonl").read_text().splitlines()) == NUM_IMAGES
