"""The files of a run directory, and which of its checkpoints are committed.

A run directory (local or S3):

    config.yaml                 the resolved config
    environment.json            versions, hardware, git commit
    manifest.parquet            the images, listed once
    pixels.json                 which samples become black and white, measured once
    choices.json                what the recipe auto saw, and its choices with their reasons; resumed runs take them
    listing-0123456789ab/       what has been listed on S3, until the manifest is written
    metrics.jsonl               one line per logged step and per evaluation
    quarantine.jsonl            one line per image that could not be used
    capture/                    step_00000012.json: what `dinoray replay` needs of a step that went wrong;
                                counts.json: how many more there were
    tensorboard/NAME/           the same metrics as event files; crops, attention, features for the projector
    crops.png                   contact sheet of the crops
    attention/                  step_00001000.png: the class token's attention at each evaluation
    report.html                 all of this on one page
    tracking.json               the run's id in MLflow and W&B, if they are enabled
    result.json                 written last: the run is finished
    lease.json                  the driver that trains, or was last to (storage/lease.py); locally lease-00000001.json
    evaluation_step_00001000.json    what the command evaluate found
    neighbours.html             pictures and their nearest neighbours before and after, if evaluate was asked for it
    checkpoints/
      checkpoint_manager_snapshot.json    the committed checkpoints (Ray Train's file)
      step_00001000/
        student.safetensors     backbone.* and head.*; without the frozen part (backbone.train)
        teacher.safetensors     the same, with the frozen part, which both networks share
        train_state.pt          step, optimizer, center, health: tensors and numbers, loads with weights_only=True
        meta.json               written last: step, config and all else that is needed to rebuild the model; checksums

No Ray here.
"""

import contextlib
import json
import re
from collections.abc import Collection
from typing import NamedTuple

from dinoray.models.errors import DataError
from dinoray.pipeline.ray_private.train import (
    SNAPSHOT,
    BadSnapshotError,
    dropped,
    is_complete,
    listed,
    snapshot_of,
)
from dinoray.pipeline.storage.files import Directory, MissingObject

CONFIG, ENVIRONMENT, RESULT = "config.yaml", "environment.json", "result.json"
MANIFEST, METRICS, QUARANTINE = "manifest.parquet", "metrics.jsonl", "quarantine.jsonl"
PIXELS, CHOICES = "pixels.json", "choices.json"
CROPS, ATTENTION, TENSORBOARD = "crops.png", "attention", "tensorboard"
REPORT, TRACKING, LEASE = "report.html", "tracking.json", "lease.json"
NEIGHBOURS = "neighbours.html"
LEASE_FILE = re.compile(r"lease(?:-(\d{8,}))?\.json")
"""Names of the lease: as an object, and as the files of a folder, which have numbers."""
CAPTURE, CAPTURE_COUNTS = "capture", "counts.json"
CHECKPOINTS = "checkpoints"
STUDENT, TEACHER = "student.safetensors", "teacher.safetensors"
TRAIN_STATE, META = "train_state.pt", "meta.json"
_CHECKPOINT, _EVALUATION = "step_", "evaluation_"
_LIST = f"{CHECKPOINTS}/{SNAPSHOT}"
_NAME = re.compile(rf"{_CHECKPOINT}\d{{8,}}")
_CAPTURE = re.compile(rf"{_CHECKPOINT}(\d{{8,}})(?:_rank_\d+)?\.json")


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint that is taken before `step` runs."""
    return f"{_CHECKPOINT}{step:08d}"


def evaluation_name(checkpoint: str, which: str) -> str:
    """Return the name of the file with what the command evaluate found for the student or teacher of a checkpoint."""
    suffix = "" if which == "teacher" else f"_{which}"
    return f"{_EVALUATION}{checkpoint}{suffix}.json"


def evaluation_names(run: Directory) -> list[str]:
    """Return the names of all such files of a run."""
    return [name for name in run.list() if name.startswith(_EVALUATION) and name.endswith(".json")]


def capture_name(step: int, rank: int = 0) -> str:
    """Return the name, in the folder of captures, of what a rank captured of `step`, counted from 1 as in the log."""
    return f"{checkpoint_name(step)}{f'_rank_{rank}' if rank else ''}.json"


def capture_names(run: Directory) -> dict[str, int]:
    """Return the captures of a run, by step: name -> step."""
    matches = [match for name in run.child(CAPTURE).list() if (match := _CAPTURE.fullmatch(name))]
    return {match[0]: int(match[1]) for match in matches}


class Committed(NamedTuple):
    """The committed checkpoints of a run, oldest first, and what is `wrong` with Ray Train's list of them."""

    names: list[str]
    wrong: list[str]


def committed_checkpoints(run: Directory) -> list[str]:
    """Return the names of the run's committed checkpoints, oldest first. DataError as in `read_committed`."""
    return read_committed(run).names


def committed_steps(run: Directory) -> list[int]:
    """Return the steps of the run's committed checkpoints, ascending."""
    return sorted(step_of(name) for name in committed_checkpoints(run))


def step_of(name: str) -> int:
    """Return the step of the checkpoint `name`."""
    return int(name.removeprefix(_CHECKPOINT))


def checkpoint_names(run: Directory) -> list[str]:
    """Return the names of all folders of checkpoints, committed or not, oldest first."""
    return [name for name in run.child(CHECKPOINTS).list() if _NAME.fullmatch(name)]


def read_committed(run: Directory) -> Committed:
    """Return the checkpoints in Ray Train's list whose folders exist; without a usable list, all whole checkpoints.

    Raises DataError where there are checkpoints but none that can be used: the run would start anew without a word.
    """
    try:
        snapshot = run.read(_LIST)
    except MissingObject:
        there = checkpoint_names(run)
        # Without meta.json, which comes last, a first checkpoint was, or is, being written.
        marked = [name for name in there if run.exists(f"{CHECKPOINTS}/{name}/{META}")]
        return Committed(_whole(run, marked, "is missing"), ["is missing"]) if marked else Committed([], [])
    there = checkpoint_names(run)
    try:
        names = listed(snapshot)
    except BadSnapshotError as error:
        return Committed(_whole(run, there, f"is {error}"), [f"is {error}"])
    strange = [name for name in names if not _NAME.fullmatch(name)]
    gone = [name for name in names if name not in strange and name not in there]
    wrong = [f"names {name!r}, which is not a checkpoint of this run" for name in strange]
    wrong += [f"names {name}, whose folder does not exist" for name in gone]
    kept = sorted(set(names) & set(there))
    if names and not kept:
        if not there:
            raise DataError(
                f"{run.join(_LIST)} {', '.join(wrong)}, and there is no other: restore {run.join(CHECKPOINTS)} from a "
                f"copy, or delete {SNAPSHOT} to start the run anew"
            )
        kept = _whole(run, there, ", ".join(wrong))
    if not wrong and not is_complete(snapshot):
        wrong = ["is not one that Ray Train can load"]
    return Committed(kept, wrong)


def mend_snapshot(run: Directory) -> str | None:
    """Write Ray Train's list of checkpoints again if anything is wrong with it; return a line on that, or None.

    Only for a run that nobody trains: while Ray writes the list, it looks torn too.
    """
    names, wrong = read_committed(run)
    if not wrong:
        return None
    if names:
        run.write(_LIST, snapshot_of(names))
    else:
        run.delete(_LIST)  # torn at the first checkpoint ever
    text = f"Ray's list of checkpoints {', '.join(wrong)}"
    return f"{text}; it is written again; whole checkpoints: {', '.join(names) or 'none'}"


def leave_out(run: Directory, refused: Collection[str]) -> None:
    """Take checkpoints out of Ray Train's list, some but not all. Only for a run that nobody trains."""
    run.write(_LIST, snapshot_of([name for name in committed_checkpoints(run) if name not in refused]))


def remove_leftovers(run: Directory) -> None:
    """Remove what a kill has left of checkpoints that were being deleted or written. Only for a run that nobody trains.

    They are not in Ray Train's list, which must be right: the newest report in it names those that were to be deleted,
    and the others lack meta.json. Those behind the newest in the list stay until the run is past them: workers of a
    driver whose lease was taken over may write for some seconds yet, and would commit what is left of their files.
    """
    try:
        to_delete = dropped(run.read(_LIST))
    except MissingObject:
        to_delete = []
    committed = committed_checkpoints(run)
    newest = max(map(step_of, committed), default=-1)
    for name in checkpoint_names(run):
        folder = run.child(CHECKPOINTS).child(name)
        is_torn = step_of(name) < newest and not folder.exists(META)
        if name not in committed and (name in to_delete or is_torn):
            with contextlib.suppress(DataError):  # it costs space, and nothing else
                folder.remove()


def _whole(run: Directory, names: Collection[str], why: str) -> list[str]:
    """Return those of `names` that are whole. DataError if there are some and none is: why the list is not used."""
    wrong = {name: _lack(run.child(CHECKPOINTS).child(name)) for name in names}
    whole = [name for name in names if not wrong[name]]
    if names and not whole:
        raise DataError(
            f"{run.join(_LIST)} {why}, and none of {len(wrong)} checkpoints beside it can be shown to be whole "
            f"({', '.join(f'{name} {what}' for name, what in wrong.items())}): restore one from a copy, or move "
            f"{run.join(CHECKPOINTS)} away to start the run anew"
        )
    return whole


def _lack(checkpoint: Directory) -> str:
    """Return what a checkpoint lacks, by the sizes in meta.json; empty if it is whole. Its bytes are not read."""
    try:
        # Early versions wrote no sizes.
        sizes = json.loads(checkpoint.read(META)).get("file_bytes") or {}
        for file in (STUDENT, TEACHER, TRAIN_STATE):
            if not checkpoint.exists(file):
                return f"lacks {file}"
            if file in sizes and sizes[file] != checkpoint.size(file):
                return f"has another size of {file}"
    except MissingObject:
        return f"lacks {META}"
    except (ValueError, TypeError, AttributeError):
        return f"has no whole {META}"
    return ""
