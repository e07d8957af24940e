"""Run a job on a cluster: `dinoray submit [options] -- JOB ARGS...`, e.g. `-- dinoray pretrain name=first`.

The same command again follows the job while it runs, continues it after it failed or was stopped, and does
nothing once it is done. It shows the job's log and ends with the job's exit code.
"""

import contextlib
import hashlib
import re
import shlex
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from dinoray.jobs.cli.arguments import CommandLine, PretrainArguments, positive, pretrain_config
from dinoray.jobs.cli.config import apply_overrides, differences, load_run_config
from dinoray.jobs.cli.keys import did_you_mean, leaf_fields, looks_secret
from dinoray.jobs.cli.main import run_main
from dinoray.jobs.cluster import job_server
from dinoray.jobs.cluster.job_server import Attempt
from dinoray.jobs.cluster.upload import check_config_file, describe, named_files, pack, read_runtime_env
from dinoray.jobs.runs.choosing import Asked, as_begun
from dinoray.jobs.runs.commit import COMMIT, commit_of
from dinoray.jobs.studies.config import StudyArguments, study_config
from dinoray.models.commands import command, command_words
from dinoray.models.errors import ConfigError, DinorayError, redact_credentials
from dinoray.models.settings import flatten
from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.files import Directory, is_shared_path
from dinoray.pipeline.worker.config import RUN_NAME, Config

_RUNTIME_ENV = Path("deploy/runtime_env.yaml")
_STOP_SECONDS = "RAY_JOB_STOP_WAIT_TIME_S"
"""How long a job that is stopped has for its last checkpoint; Ray's own 3 seconds are too few."""


class _Job(NamedTuple):
    """What is to run: its module and arguments, the name of its run, and its config if that can be read here."""

    run: str
    words: list[str]
    config: Config | None

    @property
    def command(self) -> str:
        """The command on the cluster: a module of the code that is sent, not of an older installation there."""
        return shlex.join(["python", "-m", *self.words])


def main(argv: Sequence[str]) -> None:
    """Check all that can be checked here, find out what there is of the run, and do what is left."""
    options, words = _parse(argv)
    job = _read_job(options, words) if words else None
    run = job.run if job else options.run
    environment = _runtime_env(options)
    client = job_server.connect(job_server.dashboard_address(options.address))
    attempts = job_server.attempts_at(client, run)
    last = attempts[-1] if attempts else None
    if options.status:
        _show(run, attempts)
    elif options.stop:
        _stop(client, run, last)
    elif job:
        if last is None or last.is_over:
            if _is_done(job, last):
                return
            last = _submit(client, job, attempts, options, environment)
        else:
            print(f"{_described(last)}; following it", flush=True)
            if last.info.entrypoint != job.command:
                print(
                    f"warning: the running job was started with a different command: {last.info.entrypoint}",
                    flush=True,
                )
        if not options.no_wait:
            _follow(client, run, last)


def _parse(argv: Sequence[str]) -> tuple[Namespace, list[str]]:
    """Our options, and NAME ARGUMENTS... of the job after `--`."""
    parser = CommandLine(
        "submit",
        description="Run a job on a Ray cluster. The same command follows a running job and resumes a failed one.",
        usage="%(prog)s [options] -- dinoray NAME ARGUMENTS...",
    )
    parser.add_argument(
        "--address",
        default=None,
        help="http://HOST:PORT of the dashboard (default: RAY_API_SERVER_ADDRESS or RAY_ADDRESS)",
    )
    parser.add_argument(
        "--working-dir", type=Path, default=Path("."), help="folder of the code to send (default: .)"
    )
    parser.add_argument(
        "--runtime-env",
        type=Path,
        default=None,
        help=f"YAML file of the runtime environment (default: {_RUNTIME_ENV} if it exists)",
    )
    parser.add_argument(
        "--run",
        default=None,
        help="name of the run, for a job without name= (default: made from the command)",
    )
    parser.add_argument(
        "--max-attempts",
        type=positive,
        default=20,
        help="largest number of submissions of one run (default: 20)",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--no-wait", action="store_true", help="submit the job without following its log")
    what.add_argument("--stop", action="store_true", help="stop the run and wait until it has ended")
    what.add_argument("--status", action="store_true", help="list the attempts of the run")
    cut = argv.index("--") if "--" in argv else len(argv)
    options, words = parser.parse_args(argv[:cut]), _without_program(argv[cut + 1 :])
    if not words and not (options.run and (options.stop or options.status)):
        example = command("submit", "--", *command_words("pretrain", "name=NAME", "..."))
        raise ConfigError(f"no job is given; pass one, e.g. {example}, or --run NAME with --stop or --status")
    return options, words


def _without_program(words: Sequence[str]) -> list[str]:
    """NAME ARGUMENTS... of `dinoray NAME ARGUMENTS...` or `jobs.NAME ARGUMENTS...`, each also after `python -m`."""
    if len(words) > 1 and re.fullmatch(r"(.*/)?python[0-9.]*", words[0]) and words[1] == "-m":
        words = words[2:]
    if words and re.fullmatch(r"(.*/)?dinoray", words[0]):
        return list(words[1:])
    return [words[0].removeprefix("jobs."), *words[1:]] if words else []


def _read_job(options: Namespace, words: list[str]) -> _Job:
    """Check the job and its arguments as far as that can be done here."""
    name, *arguments = words
    folder = options.working_dir / "jobs"
    jobs = {file.stem for file in folder.glob("*.py") if "run_main(main)" in file.read_text()}
    if not jobs:
        raise ConfigError(
            f"--working-dir {options.working_dir}: holds no code of dinoray to send; run the command in a checkout "
            "of the project, or pass --working-dir CHECKOUT"
        )
    if name not in jobs:
        near = did_you_mean(name, jobs) or f"; choose one of {', '.join(sorted(jobs))}"
        raise ConfigError(f"{name} is not a job in {folder}{near}")
    words = [f"jobs.{name}", *arguments]
    if name in ("pretrain", "tune"):
        config = _config(name, arguments)
        _refuse_secrets(arguments)
        if options.run not in (None, config.name):
            raise ConfigError(
                f"--run {options.run} is for jobs without name=, but this job has name={config.name}; leave out --run"
            )
        return _Job(config.name, words, config)
    _refuse_secrets(arguments)
    names = [word.removeprefix("name=") for word in words if word.startswith("name=")]
    digest = hashlib.blake2b(shlex.join(words).encode(), digest_size=4).hexdigest()
    run = options.run or (names or [f"{name}-{digest}"])[-1]
    if not re.fullmatch(RUN_NAME, run):
        raise ConfigError(
            f"{'--run ' if options.run else 'name='}{run}: must be letters, digits, '.', '_' and '-', beginning with "
            "a letter or digit"
        )
    return _Job(run, words, None)


def _refuse_secrets(words: Sequence[str]) -> None:
    """ConfigError for words that look as if they held one: the job server shows a job's command to whoever asks."""
    known = {key.rpartition(".")[2] for key in leaf_fields(Config)}
    names = [
        word.lstrip("-").partition("=")[0].replace("-", "_")
        for word in words
        if "=" in word or word[:2] == "--"
    ]
    for word in words:
        with contextlib.suppress(ConfigError):  # which is for the job to say
            names += [key for key, _ in flatten(apply_overrides({}, [word]))]
        if redact_credentials(word) != word:
            names.append(redact_credentials(word))
    for name in names:
        if "@" in name or (looks_secret(name) and name.rpartition(".")[2] not in known):
            raise ConfigError(
                f"{name}: looks like a secret, and anyone who can reach the cluster can read a job's command; "
                "give the nodes a role, or set it in the environment of the nodes"
            )


def _config(name: str, arguments: list[str]) -> Config:
    """The config of a pretraining or a study. ConfigError for what would be wrong there, or lost."""
    if name == "tune":
        config: Config = study_config(StudyArguments().parse_args(arguments))
    else:
        config = pretrain_config(PretrainArguments().parse_args(arguments))
    if not is_shared_path(config.storage_path):
        raise ConfigError(
            f"storage_path={config.storage_path} would lie in a temporary folder of the cluster; set "
            "storage_path=s3://BUCKET/runs, or an absolute path that all nodes share"
        )
    return config


def _runtime_env(options: Namespace) -> dict[str, Any]:
    default = options.working_dir / _RUNTIME_ENV
    if options.runtime_env is None and not default.exists():
        return {}
    return read_runtime_env(options.runtime_env or default)


def _is_done(job: _Job, last: Attempt | None) -> bool:
    """Whether nothing is left to do, which is said then."""
    if last and last.exit_code == 0 and last.info.entrypoint == job.command:
        print(f"{job.run} is done: {last.id} succeeded; pass another name=... or --run NAME to run it again")
        return True
    if job.config is None:
        return False
    run = Directory(job.config.storage_path).child(job.config.name)
    try:
        is_done = run.exists(run_dir.RESULT) and not differences(
            load_run_config(run), _begun(job, job.config, run)
        )
    except DinorayError as error:
        print(f"warning: cannot check from this machine whether {run.uri} is finished: {error}", flush=True)
        return False
    if is_done:
        print(f"{job.run} is done: {run.join(run_dir.RESULT)} exists; choose another name=... to train again")
    return is_done


def _begun(job: _Job, config: Config, run: Directory) -> Config:
    """The job's config with what the recipe auto chose when the run began."""
    if job.words[0].removeprefix("jobs.") != "pretrain":
        return config
    return as_begun(config, Asked.of(PretrainArguments().parse_args(job.words[1:])), run)


def _submit(
    client: Any, job: _Job, attempts: list[Attempt], options: Namespace, environment: dict[str, Any]
) -> Attempt:
    """Send the code and start the next attempt."""
    if len(attempts) >= options.max_attempts:
        raise DinorayError(
            f"{job.run} had {len(attempts)} attempts, {_described(attempts[-1])}; fix the cause, then pass "
            f"--max-attempts {len(attempts) + 1}"
        )
    if attempts:
        print(_described(attempts[-1]), flush=True)
    number = attempts[-1].number + 1 if attempts else 1
    commit = commit_of(options.working_dir)
    with tempfile.TemporaryDirectory() as folder:
        excludes = environment.get("excludes") or []
        file = Path(folder, "working_dir.zip")
        archive = pack(options.working_dir, excludes, file, named=named_files(job.words))
        check_config_file(job.words, options.working_dir, archive.names)
        print(
            f"{job.run}-a{number}: sending {describe(archive)}{f', commit {commit}' if commit else ''}",
            flush=True,
        )
        attempt = job_server.submit(
            client,
            job.run,
            number,
            job.command,
            metadata={"git_commit": commit} if commit else {},
            runtime_env={
                **{key: value for key, value in environment.items() if key != "excludes"},
                "env_vars": {
                    _STOP_SECONDS: "60",
                    **(environment.get("env_vars") or {}),
                    **({COMMIT: commit} if commit else {}),
                },
                "working_dir": str(archive.file),
            },
        )
    print(
        f"{attempt.id} is submitted; the same command follows it, and --stop --run {job.run} stops it",
        flush=True,
    )
    return attempt


def _follow(client: Any, run: str, attempt: Attempt) -> None:
    """Show the log to the end, and end as the job does."""
    try:
        ended = job_server.follow(client, attempt)
    except KeyboardInterrupt:
        sys.exit(
            f"{attempt.id} is still running; the same command follows it, and --stop --run {run} stops it"
        )
    print(_described(ended), flush=True)
    if ended.info.driver_exit_code is None and str(ended.info.status) == "FAILED":
        print(f"error: {ended.info.error_type}: {' '.join(str(ended.info.message).split())}", file=sys.stderr)
    if ended.exit_code:
        sys.exit(ended.exit_code)


def _stop(client: Any, run: str, last: Attempt | None) -> None:
    if last is None or last.is_over:
        print(f"{run} is not running" + (f": {_described(last)}" if last else ""))
        return
    print(f"stopping {last.id}", flush=True)
    print(_described(job_server.stop(client, last)))


def _show(run: str, attempts: list[Attempt]) -> None:
    for attempt in attempts:
        print(_described(attempt))
    if not attempts:
        print(f"{run} was not submitted to this cluster")


def _described(attempt: Attempt) -> str:
    """`first-a2 failed with exit code 3, 0:01:15 after 2026-01-31 09:30:00`."""
    info = attempt.info
    text = f"{attempt.id} {'is ' if not attempt.is_over else ''}{str(info.status).lower()}"
    if str(info.status) == "FAILED" and info.driver_exit_code is not None:
        text += f" with exit code {attempt.exit_code}"
    started = datetime.fromtimestamp((info.start_time or 0) / 1000).replace(microsecond=0)
    if info.end_time:
        return f"{text}, {timedelta(seconds=(info.end_time - info.start_time) // 1000)} after {started}"
    return f"{text} since {started}"


if __name__ == "__main__":
    run_main(main)
