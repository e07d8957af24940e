"""What tests share: a Ray, a real S3 server, and a fresh bucket and clean AWS_* for each test."""

import gc
import os
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from faults import FaultProxy, fault_proxy
from jobs_processes import RAY_SETTINGS
from paths import ROOT
from ray_head import RayHead, ray_head, run_job_on
from servers import S3Server, aws_environment, s3_server, use_aws
from xdist.scheduler import LoadScopeScheduling

# How long an example takes depends on what else the machine does: it is never a reason to fail.
hypothesis.settings.register_profile("dinoray", deadline=None)
hypothesis.settings.load_profile("dinoray")

# Before torch is imported: the cores are for several processes, whose threads would wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

os.environ |= RAY_SETTINGS


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Jobs take minutes, and more beside others: they have longer than other tests before they count as hanging."""
    for item in items:
        if item.get_closest_marker("ray") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(1800))
    items.sort(key=lambda item: _scope(item.path) != _RAY)


# Until all tests are imported: a third of that time would go into collections that find nothing.
gc.disable()


def pytest_collection_finish() -> None:
    """Later collections need not visit, again and again, the million objects that imports have made: they stay."""
    gc.collect()
    gc.freeze()
    gc.enable()


class FilesAndRay(LoadScopeScheduling):
    """What one of several processes takes as a whole: a file, whose tests share servers, or all files with tests that
    start Ray. Those come first: two of them at once take 1.4 times the CPU time of one after the other, on 2 cores.
    On 2 cores they take as long as all the rest; a third process makes them slower and nothing faster."""

    def _split_scope(self, nodeid: str) -> str:
        return _scope(self.config.rootpath / nodeid.partition("::")[0])


_RAY = "files with tests that start Ray"


@cache
def _scope(file: Path) -> str:
    return _RAY if "mark.ray" in file.read_text() else str(file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FilesAndRay:
    """With -n."""
    config.option.loadscopereorder = False  # in the order of the collection, not the largest first
    return FilesAndRay(config, log)


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """A SeaweedFS server, started when the first test asks for it; `s3.env` is for child processes.

    The nodes of `cluster` are led to it too.
    """
    with s3_server() as server:
        yield server


@pytest.fixture(scope="session")
def cluster(s3: S3Server) -> Iterator[RayHead]:
    """A Ray that all jobs of this process's tests may share which do not need one of their own."""
    with ray_head({**s3.env, "PYTHONPATH": str(ROOT)}, num_cpus=6) as head:
        yield head


@pytest.fixture(scope="session")
def run_here(cluster: RayHead) -> Callable[..., str]:
    """`run_here("jobs.embed", *arguments, code=0)` runs a job to its end on `cluster` and returns what it printed."""
    return partial(run_job_on, cluster)


@pytest.fixture(scope="session")
def next_bucket(s3: S3Server) -> Iterator[Callable[[], str]]:
    """Gives new, empty buckets. SeaweedFS takes 0.2 s over a bucket's first object, so each is made ahead."""

    def make() -> str:
        name = f"test-{uuid.uuid4().hex[:12]}"
        client = s3.client()
        client.create_bucket(Bucket=name)
        client.put_object(Bucket=name, Key="first", Body=b"1")
        client.delete_object(Bucket=name, Key="first")
        return name

    with ThreadPoolExecutor(1) as pool:
        ahead = [pool.submit(make)]

        def take() -> str:
            ahead.append(pool.submit(make))
            return ahead.pop(0).result()

        yield take


@pytest.fixture
def bucket(s3: S3Server, next_bucket: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a bucket of the test's own; this process's AWS_* lead to it and nowhere else."""
    use_aws(monkeypatch, s3.env)
    return next_bucket()


@pytest.fixture
def proxy(s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A fault proxy that stands between this process and `bucket` for the length of the test."""
    with fault_proxy(s3.endpoint) as running:
        use_aws(monkeypatch, aws_environment(running.endpoint))
        yield running
