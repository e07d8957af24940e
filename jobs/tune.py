"""Search settings of a run with Ray Tune: `python -m jobs.tune [--recipe NAME] [key=value ...] [tune.key=value ...]`.

Config -> plan -> trials, each a run of its own -> the best again with more seeds -> report and best.yaml. The same
command continues a study that was killed, from the trials that its directory holds; more `tune.trials` extend it, but
for a grid, which is done when it is, and a population, in which each trial has its place.
"""

from collections.abc import Sequence

from rich.console import Console

from jobs.cli.config import differences, json_schema, load_kept
from jobs.cli.keys import keep_detected
from jobs.cli.main import is_local, run_main
from jobs.cli.print_config import describe_config
from jobs.runs.data_lines import describe_data, describe_evaluation, evaluation_warnings
from jobs.runs.inputs import Inputs
from jobs.runs.run_files import draw_demo, write_about
from jobs.runs.run_size import check_workers
from jobs.runs.train import check_run
from jobs.studies.config import (
    FREE,
    NAME_SUFFIX,
    StudyArguments,
    StudyConfig,
    can_grow,
    first_points,
    objective_of,
    space_of,
    study_config,
)
from jobs.studies.resources import check_growth, check_study_size
from jobs.studies.study_run import StudyRun
from models.errors import ConfigError
from pipeline.storage.files import Directory
from pipeline.study.page.study_report import describe_study
from pipeline.study.search.progress import check_any_ran
from pipeline.study.trials import STUDY
from pipeline.training.published_weights import fetch_published_weights


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
    console = Console(highlight=False, soft_wrap=True, markup=False)
    directory = Directory(config.storage_path).child(config.name)
    if directory.exists("config.yaml"):
        config = keep_detected(config, load_kept(StudyConfig, directory))
    _check_name(directory, config, resume=arguments.resume)
    space = space_of(config)
    first = first_points(config, space)
    check_run(config)
    warnings = check_workers(config)
    draw_demo(config, console)
    inputs = Inputs.open(config, directory)
    if not directory.exists("config.yaml"):
        warnings += check_study_size(config, space, inputs.images.num_images)
    has_labels = inputs.labelled is not None or inputs.mismatch is not None
    objective = objective_of(config, space, labelled=has_labels)
    if inputs.mismatch and inputs.mismatch.is_disjoint and objective.metric.startswith("knn"):
        raise ConfigError(f"{inputs.mismatch.text}, or take tune.objective=rankme")
    warnings += evaluation_warnings(inputs, config.eval)
    about_data = [describe_data(inputs.images), describe_evaluation(inputs, config.eval)]
    write_about(
        directory, config, inputs, [*about_data, f"tune.objective={objective.metric}: {objective.reason}"]
    )
    console.print("\n".join([*about_data, *(f"warning: {line}" for line in warnings)]))
    study = StudyRun(config, directory, space, objective, first, inputs, console)
    if study.is_done():
        more = "more tune.trials extend it, " if can_grow(config) else ""
        console.print(f"{directory.uri} is finished; {more}another name=... starts anew")
    else:
        check_growth(config, is_local=is_local())
        if config.backbone.pretrained:
            fetch_published_weights(config)
        study.run(verbose=arguments.verbose)
    study.write_findings()
    console.print(describe_study(directory))
    check_any_ran(directory)


def _check_name(directory: Directory, config: StudyConfig, *, resume: bool) -> None:
    """ConfigError when the directory is that of a run, or of a study with other settings."""
    if not directory.exists("config.yaml"):
        return
    if not directory.exists(STUDY) and directory.exists("metrics.jsonl"):
        raise ConfigError(f"name={config.name} is in use by a run: choose another name=...")
    free = [key for key in FREE if key != "tune.trials" or can_grow(config)]
    kept = load_kept(StudyConfig, directory)
    changed = differences(kept, config, free=free)
    if "pb2" in (kept.tune.scheduler, config.tune.scheduler):
        moved = [one for one in changed if one.startswith(("tune.trials:", "tune.scheduler:"))]
        if moved:
            raise ConfigError(
                f"name={config.name} is in use by a study with other settings ({'; '.join(moved)}), and each trial of "
                "a population has its place in it: choose another name=..."
            )
    if changed and not resume:
        raise ConfigError(
            f"name={config.name} is in use by a study with other settings ({'; '.join(changed[:3])}"
            f"{'; ...' if len(changed) > 3 else ''}): choose another name=..., or pass --resume to continue it so"
        )


if __name__ == "__main__":
    run_main(main)
