"""What tests of storage share: an empty run directory of each kind."""

from pathlib import Path

import pytest

from dinoray.pipeline.storage.files import Directory


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Directory:
    """The same empty run directory twice: on the disk and in a bucket."""
    if request.param == "local":
        return Directory(str(tmp_path / "runs" / "run"))
    return Directory(f"s3://{request.getfixturevalue('bucket')}/runs/run")
