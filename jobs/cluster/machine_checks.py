"""What can be checked from one machine: its programs and limits, the data, the storage of runs. No Ray here.

Each check is a function that returns findings and raises nothing: what is wrong is what it is there to say.
"""

import os
import resource
import shlex
import shutil
import statistics
import tempfile
import time
import uuid
from collections.abc import Iterable
from email.utils import parsedate_to_datetime
from functools import partial
from importlib import metadata
from itertools import islice
from pathlib import Path
from platform import python_version
from typing import Literal, NamedTuple

import pyarrow as pa
from packaging.requirements import Requirement

from dinoray.models.errors import DataError, DinorayError, ResourceError, one_line
from dinoray.pipeline.data.demo_images import demo_folder
from dinoray.pipeline.data.listing.ignored import count_keys, from_counts, ignored_line
from dinoray.pipeline.data.listing.listing import Entry, list_entries
from dinoray.pipeline.data.listing.names import role_of
from dinoray.pipeline.data.manifests.manifest import DataConfig
from dinoray.pipeline.storage.config import SIGNED, Access
from dinoray.pipeline.storage.files import Directory, filesystem, is_s3, normal_uri, retrying, split_s3_uri
from dinoray.pipeline.storage.s3 import read_object, s3_client

_few = partial(retrying, attempts=2)
_NUM_LISTED = 1000  # as many as one page of a listing on S3 holds
_NUM_READ = 5
_READ_BYTES = 8 << 20
_MIN_OPEN_FILES = 4096
_MIN_FREE_BYTES = 20e9
_FULL = 0.95
"""Share of a disk from which on Ray no longer spills to it (its local_fs_capacity_threshold)."""
_ODD_SECONDS, _REFUSED_SECONDS = 30.0, 900.0
"""Skew of a clock that is worth a word, and from which on S3 refuses requests."""


class Finding(NamedTuple):
    """One thing that was looked at: what was found and, unless all is well, what to do about it."""

    verdict: Literal["ok", "warn", "FAIL"]
    name: str
    text: str
    exit_code: int = 0


def failed(name: str, error: DinorayError) -> Finding:
    """An error is a finding, too."""
    return Finding("FAIL", name, one_line(error, limit=400), error.exit_code)


def check_packages() -> list[Finding]:
    """Python and the installed packages against what this project asks for."""
    try:
        required = [Requirement(text) for text in metadata.requires("dinoray") or []]
    except metadata.PackageNotFoundError:
        text = f"Python {python_version()}; dinoray is not installed here: pip install -e ."
        return [Finding("warn", "packages", text)]
    wrong, remedies, versions = [], [], []
    for requirement in required:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = "not installed"
        if version == "not installed" or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version}, wanted {requirement.specifier}")
            remedies.append(str(requirement))
        elif requirement.name in ("ray", "torch", "timm", "numpy", "pyarrow", "boto3"):
            versions.append(f"{requirement.name} {version}")
    if wrong:
        # Not `pip install -e .`, for which one must stand in a checkout.
        text = f"{'; '.join(wrong)}: {shlex.join(['pip', 'install', *remedies])}"
        return [Finding("FAIL", "packages", text, ResourceError.exit_code)]
    return [Finding("ok", "packages", f"Python {python_version()}, {', '.join(versions)}")]


def machine_facts(folders: Iterable[str] = ()) -> dict[str, object]:
    """Open files allowed, and (free, total) bytes of the disks of the temporary folder and of `folders`."""
    disks, seen = {}, set()
    try:
        temporary = tempfile.gettempdir()
    except FileNotFoundError as error:
        raise ResourceError(
            f"{one_line(error)}; set TMPDIR to a folder on a disk that can be written"
        ) from error
    for folder in (temporary, *folders):
        device, usage = os.stat(folder).st_dev, shutil.disk_usage(folder)
        if device not in seen:
            disks[folder] = (usage.free, usage.total)
        seen.add(device)
    return {"open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0], "disks": disks}


def check_open_files(open_files: int, where: str) -> Finding:
    """`ulimit -n`: each actor holds sockets to S3 and to every other process."""
    if open_files != resource.RLIM_INFINITY and open_files < _MIN_OPEN_FILES:
        text = f"{where}: ulimit -n is {open_files}; raise it to 65536 before Ray starts: ulimit -n 65536"
        return Finding("warn", "open files", text)
    return Finding("ok", "open files", f"{where}: ulimit -n is {open_files}")


def check_disk(folder: str, room: tuple[int, int], where: str) -> Finding:
    """Room for checkpoints on their way, and for what the object store spills."""
    free, total = room
    text = f"{where}: {folder} has {free / 1e9:.0f} of {total / 1e9:.0f} GB free"
    if free < (1 - _FULL) * total:
        remedy = f"Ray spills nothing to a disk that is {_FULL:.0%} full; make room, or start Ray with "
        remedy += "--object-spilling-directory on another disk"
        return Finding("FAIL", "disk", f"{text}; {remedy}", ResourceError.exit_code)
    if free < _MIN_FREE_BYTES:
        return Finding("warn", "disk", f"{text}; spilled objects and checkpoints may fill it: make room")
    return Finding("ok", "disk", text)


def check_data(config: DataConfig, where: str = "here", access: Access = SIGNED) -> Finding:
    """List what is first under `data.path`, and read a few of it: the rate, and the time to the first byte."""
    path = normal_uri(config.path)
    if Path(path).is_relative_to(demo_folder()) and not Path(path).exists():
        return Finding("ok", "data", f"{where}: the first run generates the demo images at {path}")
    try:
        listing = list_entries(path, retry=_few, retry_later=_few, access=access)
        began = time.perf_counter()
        entries = list(islice(listing.entries, _NUM_LISTED))
        seconds = time.perf_counter() - began
        images = [entry for entry in entries if role_of(entry.key) != "other" and entry.size]
        others = [entry.key for entry in entries if role_of(entry.key) == "other"]
        ignored = (
            *count_keys(pa.chunked_array([others], pa.large_string())),
            *from_counts(listing.left_out),
        )
        if not images and len(entries) < _NUM_LISTED:
            line = ignored_line(ignored, otherwise="check data.path") or "check data.path"
            raise DataError(f"no images under {path}; {line}")
        text = f"{where}: {path}: {len(entries)} listed in {seconds:.2f} s"
        if not images:
            return Finding("warn", "data", f"{text}, but no file name is that of an image; check data.path")
        chosen = images[:: max(1, len(images) // _NUM_READ)][:_NUM_READ]
        rate, latency = _read_speed(listing.root, chosen, access)
    except DinorayError as error:
        return failed("data", type(error)(f"{where}: {error}"))
    speed = f"{len(chosen)} read at {rate / 1e6:.1f} MB/s each, first byte after {latency * 1e3:.1f} ms"
    return Finding("ok", "data", f"{text}, {speed} (medians)")


def _read_speed(root: str, entries: list[Entry], access: Access) -> tuple[float, float]:
    """Medians of (bytes per second, seconds to read one byte) of one request at a time."""
    rates, latencies = [], []
    for entry in entries:
        uri = f"{root.rstrip('/')}/{entry.key}"
        began = time.perf_counter()
        _read(uri, 1, access)
        middle = time.perf_counter()
        num_bytes = len(_read(uri, min(entry.size or 0, _READ_BYTES), access))
        rates.append(num_bytes / (time.perf_counter() - middle))
        latencies.append(middle - began)
    return statistics.median(rates), statistics.median(latencies)


def _read(uri: str, num_bytes: int, access: Access) -> bytes:
    if is_s3(uri):
        return read_object(*split_s3_uri(uri), byte_range=(0, num_bytes - 1), retry=_few, access=access)
    try:
        with open(uri, "rb") as file:
            return file.read(num_bytes)
    except OSError as error:
        raise DataError(f"{uri}: {error.strerror}; make it readable") from error


def check_storage(storage_path: str) -> Finding:
    """Write, read and delete a marker under `storage_path`, by both ways that a run writes: ours and Ray's."""
    folder = Directory(storage_path)
    if not is_s3(storage_path):  # nothing shall be left behind, no folder either
        existing = next(
            path for path in (folder.uri, *map(str, Path(folder.uri).parents)) if os.path.lexists(path)
        )
        folder = Directory(existing)
    name, text = f".dinoray-doctor-{uuid.uuid4().hex}", b"dinoray doctor"
    began = time.perf_counter()
    try:
        storage, path = filesystem(folder.uri)
        try:
            folder.write(name, text)
            with storage.open_output_stream(f"{path}/{name}") as stream:
                stream.write(text)
            if folder.read(name) != text:
                raise DataError(
                    f"{folder.join(name)}: the bytes read differ from the bytes written; check the storage"
                )
        finally:
            folder.delete(name)
    except DinorayError as error:
        return failed("storage", error)
    except OSError as error:  # pyarrow's
        text_ = (
            f"{folder.uri}: writing as Ray does, with pyarrow, fails: {one_line(error)}; allow s3:PutObject"
        )
        return Finding("FAIL", "storage", text_, DataError.exit_code)
    seconds = time.perf_counter() - began
    return Finding("ok", "storage", f"{folder.uri}: written, read and deleted in {seconds:.2f} s")


def check_clock(uri: str, access: Access = SIGNED) -> list[Finding]:
    """This clock against that of the S3 server; nothing where `uri` is local or the bucket cannot be asked."""
    if not is_s3(uri):
        return []
    bucket, _ = split_s3_uri(uri)
    try:
        ask = partial(s3_client(access).head_bucket, Bucket=bucket)
        began = time.time()
        answer = _few(ask, what=f"s3://{bucket}")
        middle = (began + time.time()) / 2
        date = answer["ResponseMetadata"]["HTTPHeaders"]["date"]
    except (DinorayError, KeyError):
        return []
    theirs = parsedate_to_datetime(date).timestamp() + 0.5  # whole seconds, cut off
    return [judge_clock(middle - theirs, "here, against S3")]


def judge_clock(skew: float, where: str) -> Finding:
    """What `skew` seconds between two clocks mean."""
    text = f"{where}: {abs(skew):.1f} s apart"
    if abs(skew) > _REFUSED_SECONDS:
        return Finding("FAIL", "clock", f"{text}, more than S3 allows; set the clock", DataError.exit_code)
    if abs(skew) > _ODD_SECONDS:
        return Finding("warn", "clock", f"{text}; set the clock: S3 refuses from 15 minutes on")
    return Finding("ok", "clock", text)
