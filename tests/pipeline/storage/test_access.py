"""How images are requested: without credentials, or paid for by who asks; and what ends each refusal."""

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults import FaultProxy
from pydantic import ValidationError
from samples import put_all
from servers import ACCESS_KEY, READER, SECRET_KEY, S3Server, aws_environment, s3_server, use_aws
from sources import IMAGES, as_shard

from dinoray.jobs.cluster.machine_checks import check_clock, check_data, check_storage
from dinoray.models.errors import DataError
from dinoray.pipeline.data.manifests.manifest import DataConfig, build_manifest, load_or_build
from dinoray.pipeline.data.reading.source import Source, Status
from dinoray.pipeline.evaluation.labels import open_labelled
from dinoray.pipeline.export.packing import check_keys
from dinoray.pipeline.storage.config import SIGNED, Access, StorageConfig
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.remedies import refusal_remedy
from dinoray.pipeline.storage.s3 import list_page, read_object, s3_client

PUBLIC, CLOSED = "everybodys", "mine"
EVER = 1_000_000
PAYS = "x-amz-request-payer: requester"
ANONYMOUS = StorageConfig(anonymous=True, give_up_after_seconds=5)
PAYING = StorageConfig(requester_pays=True, give_up_after_seconds=5)
SHARDS = {
    f"shards/{n}.parquet": as_shard({key: IMAGES[key] for key in sorted(IMAGES)[n::3]}) for n in range(3)
}
FILES = {f"images/{key}": data for key, data in IMAGES.items()} | SHARDS
COLUMNS = {"image_column": "jpeg", "key_column": "name", "label_column": "class"}


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    """A store with a public bucket and another, which hold the same."""
    with s3_server(public=[PUBLIC]) as running:
        for bucket in (PUBLIC, CLOSED):
            running.client().create_bucket(Bucket=bucket)
            put_all(running, bucket, FILES)
        yield running


def keys_of(endpoint: str, access_key: str | None, secret: str = "") -> dict[str, str]:
    """The AWS_* variables with these keys, or with none."""
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    others = {name: value for name, value in aws_environment(endpoint).items() if name not in names}
    return others | (dict(zip(names, (access_key, secret), strict=True)) if access_key else {})


@pytest.fixture
def nobody(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The store, in a process without credentials."""
    use_aws(monkeypatch, keys_of(server.endpoint, None))
    return server


def all_of(path: str, storage: StorageConfig) -> list[bytes | None]:
    """What every reader of a data set makes of it: the images, after keys, labels and the doctor's looks."""
    config = DataConfig(path=path, **(COLUMNS if path.endswith("shards") else {}))  # type: ignore[arg-type]
    source = Source(config, build_manifest(config, storage), storage)
    check_keys(source)
    labelled = open_labelled(config, None, "m", setting="data.path", storage=storage)
    assert labelled.num_images == len(IMAGES)
    found = check_data(config, access=storage.access)
    assert found.verdict == "ok", found.text
    other: Source = pickle.loads(pickle.dumps(source))  # as an actor has it
    fetched = other.fetch(range(other.num_images))
    assert {image.status for image in fetched} == {Status.OK}
    for _, probe in zip(range(2), other._others.probes("none"), strict=False):
        probe()
    return sorted(image.data for image in fetched)  # type: ignore[type-var]


@pytest.mark.s3
@pytest.mark.parametrize("layout", ["images", "shards"])
def test_a_public_bucket_is_read_without_credentials(nobody: S3Server, layout: str) -> None:
    assert all_of(f"s3://{PUBLIC}/{layout}", ANONYMOUS) == sorted(IMAGES.values())


@pytest.mark.s3
def test_a_public_bucket_is_read_by_a_manifest_without_credentials(nobody: S3Server, tmp_path: Path) -> None:
    config = DataConfig(path=f"s3://{PUBLIC}/images")
    (tmp_path / "all.parquet").write_bytes(build_manifest(config, ANONYMOUS).to_bytes())
    by_file = config.model_copy(update={"manifest": f"{tmp_path}/all.parquet"})
    assert build_manifest(by_file, ANONYMOUS).num_images == len(IMAGES)


@pytest.mark.s3
def test_a_single_object_of_a_public_bucket_is_listed_without_credentials(nobody: S3Server) -> None:
    config = DataConfig(path=f"s3://{PUBLIC}/shards/0.parquet", **COLUMNS)  # type: ignore[arg-type]
    assert build_manifest(config, ANONYMOUS).num_images == len(IMAGES) // 3


@pytest.mark.s3
def test_no_anonymous_request_is_signed_though_there_are_credentials(
    s3: S3Server, proxy: FaultProxy, bucket: str
) -> None:
    put_all(s3, bucket, {"x.jpg": b"x"})
    read_object(bucket, "x.jpg")
    assert all("authorization:" in headers for headers in proxy.headers)
    proxy.headers.clear()
    with pytest.raises(DataError, match=r"storage\.anonymous=false"):  # this store has no public bucket
        read_object(bucket, "x.jpg", access=Access(anonymous=True))
    assert proxy.headers
    assert not any("authorization:" in headers for headers in proxy.headers)


@pytest.mark.s3
def test_the_run_directory_needs_credentials_beside_anonymous_images(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_aws(monkeypatch, server.env)
    run, config = Directory(f"s3://{CLOSED}/run"), DataConfig(path=f"s3://{PUBLIC}/images")
    assert load_or_build(config, run, storage=ANONYMOUS).num_images == len(IMAGES)
    assert load_or_build(config, run, storage=ANONYMOUS).num_images == len(IMAGES)  # read again, and checked
    use_aws(monkeypatch, keys_of(server.endpoint, None))
    with pytest.raises(DataError, match="no AWS credentials found; set AWS_PROFILE"):
        load_or_build(config, Directory(f"s3://{CLOSED}/other"), storage=ANONYMOUS)


@pytest.mark.s3
@pytest.mark.parametrize("layout", ["images", "shards"])
def test_every_request_for_images_says_that_its_sender_pays(
    s3: S3Server, proxy: FaultProxy, bucket: str, layout: str
) -> None:
    put_all(s3, bucket, FILES)
    proxy.fail("forbid", pattern=".", times=EVER, lacking=PAYS)  # as such a bucket refuses all others
    assert all_of(f"s3://{bucket}/{layout}", PAYING) == sorted(IMAGES.values())
    assert len(check_clock(f"s3://{bucket}", PAYING.access)) == 1
    assert proxy.requests
    assert all(PAYS in headers for headers in proxy.headers)


@pytest.mark.s3
def test_no_other_request_is_paid_for_by_its_sender(s3: S3Server, proxy: FaultProxy, bucket: str) -> None:
    put_all(s3, bucket, FILES)
    config, run = DataConfig(path=f"s3://{bucket}/images"), Directory(f"s3://{bucket}/run")
    load_or_build(config, run, storage=PAYING)
    paid = {line for line, headers in zip(proxy.requests, proxy.headers, strict=True) if PAYS in headers}
    assert any("prefix=images" in line for line in paid)
    assert not any("/run/" in line for line in paid)
    assert any(line.startswith("PUT") for line in proxy.requests)


def test_nobody_pays_for_a_request_without_credentials() -> None:
    with pytest.raises(ValidationError, match="set one of them to false"):
        StorageConfig(anonymous=True, requester_pays=True)


# Each refusal names what ends it; doing that ends it


def refused(operation: Callable[[], object]) -> str:
    """The one line with which `operation` is refused."""
    with pytest.raises(DataError) as caught:
        operation()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.s3
@pytest.mark.parametrize("listing", [True, False], ids=["manifest", "one object"])
def test_without_credentials_a_public_bucket_names_anonymous(nobody: S3Server, listing: bool) -> None:
    def read(access: Access) -> object:
        if listing:
            return list_page(PUBLIC, "images/", access=access).objects.keys
        return read_object(PUBLIC, "images/a/0.jpg", access=access)

    assert "no AWS credentials found" in (text := refused(lambda: read(SIGNED)))
    assert "storage.anonymous=true" in text
    assert read(Access(anonymous=True))


@pytest.mark.s3
def test_an_anonymous_request_for_what_is_not_public_names_credentials(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_aws(monkeypatch, server.env)
    text = refused(lambda: read_object(CLOSED, "images/a/0.jpg", access=Access(anonymous=True)))
    assert "403" in text
    assert "set storage.anonymous=false" in text
    assert read_object(CLOSED, "images/a/0.jpg") == IMAGES["a/0.jpg"]


@pytest.mark.s3
def test_a_bucket_whose_requester_pays_names_requester_pays(
    s3: S3Server, proxy: FaultProxy, bucket: str
) -> None:
    put_all(s3, bucket, {"x.jpg": b"x"})
    proxy.fail("forbid", pattern=".", times=EVER, lacking=PAYS)
    text = refused(lambda: read_object(bucket, "x.jpg"))
    assert "403" in text
    assert "storage.requester_pays=true" in text
    assert read_object(bucket, "x.jpg", access=Access(requester_pays=True)) == b"x"


@pytest.mark.parametrize(
    "message", ["Bucket is Requester Pays bucket. Access Denied", "RequestPayer is required"]
)
def test_where_the_store_says_who_pays_nothing_else_is_named(message: str) -> None:
    assert refusal_remedy(403, message, "GetObject").startswith("set storage.requester_pays=true")
    assert "requester_pays" not in refusal_remedy(403, message, "GetObject", Access(requester_pays=True))


@pytest.mark.s3
@pytest.mark.parametrize("kind", ["not_implemented", "checksum_header"])
def test_a_store_that_knows_no_checksums_names_the_variable(
    s3: S3Server, proxy: FaultProxy, bucket: str, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    put_all(s3, bucket, {"x.jpg": b"x"})
    folder = Directory(f"s3://{bucket}")
    proxy.fail(kind, pattern="^PUT", times=EVER, header="x-amz-checksum-")
    proxy.fail(kind, pattern="^GET", times=EVER, header="x-amz-checksum-mode")
    for operation, variable in (
        (lambda: folder.write("y", b"y"), "AWS_REQUEST_CHECKSUM_CALCULATION"),
        (lambda: folder.read("x.jpg"), "AWS_RESPONSE_CHECKSUM_VALIDATION"),
    ):
        before = len(proxy.requests)
        assert f"set {variable}=when_required" in refused(operation)
        assert len(proxy.requests) == before + 1  # it is not tried again
        monkeypatch.setenv(variable, "when_required")
        operation()
    assert folder.read("y") == b"y"


@pytest.mark.s3
def test_who_may_not_write_is_told_what_to_allow(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    use_aws(monkeypatch, keys_of(server.endpoint, *READER))
    folder = Directory(f"s3://{CLOSED}/out")
    text = refused(lambda: folder.write("x", b"x"))
    assert "403" in text
    assert "allow s3:PutObject and s3:DeleteObject to these credentials" in text
    assert "storage.anonymous" not in text
    assert read_object(CLOSED, "images/a/0.jpg") == IMAGES["a/0.jpg"]  # reading is allowed
    use_aws(monkeypatch, keys_of(server.endpoint, ACCESS_KEY, SECRET_KEY))
    folder.write("x", b"x")
    assert check_storage(folder.uri).verdict == "ok"


@pytest.mark.s3
def test_expired_credentials_are_to_be_renewed(
    s3: S3Server, proxy: FaultProxy, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_all(s3, bucket, {"x.jpg": b"x"})
    proxy.fail("expired", times=EVER, header="x-amz-security-token: old")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "old")
    assert "renew the credentials" in refused(lambda: read_object(bucket, "x.jpg"))
    monkeypatch.delenv("AWS_SESSION_TOKEN")  # what a renewed login would change
    assert read_object(bucket, "x.jpg") == b"x"


@pytest.mark.s3
def test_a_credentials_file_that_was_renewed_is_read_again(
    s3: S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_all(s3, bucket, {"x.jpg": b"x"})
    file = tmp_path / "credentials"

    def give(secret: str) -> None:
        file.write_text(f"[default]\naws_access_key_id={ACCESS_KEY}\naws_secret_access_key={secret}\n")

    give("expired")
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    env = {name: value for name, value in s3.env.items() if name not in keys}
    use_aws(monkeypatch, env | {"AWS_SHARED_CREDENTIALS_FILE": str(file)})
    assert "SignatureDoesNotMatch" in refused(lambda: read_object(bucket, "x.jpg"))
    give(SECRET_KEY)
    assert read_object(bucket, "x.jpg") == b"x"
    Directory(f"s3://{bucket}/run").write("y", b"y")
    client = s3_client()
    assert s3_client() is client  # as long as the file stays the same


def test_a_client_for_each_kind_of_access_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    use_aws(monkeypatch, aws_environment("http://127.0.0.1:9"))
    clients = [s3_client(access) for access in (SIGNED, Access(anonymous=True), Access(requester_pays=True))]
    assert len(set(map(id, clients))) == 3
    assert s3_client() is clients[0]
    assert s3_client(Access(anonymous=True)) is clients[1]
