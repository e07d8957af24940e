"""Search hyper-parameters with Ray Tune: `dinoray tune [--recipe NAME] [key=value ...] [tune.key=value ...]`.

Config -> plan -> trials, each a run of its own -> the best again with more seeds -> report and best.yaml. The same
command continues a study that was killed, from the trials that its directory holds; more `tune.trials` extend it, but
for a grid, which is done when it is, and a population, in which each trial has its place.
"""

from collections.abc import Sequence

from dinoray.jobs.cli.config import differences, json_schema, load_kept
from dinoray.jobs.cli.keys import keep_detected
from dinoray.jobs.cli.main import run_main
from dinoray.jobs.cli.print_config import describe_config
from dinoray.jobs.runs.holding import lease_of
from dinoray.jobs.studies.config import (
    MUTABLE_ON_RESUME,
    NAME_SUFFIX,
    StudyArguments,
    StudyConfig,
    can_grow,
    study_config,
)
from dinoray.models.errors import ConfigError
from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.lease import InUseError
from dinoray.pipeline.study.trials import STUDY


def main(argv: Sequence[str]) -> None:
    """Parse, check what can be checked without a cluster, search, confirm, and say what was found."""
    arguments = StudyArguments().parse_args(argv)
    if arguments.json_schema:
        print(json_schema(StudyConfig))
        return
    if arguments.print_config:
        print(describe_config(StudyConfig, arguments, name_suffix=NAME_SUFFIX), end="")
        return
    config = study_config(arguments)
    directory = Directory(config.storage_path).child(config.name)
    lease = lease_of(directory)
    try:
        lease.await_free()
    except InUseError:
        _settle(directory, config, resume=arguments.resume)  # that another study has this name comes first
        raise
    config = _settle(directory, config, resume=arguments.resume)
    # Only now: what follows loads PyTorch, for which --help and a wrong option need not wait.
    from dinoray.jobs.studies.searching import search

    search(config, directory, lease, verbose=arguments.verbose)


def _settle(directory: Directory, config: StudyConfig, *, resume: bool) -> StudyConfig:
    """Return the config with what its study has detected. ConfigError as `_check_name`."""
    if directory.exists(run_dir.CONFIG):
        config = keep_detected(config, load_kept(StudyConfig, directory))
    _check_name(directory, config, resume=resume)
    return config


def _check_name(directory: Directory, config: StudyConfig, *, resume: bool) -> None:
    """ConfigError when the directory is that of a run, or of a study with other settings."""
    if not directory.exists(run_dir.CONFIG):
        return
    if not directory.exists(STUDY) and directory.exists(run_dir.METRICS):
        raise ConfigError(f"name={config.name} is in use by a run: choose another name=...")
    free = [key for key in MUTABLE_ON_RESUME if key != "tune.trials" or can_grow(config)]
    kept = load_kept(StudyConfig, directory)
    changed = differences(kept, config, free=free)
    if "pb2" in (kept.tune.scheduler, config.tune.scheduler):
        moved = [one for one in changed if one.startswith(("tune.trials:", "tune.scheduler:"))]
        if moved:
            raise ConfigError(
                f"name={config.name} is in use by a study with other settings ({'; '.join(moved)}), which "
                "tune.scheduler=pb2 cannot change: choose another name=..."
            )
    if changed and not resume:
        raise ConfigError(
            f"name={config.name} is in use by a study with other settings ({'; '.join(changed[:3])}"
            f"{'; ...' if len(changed) > 3 else ''}): choose another name=..., or pass --resume "
            "to continue with the new settings"
        )


if __name__ == "__main__":
    run_main(main)
