"""Writes through pyarrow take botocore's keys, renewed while a process lives."""

import json
import pickle
import sys
import threading
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow.fs
import pytest
from servers import ACCESS_KEY, SECRET_KEY, S3Server, use_aws

from dinoray.models.errors import DataError
from dinoray.pipeline.storage.arrow_s3 import RenewedS3
from dinoray.pipeline.storage.files import Directory, filesystem
from dinoray.pipeline.storage.s3 import s3_client

pytestmark = pytest.mark.s3


class Issuer:
    """A program that hands out keys, as botocore's `credential_process`; it counts how often it is asked."""

    def __init__(self, folder: Path) -> None:
        self._answer, self._calls = folder / "answer.json", folder / "calls"
        self._script = folder / "issuer.py"
        self._calls.write_text("")
        self._script.write_text(
            f"open({str(self._calls)!r}, 'a').write('x')\nprint(open({str(self._answer)!r}).read())\n"
        )

    def give(self, secret: str, *, minutes: float) -> None:
        """From now on, hand out keys that expire in `minutes`: botocore renews them with 10 minutes left."""
        expires = datetime.now(timezone.utc) + timedelta(minutes=minutes)
        keys = {"AccessKeyId": ACCESS_KEY, "SecretAccessKey": secret, "Expiration": expires.isoformat()}
        self._answer.write_text(json.dumps({"Version": 1, **keys}))

    @property
    def calls(self) -> int:
        return len(self._calls.read_text())

    def profile(self) -> str:
        return f"[profile issued]\ncredential_process = {sys.executable} {self._script}\n"


@pytest.fixture
def issuer(s3: S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Issuer:
    issuer = Issuer(tmp_path)
    (tmp_path / "config").write_text(issuer.profile())
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    env = {name: value for name, value in s3.env.items() if name not in keys}
    use_aws(monkeypatch, env | {"AWS_CONFIG_FILE": str(tmp_path / "config"), "AWS_PROFILE": "issued"})
    return issuer


def write(storage: pyarrow.fs.FileSystem, path: str) -> None:
    with storage.open_output_stream(path) as stream:
        stream.write(b"data")


def test_keys_that_expire_are_renewed_in_a_filesystem_that_exists(issuer: Issuer, bucket: str) -> None:
    issuer.give(SECRET_KEY, minutes=5)
    storage, path = filesystem(f"s3://{bucket}/run")
    write(storage, f"{path}/first")
    issuer.give("revoked", minutes=5)
    with pytest.raises(OSError, match=r"(?i)signature|denied|403"):
        write(storage, f"{path}/second")
    issuer.give(SECRET_KEY, minutes=5)
    write(storage, f"{path}/third")
    assert Directory(f"s3://{bucket}/run").list() == ["first", "third"]


class TokenService(BaseHTTPRequestHandler):
    """Gives the keys of the store to whoever assumes a role, as AWS STS does."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        expires = datetime.now(timezone.utc) + timedelta(hours=1)
        keys = f"<AccessKeyId>{ACCESS_KEY}</AccessKeyId><SecretAccessKey>{SECRET_KEY}</SecretAccessKey>"
        body = (
            "<AssumeRoleResponse><AssumeRoleResult>"
            f"<Credentials>{keys}<SessionToken/><Expiration>{expires.isoformat()}</Expiration></Credentials>"
            "</AssumeRoleResult></AssumeRoleResponse>"
        ).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def token_service() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), TokenService) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.usefixtures("issuer")
def test_a_role_that_a_profile_assumes_writes_as_it_reads(
    token_service: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pyarrow's own chain does not know such a profile, and would make requests without keys."""
    role = "[profile issued]\nrole_arn = arn:aws:iam::123456789012:role/r\nsource_profile = base\n"
    base = "[profile base]\naws_access_key_id = of-base\naws_secret_access_key = of-base\n"
    (tmp_path / "config").write_text(role + base)
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", token_service)
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)  # stores other than AWS have none
    storage, path = filesystem(f"s3://{bucket}/run")
    write(storage, f"{path}/x")
    assert Directory(f"s3://{bucket}/run").read("x") == b"data"


def test_the_region_is_that_of_the_variable_which_messages_name(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-2")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    assert s3_client().meta.region_name == "eu-west-1"
    monkeypatch.delenv("AWS_REGION")
    assert s3_client().meta.region_name == "eu-west-2"


def test_keys_that_last_are_asked_for_once(issuer: Issuer, bucket: str) -> None:
    issuer.give(SECRET_KEY, minutes=60)
    storage, path = filesystem(f"s3://{bucket}/run")
    for number in range(5):
        write(storage, f"{path}/{number}")
        assert storage.get_file_info(f"{path}/{number}").size == 4
    assert issuer.calls == 1


def test_an_issuer_that_fails_is_named_and_its_repair_ends_the_error(issuer: Issuer, bucket: str) -> None:
    issuer.give(SECRET_KEY, minutes=5)
    storage, path = filesystem(f"s3://{bucket}/run")
    issuer._answer.unlink()
    with pytest.raises(DataError, match=r"AWS credentials: no usable.*set AWS_PROFILE"):
        write(storage, f"{path}/x")
    issuer.give(SECRET_KEY, minutes=5)
    write(storage, f"{path}/x")


def test_a_pickle_has_no_key_and_equals_its_source(issuer: Issuer, bucket: str) -> None:
    issuer.give(SECRET_KEY, minutes=60)
    storage, path = filesystem(f"s3://{bucket}/run")
    write(storage, f"{path}/x")
    text = pickle.dumps(storage)
    assert SECRET_KEY.encode() not in text
    assert ACCESS_KEY.encode() not in text
    assert pickle.loads(text) == storage
    assert storage.handler != RenewedS3({"region": "elsewhere"})


def test_it_does_what_pyarrows_own_filesystem_does(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    """Folders with more files than pyarrow has threads there and back, and each operation that Ray and we use."""
    own = pyarrow.fs.S3FileSystem(
        access_key=ACCESS_KEY, secret_key=SECRET_KEY, region="us-east-1", endpoint_override=s3.endpoint
    )
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for number in range(20):
        (tmp_path / "in" / "sub" / f"{number}").write_bytes(bytes([number]) * (1 + number * 500_000))
    local, found = pyarrow.fs.LocalFileSystem(), []
    for name, storage in (("own", own), ("ours", filesystem(f"s3://{bucket}")[0])):
        root = f"{bucket}/{name}"
        storage.create_dir(root)
        pyarrow.fs.copy_files(
            str(tmp_path / "in"), root, source_filesystem=local, destination_filesystem=storage
        )
        pyarrow.fs.copy_files(
            root, str(tmp_path / name), source_filesystem=storage, destination_filesystem=local
        )
        for path in (tmp_path / "in" / "sub").iterdir():
            assert (tmp_path / name / "sub" / path.name).read_bytes() == path.read_bytes()
        storage.copy_file(f"{root}/sub/3", f"{root}/copy")
        storage.move(f"{root}/copy", f"{root}/moved")
        storage.delete_file(f"{root}/sub/4")
        with storage.open_input_file(f"{root}/moved") as file:
            file.seek(7)
            assert file.read(3) == b"\3\3\3"
        with storage.open_input_stream(f"{root}/moved") as stream:
            assert len(stream.read()) == 1_500_001
        infos = storage.get_file_info(pyarrow.fs.FileSelector(root, recursive=True))
        infos += storage.get_file_info([f"{root}/moved", f"{root}/none", f"{root}/sub"])
        found.append([(i.path.removeprefix(root), i.type, i.size) for i in infos])
        storage.delete_dir_contents(f"{root}/sub")
        storage.delete_dir(root)
        found[-1] += storage.get_file_info(
            pyarrow.fs.FileSelector(root, recursive=True, allow_not_found=True)
        )
        with pytest.raises(FileNotFoundError):
            storage.open_input_stream(f"{root}/none")
    assert found[0] == found[1]
    assert len(found[0]) > 20
