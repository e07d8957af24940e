"""Pretrain a backbone with DINO: `dinoray pretrain [--recipe NAME] [--config FILE] [key=value ...]`.

Images -> manifest -> Ray Data multi-crop -> Ray Train DINO -> checkpoints -> k-NN. Where no recipe is
named, the recipe auto chooses settings for own images (jobs/cli/auto_recipe.py). The same command continues a
run that was killed, and does nothing for a run that is finished. While one command trains a run, another one of the
same name is refused.
"""

from argparse import Namespace
from collections.abc import Sequence

from rich.console import Console

from dinoray.jobs.cli.arguments import PretrainArguments, pretrain_config
from dinoray.jobs.cli.auto_recipe import AUTO
from dinoray.jobs.cli.config import differences, json_schema, load_run_config
from dinoray.jobs.cli.keys import keep_detected
from dinoray.jobs.cli.main import run_main
from dinoray.jobs.cli.print_config import describe_config
from dinoray.jobs.cli.recipes import has_images
from dinoray.jobs.runs.choosing import Asked, as_begun, choose_briefly, is_to_choose, kept_choices
from dinoray.jobs.runs.holding import lease_of
from dinoray.jobs.runs.result import describe_result
from dinoray.models.errors import ConfigError
from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.lease import InUseError
from dinoray.pipeline.worker.config import Config


def main(argv: Sequence[str]) -> None:
    """Parse, check everything that can be checked without a cluster, run, and say where the results are."""
    arguments = PretrainArguments().parse_args(argv)
    if arguments.json_schema:
        print(json_schema())
        return
    if arguments.print_config:
        print(_described(arguments), end="")
        return

    config, asked = pretrain_config(arguments), Asked.of(arguments)
    if arguments.synthetic or arguments.no_train:
        from dinoray.jobs.runs.head_space import measure_head_space  # loads PyTorch

        if asked is not None and config.recipe == AUTO:
            config = asked.config(choose_briefly(config, asked).tree)
        stream = arguments.no_train
        measure_head_space(config, step=arguments.synthetic, stream=stream, verbose=arguments.verbose)
        return
    console = Console()
    run = Directory(config.storage_path).child(config.name)
    lease = lease_of(run)
    try:
        lease.await_free()
    except InUseError:
        _settle(run, config, arguments)  # that another run has this name comes first
        raise
    config, is_finished = _settle(run, config, arguments)
    if is_finished:
        console.print(f"{run.uri} is finished; choose another name=... to train again", soft_wrap=True)
        console.print(describe_result(run), highlight=False, soft_wrap=True)
        return
    # Only now: what follows loads PyTorch, for which --help and a wrong option need not wait.
    from dinoray.jobs.runs.pretraining import pretrain

    pretrain(config, lease, verbose=arguments.verbose, asked=asked)


def _described(arguments: Namespace) -> str:
    """What --print-config prints; for the recipe auto with what the run chose, or would choose if it began now."""
    asked = Asked.of(arguments)
    if asked is None or not has_images(asked.settings()):
        return describe_config(Config, arguments, looks=True)
    config = pretrain_config(arguments)
    if config.recipe != AUTO:
        return describe_config(Config, arguments)
    run = Directory(config.storage_path).child(config.name)
    if is_to_choose(config, run):
        chosen = choose_briefly(config, asked)
        return describe_config(Config, arguments, looks=True, chosen=chosen.tree, notes=chosen.lines)
    config = as_begun(config, asked, run)
    found = kept_choices(config, run)
    tree = found.tree if found else None
    return describe_config(
        Config, arguments, looks=True, default=config.recipe, chosen=tree, notes=found.lines if found else ()
    )


def _settle(run: Directory, config: Config, arguments: Namespace) -> tuple[Config, bool]:
    """Return the config with what its run has detected, and whether that run is done. ConfigError as `_is_finished`."""
    if run.exists(run_dir.CONFIG):
        config = as_begun(config, Asked.of(arguments), run)
        config = keep_detected(config, load_run_config(run))
    return config, _is_finished(run, config, resume=arguments.resume, typed=arguments.overrides)


def _is_finished(run: Directory, config: Config, *, resume: bool, typed: Sequence[str]) -> bool:
    """Whether the run of this name is done. ConfigError when it was started with other settings."""
    if not run.exists(run_dir.CONFIG):
        return False
    changed = differences(load_run_config(run), config)
    if changed and not resume:
        from dinoray.pipeline.worker.driver import check_run  # loads PyTorch

        check_run(config)  # what is wrong under any name comes first
        keys = [override.partition("=")[0] for override in typed]
        changed.sort(key=lambda one: one.partition(":")[0] not in keys)  # the others follow from those
        is_other_data = any(one.startswith(("data.path:", "data.mix", "data.manifest:")) for one in changed)
        remedy = "" if is_other_data else ", or pass --resume to continue with the new settings"
        raise ConfigError(
            f"name={config.name} is in use by a run with other settings ({'; '.join(changed[:3])}"
            f"{'; ...' if len(changed) > 3 else ''}): choose another name=...{remedy}"
        )
    return run.exists(run_dir.RESULT) and not changed


if __name__ == "__main__":
    run_main(main)
