"""Addresses, folders and settings of a store that cannot be used: following the message's remedy ends the error."""

import errno
import re
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError
from servers import ACCESS_KEY, SECRET_KEY, aws_environment, use_aws

from dinoray.models.errors import ConfigError, DataError, DinorayError
from dinoray.pipeline.storage.addresses import split_s3_uri
from dinoray.pipeline.storage.config import Access, StorageConfig
from dinoray.pipeline.storage.files import Directory, check_writable, normal_uri
from dinoray.pipeline.storage.retry import Unreachable, retrying
from dinoray.pipeline.storage.s3 import s3_client
from dinoray.pipeline.storage.waiting import Patient


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("gs://bucket/x", r"; use a local path or (s3://\S+)$"),
        ("s3://", r"; write (s3://\S+)$"),
        ("s3:///x", r"; write (s3://\S+)$"),
        (
            "s3://KEY:SECRET@bucket/x",
            "; set AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give ",
        ),
    ],
)
def test_an_address_is_written_as_the_message_writes_it(wrong: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        split_s3_uri(wrong)
    found = re.search(says, str(error.value))
    assert found
    split_s3_uri(found[1] if found.groups() else "s3://bucket/x")
    normal_uri("/a/local/path")


# Credentials


def without_keys(endpoint: str = "http://127.0.0.1:9") -> dict[str, str]:
    return {name: value for name, value in aws_environment(endpoint).items() if "ACCESS_KEY" not in name}


def of_a_profile(folder: Path) -> dict[str, str]:
    file = folder / "credentials"
    file.write_text(f"[mine]\naws_access_key_id={ACCESS_KEY}\naws_secret_access_key={SECRET_KEY}\n")
    return {"AWS_PROFILE": "mine", "AWS_SHARED_CREDENTIALS_FILE": str(file)}


@pytest.mark.parametrize("wrong", [{}, {"AWS_PROFILE": "nobody"}], ids=["no keys", "no such profile"])
@pytest.mark.parametrize("remedy", ["profile", "keys", "anonymous"])
def test_each_remedy_for_missing_credentials_gives_a_client(
    wrong: dict[str, str], remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_aws(monkeypatch, without_keys() | wrong)
    with pytest.raises(DataError) as error:
        s3_client()
    names = re.search(
        r"; set (\w+) or (\w+) and (\w+), or .*, or set storage\.(\w+)=true if only", str(error.value)
    )
    assert names
    if remedy == "anonymous":
        monkeypatch.delenv("AWS_PROFILE", raising=False)  # which is none of AWS's
        assert s3_client(Access(**{names[4]: True}))
        return
    given = of_a_profile(tmp_path) if remedy == "profile" else {names[2]: ACCESS_KEY, names[3]: SECRET_KEY}
    use_aws(monkeypatch, without_keys() | given)
    assert s3_client()


def test_an_endpoint_is_written_as_the_message_writes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    use_aws(monkeypatch, aws_environment("127.0.0.1:9"))
    with pytest.raises(ConfigError, match=r"; AWS_ENDPOINT_URL must look like http://host:port$"):
        s3_client()
    use_aws(monkeypatch, aws_environment("http://127.0.0.1:9"))
    assert s3_client()


@pytest.mark.parametrize("one", ["anonymous", "requester_pays"])
def test_one_of_two_kinds_of_access_is_enough(one: str) -> None:
    with pytest.raises(ValidationError, match="set one of them to false"):
        StorageConfig(anonymous=True, requester_pays=True)
    StorageConfig.model_validate({"anonymous": True, "requester_pays": True, one: False})


# Folders


def test_a_setting_is_a_folder_that_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"; set storage_path to a folder that you may write to$"):
        check_writable(f"{tmp_path}/file/runs", setting="storage_path")
    check_writable(f"{tmp_path}/runs", setting="storage_path")


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (lambda folder: folder.read("x"), "; check the path and its permissions$"),
        (lambda folder: folder.write("x", b"1"), "; check the path and its permissions$"),
    ],
)
def test_a_folder_in_the_place_of_a_file_is_moved(
    attempt: Callable[[Directory], object], says: str, tmp_path: Path
) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(DataError, match=says):
        attempt(Directory(str(tmp_path)))
    (tmp_path / "x").rename(tmp_path / "y")
    (tmp_path / "x").write_bytes(b"0")
    attempt(Directory(str(tmp_path)))


def test_a_file_is_written_where_there_can_be_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"; check the folder$"):
        Directory("/proc/none").write("file", b"new")
    Directory(f"{tmp_path}/some").write("file", b"new")


# Limits


def test_more_open_files_are_allowed_as_the_message_says(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("1")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    def read() -> str:
        with open(tmp_path / "x") as file:
            return file.read()

    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(Unreachable) as error:
            retrying(read, what="x", attempts=2, sleep=lambda _: None)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert str(error.value).endswith("; raise the limit of open files (ulimit -n)")
    assert retrying(read, what="x", attempts=2) == "1"


def test_an_outage_is_outwaited_with_a_longer_limit() -> None:
    """The store is back after 100 s of a clock that only pauses advance."""
    now = [0.0]

    def read() -> str:
        if now[0] < 100:
            raise OSError(errno.EIO, "input or output error")
        return "done"

    def wait(seconds: float) -> None:
        now[0] += seconds

    def patient(limit: float) -> Patient:
        return Patient(limit, sleep=wait, clock=lambda: now[0])

    with pytest.raises(DinorayError, match=r", or raise storage\.give_up_after_seconds=30$"):
        patient(StorageConfig(give_up_after_seconds=30).give_up_after_seconds)(read, what="x")
    now[0] = 0.0
    assert patient(StorageConfig(give_up_after_seconds=300).give_up_after_seconds)(read, what="x") == "done"
