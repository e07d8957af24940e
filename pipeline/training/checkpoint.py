"""Save, find and load checkpoints, whose files pipeline/storage/run_dir.py names.

Only committed checkpoints count as progress: any other checkpoint folder may be incomplete. No Ray here, and
no pickled objects.
"""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow.fs
import torch
from safetensors.torch import load_file, save_file

from dinoray.models.backbone import build_backbone
from dinoray.models.errors import ConfigError, DataError, one_line
from dinoray.models.optim import restore_optimizer
from dinoray.models.settings import flatten
from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.files import Directory, MissingObject
from dinoray.pipeline.storage.run_dir import checkpoint_name, committed_checkpoints
from dinoray.pipeline.training.bad_images import Quarantine
from dinoray.pipeline.training.config import DINOConfig
from dinoray.pipeline.training.step import TrainState

FORMAT = 2
_ANOTHER = (
    "take another checkpoint: of its run by --step, for training by init.path=CHECKPOINT init.load=run under another "
    "name=..."
)
FILES = (run_dir.STUDENT, run_dir.TEACHER, run_dir.TRAIN_STATE, run_dir.META)


def save_checkpoint(state: TrainState, folder: Path, *, num_images: int, quarantine: Quarantine) -> None:
    """Write the checkpoint files into `folder`. Call on one rank; all ranks hold the same values."""
    save_file(_contiguous(state.dino.student), folder / run_dir.STUDENT)
    save_file(_contiguous(state.dino.teacher), folder / run_dir.TEACHER)
    torch.save(
        {
            "optimizer": state.optimizer.state_dict(),
            "center": state.dino.center.cpu(),
            "health": state.health.state_dict(),
        },
        folder / run_dir.TRAIN_STATE,
    )
    meta = {
        "format": FORMAT,
        "step": state.step,
        "skipped": state.skipped,
        "skipped_in_a_row": state.skipped_in_a_row,
        "positions": state.step * state.config.train.global_batch_size,
        "total_steps": state.schedule.total_steps,
        "num_images": num_images,
        **quarantine.meta(),
        "file_bytes": {file: (folder / file).stat().st_size for file in FILES[:-1]},
        "torch": torch.__version__,
        "config": state.config.model_dump(mode="json"),
    }
    (folder / run_dir.META).write_text(json.dumps(meta, indent=1))


def temporary_checkpoint(state: TrainState, *, num_images: int, quarantine: Quarantine) -> Path:
    """Run `save_checkpoint` into a new local folder and return it; the uploader must remove it."""
    folder = Path(tempfile.mkdtemp(prefix="dinoray-checkpoint-"))
    try:
        save_checkpoint(state, folder, num_images=num_images, quarantine=quarantine)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


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


def load_checkpoint(state: TrainState, folder: Path) -> dict[str, Any]:
    """Restore `state` strictly from `folder` and return the meta data.

    Raises DataError if a part is missing.
    """
    meta = read_meta(folder)
    then, now = meta["config"]["optim"]["name"], state.config.optim.name
    if then != now:
        raise ConfigError(f"optim.name={now} cannot continue a run of {then}; set optim.name={then}")
    try:
        state.dino.student.load_state_dict(load_file(folder / run_dir.STUDENT))
        state.dino.teacher.load_state_dict(load_file(folder / run_dir.TEACHER))
        train_state = torch.load(folder / run_dir.TRAIN_STATE, weights_only=True, map_location=state.device)
        restore_optimizer(state.optimizer, train_state["optimizer"])
        state.dino.center.copy_(train_state["center"])
        state.health.load_state_dict(train_state["health"], device=state.device)
    except Exception as error:  # a damaged file may raise anything
        changed = _changed(meta["config"], state.config)
        remedy = f"set {' '.join(changed)}" if changed else _ANOTHER
        raise DataError(
            f"checkpoint {folder} cannot be loaded: {one_line(error, limit=300)}; {remedy}"
        ) from error
    state.step, state.skipped = meta["step"], meta["skipped"]
    state.skipped_in_a_row = meta["skipped_in_a_row"]
    return meta


def _changed(then: Mapping[str, Any], now: DINOConfig) -> list[str]:
    """Return settings of the checkpoint that decide which tensors it holds, where they are others now."""
    shapes = ("backbone.", "head.", "optim.layer_decay")
    old, new = dict(flatten(then)), dict(flatten(now.model_dump(mode="json")))
    changed = {k: v for k, v in old.items() if k.startswith(shapes) and new.get(k) != v}
    return [f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in changed.items()]


Which = Literal["teacher", "student"]
"""The network to read; the teacher is better during the whole run."""


class FrozenBackbone(NamedTuple):
    """A checkpoint's backbone in picklable form, with all that is needed to rebuild it."""

    config: DINOConfig
    weights: dict[str, torch.Tensor]

    def backbone(self, device: torch.device | str = "cpu") -> torch.nn.Module:
        """Return the backbone in eval mode: float [n, 3, H, W] -> [n, D]."""
        crops = self.config.crops
        backbone = build_backbone(
            self.config.backbone,
            crop_sizes=crops.crop_sizes,
            drop_path_rate=0.0,
        )
        backbone.load_state_dict(self.weights)
        return backbone.to(device).eval()


def read_frozen(folder: Path, which: Which = "teacher") -> FrozenBackbone:
    """Read the backbone of the checkpoint in the local `folder`."""
    prefix = "backbone."
    try:
        weights = load_file(folder / f"{which}.safetensors")
    except Exception as error:  # a damaged file may raise anything
        raise DataError(
            f"checkpoint {folder} cannot be loaded: {one_line(error, limit=300)}; {_ANOTHER}"
        ) from error
    return FrozenBackbone(
        DINOConfig.model_validate(read_meta(folder)["config"]),
        {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)},
    )


def read_meta(folder: Path) -> dict[str, Any]:
    """Read the checkpoint's meta.json and check its format."""
    try:
        meta = json.loads((folder / run_dir.META).read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} is not a checkpoint: meta.json: {error}; {_ANOTHER}") from error
    if meta.get("format") != FORMAT:
        raise DataError(
            f"checkpoint {folder} has format {meta.get('format')}, this version reads {FORMAT}; read it with the "
            "version of dinoray that wrote it"
        )
    return meta


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
            raise DataError(f"checkpoint {folder.uri} lacks {file}; {_ANOTHER}") from error
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


def _contiguous(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
