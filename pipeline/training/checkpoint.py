"""Save, find and load checkpoints, whose files pipeline/storage/run_dir.py names.

Only committed checkpoints count as progress: any other checkpoint folder may be incomplete. No Ray here, and
no pickled objects.
"""

import contextlib
import json
import pickle
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow.fs
import torch
from safetensors.torch import load_file

from dinoray.models.backbone import build_backbone
from dinoray.models.errors import ConfigError, DataError, one_line
from dinoray.models.lora import merged
from dinoray.models.optim import restore_optimizer
from dinoray.models.settings import flatten
from dinoray.pipeline.storage import checkpoint_files, run_dir
from dinoray.pipeline.storage.checkpoint_files import FILES, DamagedCheckpointError, verify
from dinoray.pipeline.storage.files import Directory, MissingObject
from dinoray.pipeline.storage.run_dir import checkpoint_name, committed_checkpoints
from dinoray.pipeline.training.bad_images import Quarantine
from dinoray.pipeline.training.config import DINOConfig
from dinoray.pipeline.training.skips import Skips
from dinoray.pipeline.training.state import TrainState
from dinoray.pipeline.training.state_copy import StateCopy, is_finite

_ANOTHER = (
    "take another checkpoint: of its run by --step, for training by init.from=CHECKPOINT init.load=run under another "
    "name=..."
)
_GLOBAL = re.compile(r"GLOBAL\s+`?([\w.]+)")


def save_checkpoint(state: TrainState, folder: Path, *, num_images: int, quarantine: Quarantine) -> None:
    """Write the checkpoint files into `folder`, meta.json last. Call on one rank; all ranks hold the same values."""
    copy = StateCopy()
    copy.take(state, num_images=num_images, quarantine=quarantine)
    copy.write(Directory(str(folder)))


@contextlib.contextmanager
def own_copy(checkpoint: Any) -> Iterator[Path]:
    """Yield a folder with the files of a Ray checkpoint: its own if local, else a copy for this process.

    All processes of a node share Ray's own temporary folder. A late process downloads the files again while
    others read them, and the others then read truncated files.
    """
    if isinstance(checkpoint.filesystem, pyarrow.fs.LocalFileSystem):
        yield Path(checkpoint.path)
    else:
        with tempfile.TemporaryDirectory(prefix="dinoray-checkpoint-") as folder:
            yield Path(checkpoint.to_directory(folder))


class CheckpointParts(NamedTuple):
    """The contents of a checkpoint, each as it was written: meta data, weights by name, and train_state.pt."""

    meta: dict[str, Any]
    student: dict[str, torch.Tensor]
    teacher: dict[str, torch.Tensor]
    train_state: dict[str, Any]

    @property
    def whole_student(self) -> dict[str, torch.Tensor]:
        """The student with the frozen part, which only the teacher's file has (`backbone.train`)."""
        return {**self.teacher, **self.student}

    def non_finite(self) -> str | None:
        """Return which part has NaN or infinite values, for a sentence; None if all are finite."""
        moments = self.train_state["optimizer"]["state"]
        parts = {
            "the student": self.student.values(),
            "the teacher": self.teacher.values(),
            "the centre": [self.train_state["center"]],
            "the optimizer's state": [value for saved in moments.values() for value in saved.values()],
        }
        return next(
            (f"{part} has NaN or infinite values" for part, x in parts.items() if not is_finite(x)),
            None,
        )


def read_parts(
    folder: Path, *, device: torch.device | str = "cpu", address: str | None = None
) -> CheckpointParts:
    """Read all files of the checkpoint in the local `folder`, a copy of that at `address`. Nothing in them is run.

    `device`: where the train state goes. Raises DamagedCheckpointError unless all files are as they were written and
    of the same step.
    """
    address = address or str(folder)
    meta = verify(Directory(str(folder)), address=address)
    train_state = _read_train_state(folder, device, address)
    then = train_state.get("step", meta["step"])  # earlier versions wrote none
    if then != meta["step"]:
        what = f"{run_dir.TRAIN_STATE} is of step {then}, {run_dir.META} of step {meta['step']}"
        raise DamagedCheckpointError(address, what)
    student, teacher = (_read_weights(folder, name, address) for name in (run_dir.STUDENT, run_dir.TEACHER))
    return CheckpointParts(meta, student, teacher, train_state)


def _read_weights(folder: Path, file: str, address: str) -> dict[str, torch.Tensor]:
    try:
        return load_file(folder / file)
    except Exception as error:  # a damaged file may raise anything
        what = f"{file} cannot be read ({one_line(error)})"
        raise DamagedCheckpointError(address, what) from error


def _read_train_state(folder: Path, device: torch.device | str, address: str) -> dict[str, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # problems of a file are reported below
            train_state = torch.load(folder / run_dir.TRAIN_STATE, weights_only=True, map_location=device)
        if not {"center", "health"} <= train_state.keys() or not isinstance(
            train_state["optimizer"]["state"], dict
        ):
            raise ValueError("it lacks a part")
        return dict(train_state)
    except pickle.UnpicklingError as error:  # its own text advises to run what is in the file
        wanted = _GLOBAL.search(str(error))
        what = (
            f"wants {wanted[1].rstrip('.')} to be called" if wanted else "has more than tensors and numbers"
        )
        what = f"{run_dir.TRAIN_STATE} {what}, which no checkpoint needs; nothing in it was run"
        raise DamagedCheckpointError(address, what) from error
    except Exception as error:  # a damaged file may raise anything
        what = f"{run_dir.TRAIN_STATE} cannot be read ({one_line(error)})"
        raise DamagedCheckpointError(address, what) from error


def load_checkpoint(state: TrainState, folder: Path, *, address: str | None = None) -> dict[str, Any]:
    """Restore `state` strictly from the checkpoint in the local `folder` and return the meta data.

    Raises as `read_parts` and `load_parts`.
    """
    return load_parts(state, read_parts(folder, device=state.device, address=address), address or str(folder))


def load_parts(state: TrainState, parts: CheckpointParts, address: str) -> dict[str, Any]:
    """Restore `state` strictly from `parts`, of the checkpoint at `address`, and return the meta data.

    Raises ConfigError for another optimizer, and DataError for another network.
    """
    meta, train_state = parts.meta, parts.train_state
    try:
        then, now = meta["config"]["optim"]["name"], state.config.optim.name
        if then != now:
            raise ConfigError(f"optim.name={now} cannot continue a run of {then}; set optim.name={then}")
        state.dino.load_states(parts.student, parts.teacher)
        restore_optimizer(state.optimizer, train_state["optimizer"])
        state.dino.center.copy_(train_state["center"])
        state.health.load_state_dict(train_state["health"], device=state.device)
        state.step, state.skips = meta["step"], Skips.restored(meta, state.device)
        _restore_stage(state, train_state.get("stage"))
    except ConfigError:
        raise
    except Exception as error:  # contents of another network may raise anything
        changed = _changed(meta["config"], state.config)
        remedy = f"set {' '.join(changed)}" if changed else _ANOTHER
        raise DataError(
            f"checkpoint {address} cannot be loaded: {one_line(error, limit=300)}; {remedy}"
        ) from error
    return meta


def _restore_stage(state: TrainState, saved: Mapping[str, Any] | None) -> None:
    was_on = state.stage.is_on
    if state.stage.is_configured:
        state.stage.load_state_dict(saved)
    if state.stage.is_on and not was_on:
        state.dino.freeze_backbone()
    if was_on and not state.stage.is_on:
        state.thaw()


def _changed(then: Mapping[str, Any], now: DINOConfig) -> list[str]:
    """Return settings of the checkpoint that decide which tensors it holds, where they are others now."""
    shapes = ("backbone.", "head.", "optim.layer_decay", "optim.patch_embed_lr_scale")
    old, new = dict(flatten(then)), dict(flatten(now.model_dump(mode="json")))
    changed = {k: v for k, v in old.items() if k.startswith(shapes) and new.get(k) != v}
    return [f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in changed.items()]


Which = Literal["teacher", "student"]
"""The network to read; the teacher is better during the whole run."""


class FrozenBackbone(NamedTuple):
    """A checkpoint's backbone in picklable form, with all that is needed to rebuild it. Adapters are merged."""

    config: DINOConfig
    weights: dict[str, torch.Tensor]

    def backbone(self, device: torch.device | str = "cpu") -> torch.nn.Module:
        """Return the backbone in eval mode: float [n, C, H, W] -> [n, D]."""
        crops = self.config.crops
        backbone = build_backbone(
            self.config.backbone,
            crop_sizes=crops.crop_sizes,
            drop_path_rate=0.0,
            in_chans=crops.channels,
        )
        backbone.load_state_dict(self.weights)
        return backbone.to(device).eval()


def read_frozen(folder: Path, which: Which = "teacher", *, address: str | None = None) -> FrozenBackbone:
    """Read the backbone of the checkpoint in the local `folder`, a copy of that at `address`.

    Raises DamagedCheckpointError if its weights or meta.json are not as they were written.
    """
    prefix, address = "backbone.", address or str(folder)
    files = network_files(read_meta(folder, address=address), which)
    meta = verify(Directory(str(folder)), files, address=address)
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        weights |= _read_weights(folder, file, address)
    body = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    return FrozenBackbone(DINOConfig.model_validate(meta["config"]), merged(body))


def network_files(meta: Mapping[str, Any], which: Which) -> tuple[str, ...]:
    """Return the files that hold a network of the checkpoint with this `meta`, what replaces others' tensors last.

    The student's file lacks what both networks share (`backbone.train`).
    """
    if which == "student" and meta["config"]["backbone"].get("train", "all") != "all":
        return run_dir.TEACHER, run_dir.STUDENT
    return (f"{which}.safetensors",)


def read_meta(folder: Path, *, address: str | None = None) -> dict[str, Any]:
    """Read meta.json of the checkpoint in the local `folder`, a copy of that at `address`. Raises as `verify`."""
    return checkpoint_files.read_meta(Directory(str(folder)), address=address)


class Found(NamedTuple):
    """Location of a checkpoint: name, folder, and run directory (None for a copy outside a run)."""

    name: str
    folder: Directory
    run: Directory | None


def find_checkpoint(address: str, step: int | None = None) -> Found:
    """Find the checkpoint at `address`, local or S3: a checkpoint's own folder, or a run directory.

    For a run directory, find the committed checkpoint at `step`, or the newest.
    """
    here = Directory(address)
    if here.exists(run_dir.META):
        parent, _, name = here.uri.rpartition("/")
        run, _, between = parent.rpartition("/")
        return Found(name, here, Directory(run) if between == run_dir.CHECKPOINTS else None)
    name = pick_checkpoint(here, step)
    return Found(name, here.child(run_dir.CHECKPOINTS).child(name), here)


def download_checkpoint(folder: Directory, into: Path, files: Sequence[str] = FILES) -> Path:
    """Copy files of the checkpoint in `folder` into the local folder `into`, which is created if needed."""
    into.mkdir(parents=True, exist_ok=True)
    for file in files:
        try:
            (into / file).write_bytes(folder.read(file))
        except MissingObject as error:
            raise DamagedCheckpointError(folder.uri, f"it lacks {file}") from error
    return into


def pick_checkpoint(run: Directory, step: int | None = None) -> str:
    """Return the name of the committed checkpoint at `step`, or the newest. A ConfigError lists all names."""
    names = committed_checkpoints(run)
    if not names:
        raise DataError(
            f"{run.uri} has no committed checkpoint; give the directory of a run that has written one"
        )
    if step is None:
        return names[-1]
    if checkpoint_name(step) not in names:
        raise ConfigError(
            f"checkpoint step={step} is not among {', '.join(names)} of {run.uri}; choose one of these"
        )
    return checkpoint_name(step)
