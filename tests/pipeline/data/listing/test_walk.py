"""A local folder with links: what is listed, under which names, and what is counted as left out."""

import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from samples import write_all

from dinoray.models.errors import DataError
from dinoray.pipeline.data.listing import walk as module
from dinoray.pipeline.data.listing.ignored import ignored_line
from dinoray.pipeline.data.listing.walk import MOST_NAMES, walk
from dinoray.pipeline.data.manifests.manifest import DataConfig, build_manifest


def found_in(folder: Path) -> tuple[dict[str, int], Counter[str]]:
    left_out = Counter[str]()
    files = list(walk(str(folder), left_out))
    assert len({file.key for file in files}) == len(files)
    return {file.key: file.size for file in files}, left_out


def test_links_are_followed_and_loops_are_left_out(tmp_path: Path) -> None:
    write_all(tmp_path, {"data/a.jpg": b"123", "store/dog/b.jpg": b"12345", "store/more/c.jpg": b"1"})
    data = tmp_path / "data"
    (data / "link.jpg").symlink_to(tmp_path / "store/dog/b.jpg")
    (data / "dog").symlink_to("../store/dog")
    (data / "hound").symlink_to("dog")
    (tmp_path / "store/dog/more").symlink_to(tmp_path / "store/more")
    (data / "loop").symlink_to(data)
    (data / "outer").symlink_to(tmp_path)
    (tmp_path / "store/more/back").symlink_to(data)
    (tmp_path / "store/more/again").symlink_to(tmp_path / "store/dog")
    files, left_out = found_in(data)
    assert files == {
        "a.jpg": 3,
        "link.jpg": 5,
        **{f"{name}/b.jpg": 5 for name in ("dog", "hound")},
        **{f"{name}/more/c.jpg": 1 for name in ("dog", "hound")},
    }
    assert left_out == {"loop": 6}


def test_a_folder_that_may_not_be_read_is_left_out_and_the_root_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_all(tmp_path, {"a/1.jpg": b"1", "b/1.jpg": b"1"})
    closed, scandir = f"{tmp_path}/b/", os.scandir

    def refusing(path: str) -> object:  # root, who may run the tests, may read all
        if path == closed:
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert found_in(tmp_path) == ({"a/1.jpg": 1}, {"closed folder": 1})
    assert f"{closed}: Permission denied; make the folder readable; it is left out" in caplog.text
    assert ignored_line(build_manifest(DataConfig(path=str(tmp_path))).ignored) == (
        "ignored: 1 folder that cannot be read"
    )
    closed = f"{tmp_path}/"
    with pytest.raises(DataError, match="make the folder readable"):
        found_in(tmp_path)


def test_a_root_that_is_a_link_and_one_that_does_not_end_are_walked(tmp_path: Path) -> None:
    write_all(tmp_path, {"store/cat/a.jpg": b"1"})
    (tmp_path / "data").symlink_to("store")
    (tmp_path / "store/data").symlink_to("../data")
    assert found_in(tmp_path / "data") == ({"cat/a.jpg": 1}, {"loop": 1})


def test_folders_that_link_to_each_other_have_no_more_names_than_can_be_listed(tmp_path: Path) -> None:
    names = [f"f{number}" for number in range(7)]  # without a limit, 13,700 paths
    write_all(tmp_path, {f"{name}/a.jpg": b"1" for name in names})
    for name in names:
        for other in names:
            if other != name:
                (tmp_path / name / other).symlink_to(tmp_path / other)
    files, left_out = found_in(tmp_path)
    assert {f"{name}/a.jpg" for name in names} <= files.keys()
    assert 7 < len(files) <= 7 * (MOST_NAMES + 1)
    assert left_out.keys() == {"loop", "often linked"}


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), max_size=5, unique=True))
def test_each_real_file_is_listed_and_the_walk_ends(
    tmp_path_factory: pytest.TempPathFactory, links: list[tuple[str, str]]
) -> None:
    root = tmp_path_factory.mktemp("links")
    write_all(root, {"a/1.jpg": b"1", "a/b/2.jpg": b"1", "c/3.jpg": b"1"})
    for number, (where, target) in enumerate(links):
        (root / where.replace("b", "a/b") / f"l{number}").symlink_to(root / target.replace("b", "a/b"))
    files, _ = found_in(root)
    assert {"a/1.jpg", "a/b/2.jpg", "c/3.jpg"} <= files.keys()
    assert all((root / key).read_bytes() == b"1" for key in files)


def test_what_cannot_be_listed_is_counted_and_reported(tmp_path: Path) -> None:
    write_all(tmp_path, {"a.jpg": b"1"})
    (tmp_path / "dangling.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "self.jpg").symlink_to("self.jpg")
    (tmp_path / "dog").symlink_to("/mnt/not/mounted")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / os.fsdecode(b"\xff.jpg")).write_bytes(b"1")
    (tmp_path / os.fsdecode(b"\xe9t\xe9")).mkdir()
    (tmp_path / os.fsdecode(b"\xe9t\xe9/1.jpg")).write_bytes(b"1")
    manifest = build_manifest(DataConfig(path=str(tmp_path)))
    table = manifest.table.select(["key", "size"]).to_pylist()
    # An image that is not there is a bad image, which is named.
    assert [tuple(row.values()) for row in table] == [("a.jpg", 1), ("dangling.jpg", 0), ("self.jpg", 0)]
    assert ignored_line(manifest.ignored) == (
        "ignored: 1 broken link, 1 pipe, socket or device, 2 names that are not UTF-8; rename them: convmv -r "
        "-f latin1 -t utf8 --notest FOLDER"
    )


def test_links_need_no_more_look_at_folders_than_their_depth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_all(tmp_path, {f"store/{number}/a.jpg": b"1" for number in range(50)})
    (tmp_path / "data").mkdir()
    for number in range(50):
        (tmp_path / f"data/{number}").symlink_to(tmp_path / f"store/{number}")
    looked: list[str] = []
    identity = module._identity
    monkeypatch.setattr(module, "_identity", lambda folder: looked.append(folder) or identity(folder))
    assert len(found_in(tmp_path / "data")[0]) == 50
    assert len(looked) < 50 + 20
