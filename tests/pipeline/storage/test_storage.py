"""Storage: addresses, folders, objects and filesystems, against a real S3 server."""

import io
import os
import pickle
import random
import signal
import threading
from functools import partial
from pathlib import Path

import pytest
from faults import FaultProxy
from servers import SECRET_KEY, S3Server, aws_environment, use_aws

from dinoray.models.errors import ConfigError, DataError, one_line, redact_credentials
from dinoray.pipeline.storage import s3 as s3_module
from dinoray.pipeline.storage.files import (
    ChangedObject,
    Directory,
    MissingObject,
    ObjectTooLarge,
    Unreachable,
    filesystem,
    retrying,
    s3_client,
    split_s3_uri,
)
from dinoray.pipeline.storage.s3 import ObjectFile, read_object


def test_an_s3_address_splits_into_bucket_and_key_as_they_stand() -> None:
    assert split_s3_uri("s3://bucket/a/%41 b//c?") == ("bucket", "a/%41 b//c?")
    assert split_s3_uri("s3://bucket") == split_s3_uri("s3://bucket/") == ("bucket", "")
    for wrong in ("s3://", "s3:///key", "/local", "gs://bucket/key", "s3a://bucket/key"):
        with pytest.raises(ConfigError, match="s3://bucket/prefix"):
            split_s3_uri(wrong)


def test_a_directory_is_the_same_on_a_disk_and_in_a_bucket(directory: Directory) -> None:
    assert directory.list() == []
    assert not directory.exists("a.txt")
    with pytest.raises(MissingObject, match=r"run/a\.txt"):
        directory.read("a.txt")
    with pytest.raises(MissingObject, match=r"run/a\.txt"):
        directory.size("a.txt")
    directory.write("a.txt", b"one")
    directory.write("a.txt", b"two")
    directory.write("empty", b"")
    directory.write("b/c/d.bin", bytes(range(256)))
    directory.child("b").write("sp ace%41é.txt", b"odd")
    assert directory.read("a.txt") == b"two"
    assert directory.read("empty") == b""
    assert directory.child("b/c").read("d.bin") == bytes(range(256))
    assert directory.list() == ["a.txt", "b", "empty"]
    assert directory.child("b").list() == ["c", "sp ace%41é.txt"]
    assert directory.exists("b/c/d.bin")
    assert (directory.size("b/c/d.bin"), directory.size("empty")) == (256, 0)
    assert not directory.exists("b/c")
    directory.delete("a.txt")
    directory.delete("a.txt")
    assert directory.list() == ["b", "empty"]
    copy = pickle.loads(pickle.dumps(directory))
    assert copy == directory
    assert copy.read("b/sp ace%41é.txt") == b"odd"
    assert directory.join("x", "y.txt") == f"{directory.uri}/x/y.txt"


def test_a_folder_goes_with_its_files_and_no_others(directory: Directory) -> None:
    for name in ("step_1/meta.json", "step_1/weights", "step_10/meta.json", "step_1.json"):
        directory.write(name, b"1")
    directory.child("step_1").remove()
    directory.child("step_1").remove()
    assert directory.list() == ["step_1.json", "step_10"]
    assert directory.child("step_10").list() == ["meta.json"]


def test_a_directory_given_by_a_relative_path_means_the_same_after_chdir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    directory = Directory("runs/one")
    monkeypatch.chdir("/")
    directory.write("x", b"1")
    assert (tmp_path / "runs/one/x").read_bytes() == b"1"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    directory = Directory(str(tmp_path))
    directory.write("state", b"old")
    with pytest.raises(TypeError):
        directory.write("state", "not bytes")  # type: ignore[arg-type]
    assert directory.read("state") == b"old"
    assert os.listdir(tmp_path) == ["state"]


def test_a_file_that_cannot_be_made_is_not_called_missing() -> None:
    with pytest.raises(DataError, match=r"^/proc/none/file cannot be written: ") as caught:
        Directory("/proc/none").write("file", b"new")
    assert not isinstance(caught.value, MissingObject)


def test_a_folder_where_a_file_should_be_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    for attempt in (lambda d: d.read("x"), lambda d: d.write("x", b""), lambda d: d.delete("x")):
        with pytest.raises(DataError, match=f"{tmp_path}/x: .*check the path"):
            attempt(Directory(str(tmp_path)))


@pytest.mark.s3
@pytest.mark.parametrize("fault", ["slow_down", "internal_error", "truncate", "corrupt", "reset", "hang"])
def test_a_spoilt_answer_is_fetched_again(
    fault: str, proxy: FaultProxy, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_module, "READ_SECONDS", 0.5)
    data = random.Random(1).randbytes(200_000)
    directory = Directory(f"s3://{bucket}")
    directory.write("x.bin", data)
    proxy.fail(fault)
    assert directory.read("x.bin") == data
    assert proxy.count("^GET ") == 2


@pytest.mark.s3
@pytest.mark.parametrize("fault", ["slow_down", "truncate", "reset"])
def test_a_spoilt_listing_page_is_fetched_again(fault: str, proxy: FaultProxy, bucket: str) -> None:
    directory = Directory(f"s3://{bucket}")
    for name in "abc":
        directory.write(name, b"1")
    proxy.fail(fault, pattern="list-type=2")
    assert directory.list() == ["a", "b", "c"]
    assert proxy.count("list-type=2") == 2


@pytest.mark.s3
def test_a_spoilt_write_is_made_again(proxy: FaultProxy, bucket: str) -> None:
    proxy.fail("slow_down", pattern="^PUT ", times=2)
    Directory(f"s3://{bucket}").write("x", b"data")
    assert Directory(f"s3://{bucket}").read("x") == b"data"
    assert proxy.count("^PUT ") == 3


@pytest.mark.s3
def test_a_store_that_keeps_failing_is_given_up_on_by_name(proxy: FaultProxy, bucket: str) -> None:
    Directory(f"s3://{bucket}").write("x.jpg", b"data")
    proxy.fail("slow_down", times=99)
    with pytest.raises(Unreachable, match=f"s3://{bucket}/x.jpg.*3 attempts.*SlowDown"):
        read_object(bucket, "x.jpg", retry=partial(retrying, attempts=3))
    assert proxy.count("^GET ") == 3


@pytest.mark.s3
def test_a_closed_endpoint_is_unreachable(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_aws(monkeypatch, aws_environment("http://127.0.0.1:9"))
    with pytest.raises(Unreachable, match=r"2 attempts.*AWS_ENDPOINT_URL"):
        read_object(bucket, "x.jpg", retry=partial(retrying, attempts=2))


@pytest.mark.s3
def test_a_forbidden_object_is_asked_for_once(proxy: FaultProxy, bucket: str) -> None:
    proxy.fail("forbid", times=99)
    with pytest.raises(DataError, match=f"s3://{bucket}/x.jpg: AccessDenied"):
        read_object(bucket, "x.jpg")
    assert proxy.count("^GET ") == 1


@pytest.mark.s3
def test_a_missing_bucket_fails_at_once_however_it_is_used(proxy: FaultProxy) -> None:
    directory = Directory("s3://no-such-bucket/run")
    for attempt in (
        lambda: directory.read("x"),
        lambda: directory.write("x", b""),
        directory.list,
        lambda: filesystem(directory.uri),
    ):
        before = len(proxy.requests)
        with pytest.raises(DataError, match=r"s3://no-such-bucket.*NoSuchBucket.*check the bucket's name"):
            attempt()
        assert len(proxy.requests) == before + 1


@pytest.mark.s3
def test_a_wrong_secret_fails_at_once(s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_aws(monkeypatch, aws_environment(s3.endpoint, secret="wrong"))
    with pytest.raises(DataError, match=f"s3://{bucket}/x.jpg: SignatureDoesNotMatch.*AWS_SECRET_ACCESS_KEY"):
        read_object(bucket, "x.jpg")


def test_no_credentials_are_named_before_any_request(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    env = {name: value for name, value in aws_environment("http://127.0.0.1:9").items() if name not in keys}
    use_aws(monkeypatch, env)
    with pytest.raises(DataError, match="no AWS credentials found; set AWS_PROFILE or AWS_ACCESS_KEY_ID"):
        s3_client()
    use_aws(monkeypatch, env | {"AWS_PROFILE": "nobody"})
    with pytest.raises(DataError, match="nobody"):
        s3_client()


def test_an_endpoint_without_a_scheme_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    use_aws(monkeypatch, aws_environment("localhost:9000"))
    with pytest.raises(ConfigError, match=r"localhost:9000.*http://host:port"):
        s3_client()


@pytest.mark.s3
def test_an_object_over_the_limit_is_not_read(proxy: FaultProxy, bucket: str) -> None:
    Directory(f"s3://{bucket}").write("x.jpg", bytes(1001))
    assert len(read_object(bucket, "x.jpg", max_bytes=1001)) == 1001
    with pytest.raises(ObjectTooLarge, match=f"s3://{bucket}/x.jpg holds 1001 bytes, more than 1000"):
        read_object(bucket, "x.jpg", max_bytes=1000)


@pytest.mark.s3
def test_an_object_reads_like_a_file_from_any_place(bucket: str) -> None:
    data = random.Random(2).randbytes(5000)
    Directory(f"s3://{bucket}").write("x.bin", data)
    ours, expected = ObjectFile(bucket, "x.bin", len(data)), io.BytesIO(data)
    choices = random.Random(3)
    for _ in range(60):
        whence = choices.choice([io.SEEK_SET, io.SEEK_CUR, io.SEEK_END])
        offset = choices.randint(0, 6000) * (-1 if whence == io.SEEK_END else 1) % 5001
        offset = -offset if whence == io.SEEK_END else offset
        assert ours.seek(offset, whence) == expected.seek(offset, whence)
        size = choices.choice([0, 1, 7, 4096, -1, 6000])
        assert ours.read(size) == expected.read(size)
        assert ours.tell() == min(expected.tell(), max(len(data), ours.tell()))


@pytest.mark.s3
@pytest.mark.parametrize("start", [0, 6000])
def test_a_range_of_an_object_that_shrank_is_not_tried_again(
    proxy: FaultProxy, bucket: str, start: int
) -> None:
    Directory(f"s3://{bucket}").write("x.bin", bytes(5000))
    listed = ObjectFile(bucket, "x.bin", 9000)
    listed.seek(start)
    with pytest.raises(ChangedObject, match=f"s3://{bucket}/x.bin.*list the data again"):
        listed.read(10)
    assert proxy.count("^GET ") == 1


@pytest.mark.s3
def test_a_range_cut_short_is_fetched_again(proxy: FaultProxy, bucket: str) -> None:
    data = random.Random(4).randbytes(100_000)
    Directory(f"s3://{bucket}").write("x.bin", data)
    proxy.fail("truncate")
    assert read_object(bucket, "x.bin", byte_range=(10, 90_009)) == data[10:90_010]
    assert proxy.count("^GET ") == 2


@pytest.mark.s3
def test_all_threads_share_one_client_and_other_credentials_get_another(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients: list[object] = []
    threads = [threading.Thread(target=lambda: clients.append(s3_client())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, clients))) == 1
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    assert s3_client() is not clients[0]


@pytest.mark.s3
def test_a_forked_child_makes_its_own_client_even_if_the_fork_came_amid_ours(bucket: str) -> None:
    Directory(f"s3://{bucket}").write("x", b"data")
    ours = s3_client()
    with s3_module._clients_lock:
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # a lock that stayed held would hang here
            good = s3_client() is not ours and Directory(f"s3://{bucket}").read("x") == b"data"
            os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.s3
def test_a_pickled_filesystem_works_and_carries_no_secret(proxy: FaultProxy, bucket: str) -> None:
    s3, path = filesystem(f"s3://{bucket}/runs")
    pickled = pickle.dumps(s3)
    assert SECRET_KEY.encode() not in pickled
    with s3.open_output_stream(f"{path}/x") as stream:
        stream.write(b"data")
    assert Directory(f"s3://{bucket}/runs").read("x") == b"data"
    with pickle.loads(pickled).open_input_file(f"{path}/x") as file:
        assert file.read() == b"data"
    assert proxy.count(f"^PUT /{bucket}/runs/x") == 1  # it went where AWS_ENDPOINT_URL says


def test_a_local_filesystem_gets_an_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    local, path = filesystem("runs/one")
    assert path == str(tmp_path / "runs/one")
    local.create_dir(path)
    assert Path(path).is_dir()


def test_keys_before_the_at_of_an_address_are_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match="@bucket/images: no keys in an address") as error:
        split_s3_uri("s3://AKIA:MARKER@bucket/images")
    assert "MARKER" not in str(error.value)
    with pytest.raises(ConfigError, match="no keys in an address"):
        split_s3_uri("s3://AKIA:MAR/KER@bucket/images")
    assert split_s3_uri("s3://bucket/a@b/images") == ("bucket", "a@b/images")
    for innocent in (
        "http://host:9000/a@b",
        "http://[::1]:9000/a@b",
        "s3://arn:aws:s3:eu-west-1:123456789012:accesspoint/images/a@b",
        "git+ssh://git@github.com/me/mine@v1",
        "sqlite:////folder/me@host.db",
        "runs/me@host:1",
    ):
        assert redact_credentials(innocent) == innocent
    said = one_line(ValueError("Could not connect to http://me:MARKER@host:9000/x"))
    assert said == "Could not connect to http://...@host:9000/x"
