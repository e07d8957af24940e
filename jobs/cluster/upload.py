"""What goes to the cluster with a job: the code, as one archive, and the runtime environment. No secrets.

The job server stores both and shows the runtime environment to whoever asks, so what looks like a secret is
refused here. Knows no cluster.
"""

import os
import shutil
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pathspec import GitIgnoreSpec
from ray.runtime_env import RuntimeEnv

from dinoray.jobs.cli.config import read_file
from dinoray.jobs.cli.keys import did_you_mean, looks_secret
from dinoray.models.errors import ConfigError, one_line, redact_credentials
from dinoray.models.settings import flatten
from dinoray.pipeline.study.trials import BEST

MAX_BYTES = 50_000_000
"""Largest archive that is sent; Ray's job server refuses 100 MiB with an HTTP status alone."""

_NEVER = (
    *("/data", "/runs", "/build", "/dist", ".git", ".venv", "venv", "*.egg-info", "node_modules"),
    *("__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis", ".ipynb_checkpoints"),
    *(".aws", ".ssh"),
)
NO_JOB_READS = ("/.ci", "/benchmarks", "/deploy", "/tests")
"""Folders of this project that no job reads."""
SECRET_FILES = (
    *("*.env", ".env.*", ".envrc", ".netrc", ".pypirc", ".npmrc", ".pgpass", ".git-credentials"),
    *("*.pem", "*.key", "*.p12", "id_rsa*", "id_ed25519*", "auth_token", "*credentials", "*credentials.json"),
    *("secrets.yaml", "secrets.yml", "secrets.json", "secrets.toml"),
)
"""Names of files, never of folders, which may hold code, that stay at home."""
_SECRET = GitIgnoreSpec.from_lines(SECRET_FILES)
_SHOWN = (
    "and anyone who can reach the job server can read it; give the nodes a role (or set it in their environment) "
    "and remove it here"
)
_IGNORE_FILES = (".gitignore", ".rayignore")


class Archive(NamedTuple):
    """A zip file of a working directory, and what it holds."""

    file: Path
    names: frozenset[str]
    num_bytes: int


def read_runtime_env(file: Path) -> dict[str, Any]:
    """The runtime environment in a YAML file; ConfigError holds one line per mistake, all of them.

    Ray itself takes unknown keys without a word.
    """
    tree = read_file(file, "--runtime-env")
    known = {key for key in RuntimeEnv.known_fields if not key.startswith("_")}
    mistakes = [
        f"{file}: {key} is not a key of a runtime environment{did_you_mean(str(key), known)}"
        for key in tree
        if key not in known
    ]
    if "working_dir" in tree:
        mistakes.append(f"{file}: working_dir: remove it here and pass --working-dir FOLDER")
    variables = tree.get("env_vars")
    for name in variables if isinstance(variables, Mapping) else ():
        if looks_secret(str(name)):
            mistakes.append(f"{file}: env_vars.{name} looks like a secret, {_SHOWN}")
    mistakes += [
        f"{file}: {key} holds an address with a user name or key before its @, {_SHOWN}"
        for key, value in flatten(tree)
        if redact_credentials(str(value)) != str(value)
    ]
    if not mistakes:
        try:
            RuntimeEnv(**tree)
        except (TypeError, ValueError) as error:
            mistakes.append(f"{file}: {one_line(error)}; mend it as Ray's runtime environments are written")
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return tree


def pack(folder: Path, excludes: Sequence[str], file: Path, *, named: Iterable[str] = ()) -> Archive:
    """Write the archive of `folder` to `file`; ConfigError, with the largest files, when it is over MAX_BYTES.

    `named` are the files that the command names. The same files give the same bytes, so that the cluster
    recognises an archive that it already has.
    """
    files = sorted({*list_files(folder, excludes), *_inside(folder, named)})
    sizes = {name: (folder / name).stat().st_size for name in files}
    if sum(sizes.values()) > MAX_BYTES:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:5]
        raise ConfigError(
            f"--working-dir {folder} holds {_megabytes(sum(sizes.values()))} in {len(files)} files, more than "
            f"{_megabytes(MAX_BYTES)}; the largest: "
            + ", ".join(f"{name} {_megabytes(sizes[name])}" for name in largest)
            + "; list what the job does not need under excludes in the runtime environment, or in .gitignore; "
            "put large files that it reads on S3"
        )
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in files:
            entry = zipfile.ZipInfo(name)  # of 1980
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (folder / name).stat().st_mode << 16
            with (folder / name).open("rb") as source, archive.open(entry, "w") as target:
                shutil.copyfileobj(source, target)
    return Archive(file, frozenset(files), file.stat().st_size)


def list_files(folder: Path, excludes: Sequence[str]) -> list[str]:
    """Names of the files in `folder` that are sent, sorted.

    Left out: `excludes`, what .gitignore or .rayignore of any folder names, caches, results, secrets, and
    folders of this project that no job reads. Links to folders are not followed.
    """
    if not folder.is_dir():
        raise ConfigError(f"--working-dir {folder}: there is no such folder; check the path")
    specs = [("", GitIgnoreSpec.from_lines([*_NEVER, *NO_JOB_READS, *excludes]))]
    found: list[str] = []
    for path, folders, files in os.walk(folder, onerror=_refuse):
        inner = os.path.relpath(path, folder).replace(os.sep, "/")
        prefix = "" if inner == "." else f"{inner}/"
        for name in _IGNORE_FILES:
            if name in files:
                lines = Path(path, name).read_text(errors="replace").splitlines()
                specs.append((prefix, GitIgnoreSpec.from_lines(lines)))
        folders[:] = [name for name in folders if not _matches(f"{prefix}{name}/", specs)]
        found += [
            prefix + name
            for name in files
            if os.path.isfile(os.path.join(path, name))
            and not is_secret_file(name)
            and not _matches(prefix + name, specs)
        ]
    for name in found:
        shown = os.fsencode(name).decode(errors="replace")
        if shown != name:
            raise ConfigError(
                f"--working-dir {folder}: {shown} is not a UTF-8 name; rename it, or exclude its folder"
            )
    return sorted(found)


def named_files(words: Sequence[str]) -> set[str]:
    """Return what a command may name files with: words, values, values in its --config file, a study's best config."""
    named = {name for word in words for name in (word, word.partition("=")[2])}
    named |= {f"{folder}/{BEST}" for folder in _values_of("--from-study", words)}
    for file in _values_of("--config", words):
        named |= {str(value) for _, value in flatten(read_file(Path(file), "--config"))}
    return named


def _values_of(option: str, words: Sequence[str]) -> list[str]:
    pairs = zip(words, [*words[1:], ""], strict=True)
    return [word.partition("=")[2] or after for word, after in pairs if word.partition("=")[0] == option]


def check_config_file(words: Sequence[str], folder: Path, names: frozenset[str]) -> None:
    """ConfigError unless the file that --config names is sent."""
    for file in _values_of("--config", words):
        if os.path.normpath(file) in names:
            continue
        if is_secret_file(Path(file).name):
            raise ConfigError(f"--config {file} is not sent: a file of this name may hold secrets; rename it")
        raise ConfigError(
            f"--config {file} is not sent: it is outside of --working-dir {folder}; copy it there and pass "
            f"--config {Path(file).name}"
        )


def is_secret_file(name: str) -> bool:
    """Whether a file of this name may hold secrets."""
    return _SECRET.match_file(name)


def _inside(folder: Path, names: Iterable[str]) -> set[str]:
    """Those of the names that are files in `folder`, without secrets; an excluded file counts too."""
    normal = {os.path.normpath(name).replace(os.sep, "/") for name in names if name and "\0" not in name}
    return {
        name
        for name in normal
        if not name.startswith(("/", "../")) and not is_secret_file(name) and _is_file(folder / name)
    }


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long for any file
        return False


def describe(archive: Archive) -> str:
    """Its size in words."""
    return f"{_megabytes(archive.num_bytes)} in {len(archive.names)} files"


def _matches(name: str, specs: Sequence[tuple[str, GitIgnoreSpec]]) -> bool:
    return any(name.startswith(prefix) and spec.match_file(name[len(prefix) :]) for prefix, spec in specs)


def _refuse(error: OSError) -> None:
    raise ConfigError(
        f"{error.filename}: {error.strerror}; make the folder readable, or exclude it"
    ) from error


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"
