"""List a data set into a manifest for runs: `dinoray manifest DATA --out FOLDER_OR_S3 [--name NAME] [options]`.

Images -> NAME-0001.parquet, which `data.manifest` gives to any number of runs. The same command, called again, lists
anew: if anything has changed, it writes NAME-0002.parquet, and prints what is new, gone and changed. A listing of S3
that is interrupted is resumed.
"""

import re
from collections.abc import Sequence

from dinoray.jobs.cli.arguments import CommandLine, one_source
from dinoray.jobs.cli.main import run_main
from dinoray.models.errors import ConfigError
from dinoray.pipeline.worker.config import RUN_NAME

_SECTIONS = ("data", "storage")


def main(argv: Sequence[str]) -> None:
    """Parse, list, and write a manifest if it differs from the newest one."""
    arguments = _parser().parse_args(argv)
    one_source(arguments.overrides, "manifest")
    for override in arguments.overrides:
        if override.partition(".")[0] not in _SECTIONS:
            allowed = ", ".join(f"{section}.*" for section in _SECTIONS)
            raise ConfigError(f"{override!r}: only {allowed} can be set here; leave it out")
    if not re.match(RUN_NAME, arguments.name):
        raise ConfigError(
            f"--name={arguments.name!r} must be letters, digits, '.', '_' and '-', e.g. --name=photos"
        )
    # Only now: a wrong option need not wait for what follows.
    from dinoray.jobs.runs.listing import write_manifest

    write_manifest(arguments)


def _parser() -> CommandLine:
    parser = CommandLine("manifest", description="List a data set into a manifest, which runs can share.")
    parser.add_argument("data", help="images: a folder, s3://bucket/prefix, or Parquet in either")
    parser.add_argument("--out", required=True, help="output folder or s3://bucket/prefix for the manifests")
    parser.add_argument("--name", default="manifest", help="how file names begin (default: manifest)")
    parser.add_overrides("data.label_from_parent=true")
    return parser


if __name__ == "__main__":
    run_main(main)
