"""The lease of a run or study, for the commands that train: who holds it is printed with the submitted job's name."""

import json
import os

from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.lease_keeper import LeaseKeeper

_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Where Ray describes the submitted job that a process belongs to."""


def lease_of(directory: Directory) -> LeaseKeeper:
    """Return the lease of a directory, to be waited for and then held."""
    return LeaseKeeper(directory, tell=_print, job=_submission_id())


def _print(line: str) -> None:
    print(line, flush=True)


def _submission_id() -> str:
    try:
        return str(json.loads(os.environ[_JOB])["metadata"]["job_submission_id"])
    except (KeyError, ValueError, TypeError):
        return ""
