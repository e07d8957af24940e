"""One study from its checks to its findings: what needs no cluster is checked before Ray starts."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from dinoray.jobs.cli.main import is_local
from dinoray.jobs.runs.data_lines import data_lines, describe_evaluation, evaluation_warnings
from dinoray.jobs.runs.run_files import draw_demo, write_about
from dinoray.jobs.runs.run_size import check_workers
from dinoray.jobs.studies.config import StudyConfig, can_grow, first_points, objective_of, space_of
from dinoray.jobs.studies.resources import check_growth, check_study_size
from dinoray.jobs.studies.study_run import StudyRun
from dinoray.models.errors import ConfigError
from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.files import Directory, check_writable
from dinoray.pipeline.storage.lease_keeper import LeaseKeeper
from dinoray.pipeline.study.page.study_report import describe_study
from dinoray.pipeline.study.search.progress import check_any_ran
from dinoray.pipeline.study.space import Space
from dinoray.pipeline.training.published_weights import fetch_published_weights
from dinoray.pipeline.worker.driver import check_run
from dinoray.pipeline.worker.inputs import Inputs


def search(config: StudyConfig, directory: Directory, lease: LeaseKeeper, *, verbose: bool) -> None:
    """Check, run the trials that are missing, confirm the best, and say what was found.

    `lease`: of the study's directory; held from the first file that is written to the last.
    """
    console = Console(highlight=False, soft_wrap=True, markup=False)
    space = space_of(config)
    first = first_points(config, space)
    check_run(config)
    warnings = check_workers(config)
    check_writable(config.storage_path, setting="storage_path")
    with lease:
        _search(config, directory, lease, console, space, first, warnings, verbose=verbose)


def _search(
    config: StudyConfig,
    directory: Directory,
    lease: LeaseKeeper,
    console: Console,
    space: Space,
    first: Sequence[Mapping[str, Any]],
    warnings: list[str],
    *,
    verbose: bool,
) -> None:
    draw_demo(config, console)
    inputs = Inputs.open(config, directory)
    if not directory.exists(run_dir.CONFIG):
        warnings += check_study_size(config, space, inputs.images.num_images, inputs.images.manifest.ignored)
    has_labels = inputs.labelled is not None or inputs.mismatch is not None
    objective = objective_of(config, space, labelled=has_labels)
    if inputs.mismatch and inputs.mismatch.is_disjoint and objective.metric.startswith("knn"):
        raise ConfigError(f"{inputs.mismatch.text}, or set tune.objective=rankme")
    warnings += evaluation_warnings(inputs, config.eval)
    about_data = [*data_lines(inputs.images), describe_evaluation(inputs, config.eval)]
    write_about(
        directory, config, inputs, [*about_data, f"tune.objective={objective.metric}: {objective.reason}"]
    )
    console.print("\n".join([*about_data, *(f"warning: {line}" for line in warnings)]))
    study = StudyRun(config, directory, space, objective, first, inputs, console, lease)
    if study.is_done():
        more = "raise tune.trials to extend it, or " if can_grow(config) else ""
        console.print(f"{directory.uri} is finished; {more}choose another name=... to start a new study")
    else:
        check_growth(config, is_local=is_local())
        fetch_published_weights(config, init_path=config.init.path)
        study.run(verbose=verbose)
    lease.fence.check()
    study.write_findings()
    console.print(describe_study(directory))
    check_any_ran(directory)
