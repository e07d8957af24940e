"""Private names of Ray's job client: the version of Ray on the cluster.

The public `get_version` returns the version of the job API. Without this name the versions are not compared.
The same in Ray 2.58.1, 2.59.0 and 2.60.0.
"""

from ray.job_submission import JobSubmissionClient


def server_version(client: JobSubmissionClient) -> str | None:
    """Return the version of Ray on the cluster, None where the client does not know it."""
    version = getattr(client, "_server_ray_version", None)
    return None if version is None else str(version)
