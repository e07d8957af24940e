"""Check the files of a run or study: who trains it, metrics, Ray Train's list, each checkpoint, and what a resume uses.

Nothing is changed, and no network is read. No Ray here.
"""

from collections.abc import Iterator
from typing import Any

from dinoray.jobs.cluster.machine_checks import Finding, failed
from dinoray.models.errors import ConfigError, DataError, DinorayError
from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.checkpoint_files import (
    FILES,
    DamagedCheckpointError,
    has_checksums,
    read_meta,
    wrong_files,
)
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.lease_keeper import look
from dinoray.pipeline.storage.run_dir import checkpoint_names, read_committed, step_of
from dinoray.pipeline.study.trials import STUDY, TRIALS
from dinoray.pipeline.tracking.records import read_records


def check_files(address: str) -> Iterator[Finding]:
    """Check the files of the run, or of all trials of the study, at `address`, local or S3."""
    here = Directory(address)
    yield from _check_lease(here)
    if here.exists(STUDY):
        trials = here.child(TRIALS)
        for name in trials.list():
            yield from _check_run(trials.child(name), f"{TRIALS}/{name}: ")
    elif here.exists(run_dir.CONFIG) or run_dir.CHECKPOINTS in here.list():
        yield from _check_run(here, "")
    else:
        text = f"{here.uri} has no {run_dir.CONFIG}: pass a run directory or a study"
        yield Finding("FAIL", "run", text, ConfigError.exit_code)


def _check_lease(here: Directory) -> Iterator[Finding]:
    """Report who holds the lease of a run or study; nothing if nobody does."""
    found = look(here)
    if found is None:
        return
    holder, lives = found
    text = f"held by {holder} since {holder.taken}"
    if lives:
        yield Finding("ok", "lease", f"{text}, which is at work: what it is writing may look damaged")
    else:
        yield Finding(
            "warn", "lease", f"{text}, which does not renew it: the next driver takes it over within a minute"
        )


def _check_run(run: Directory, where: str) -> Iterator[Finding]:
    """Check one run; `where` comes first in each line."""
    try:
        yield _check_metrics(run, where)
        listed = read_committed(run)
        yield _check_list(listed.wrong, len(listed.names), where)
        wrong = {}
        for name in checkpoint_names(run):
            if name in listed.names:
                finding, wrong[name] = _check_checkpoint(
                    run.child(run_dir.CHECKPOINTS).child(name), where + name
                )
                yield finding
            else:
                text = f"{where}{name}: not in Ray's list, incomplete or refused; a resume does not use it"
                yield Finding("warn", "checkpoint", text)
        yield _check_resume(run, wrong, where)
    except DinorayError as error:
        yield failed("run", type(error)(f"{where}{error}"))


def _check_metrics(run: Directory, where: str) -> Finding:
    records = read_records(run)
    if records.num_damaged:
        text = f"{where}{run_dir.METRICS}: {records.num_damaged} lines are damaged; reports leave them out"
        return Finding("FAIL", "metrics", text, DataError.exit_code)
    text = f"{where}{run_dir.METRICS}: {len(records.lines)} lines"
    return Finding(
        "ok", "metrics", text if records.last_step is None else f"{text}, to step {records.last_step}"
    )


def _check_list(wrong: list[str], num_committed: int, where: str) -> Finding:
    if wrong:
        text = f"{where}Ray's list of checkpoints {', '.join(wrong)}; a resume writes it again"
        return Finding("warn", "list", text)
    return Finding("ok", "list", f"{where}{num_committed} checkpoints are committed")


def _check_checkpoint(checkpoint: Directory, where: str) -> tuple[Finding, str | None]:
    """Return the finding, and why a resume would refuse the checkpoint, if it would."""
    meta: dict[str, Any] = {}
    try:
        meta = read_meta(checkpoint)
        wrong = ", ".join(wrong_files(checkpoint, meta))
    except DamagedCheckpointError as error:
        wrong = error.what
    if not wrong and not meta.get("finite", True):
        wrong = "it has NaN or infinite values"
    if wrong:
        return Finding("FAIL", "checkpoint", f"{where}: {wrong}", DataError.exit_code), wrong
    size = sum(checkpoint.size(file) for file in FILES) / 1e6
    checked = "all checksums agree" if has_checksums(meta) else "of an earlier version, without checksums"
    return Finding("ok", "checkpoint", f"{where}: {len(FILES)} files, {size:,.1f} MB, {checked}"), None


def _check_resume(run: Directory, wrong: dict[str, str | None], where: str) -> Finding:
    """`wrong`: name -> why it is refused or None, of the committed checkpoints, oldest first."""
    if not wrong:
        return Finding("ok", "resume", f"{where}no checkpoint: the run starts at step 0")
    whole = [name for name, why in wrong.items() if why is None]
    if not whole:
        text = (
            f"{where}none of {len(wrong)} checkpoints can be resumed from; restore one from a copy, or move "
        )
        text += f"{run.join(run_dir.CHECKPOINTS)} away to start the run anew"
        return Finding("FAIL", "resume", text, DataError.exit_code)
    repeated = step_of(list(wrong)[-1]) - step_of(whole[-1])
    return Finding(
        "ok", "resume", f"{where}from {whole[-1]}" + (f", {repeated} steps again" if repeated else "")
    )
