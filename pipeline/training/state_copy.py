"""A copy of a run's state in host memory, from which a checkpoint is written while training continues.

Taken between two steps, on the training thread; checksums, files and uploads follow on another thread. No Ray here.

    training thread: queue the copies on a GPU's own stream, mark their end -> queue the next steps
    writing thread:  wait for the mark -> files

The host waits for none of the copies. The next steps change what is copied, so the GPU makes them after the copies: a
stream beside it would save nothing.
"""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import torch
from safetensors.torch import save

from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.checkpoint_files import FILES, WrittenFile, meta_json
from dinoray.pipeline.storage.files import Directory, is_s3
from dinoray.pipeline.training.bad_images import Quarantine
from dinoray.pipeline.training.state import TrainState

FROZEN_PART = "frozen_part"
"""Key, in the header of a student's file that lacks its frozen part, of the file that has it."""


class StateCopy:
    """The copy, whose memory the next copy takes again: some 0.7 GB for a ViT-S. Not for two threads at once."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}
        self._contents: dict[str, Any] = {}
        self._meta: dict[str, Any] = {}
        self._is_shared = False
        """Whether the student lacks a part that is in the teacher."""
        self._end: torch.cuda.Event | None = None
        """After this event the copy is complete; None: it is, as its state is on a CPU."""
        self.num_bytes = 0

    @property
    def step(self) -> int:
        """The step of the state."""
        return int(self._meta["step"])

    def take(self, state: TrainState, *, num_images: int, quarantine: Quarantine) -> None:
        """Copy all that a checkpoint holds; `write` waits until that is done. Not before an earlier `write` has ended.

        Call on one rank; all ranks hold the same values.
        """
        used = self._buffers
        self._buffers = {}
        self._is_shared = bool(state.dino.shared)
        contents: dict[str, Any] = {
            run_dir.STUDENT: state.dino.student_state(),
            run_dir.TEACHER: state.dino.teacher.state_dict(),
            run_dir.TRAIN_STATE: {
                "step": state.step,
                "optimizer": state.optimizer.state_dict(),
                "center": state.dino.center,
                "health": state.health.state_dict(),
                **({"stage": state.stage.state_dict()} if state.stage.is_configured else {}),
            },
        }
        self._contents = {name: self._copied(part, name, used) for name, part in contents.items()}
        self._end = mark(state.device)
        self.num_bytes = sum(buffer.nbytes for buffer in self._buffers.values())
        self._meta = {
            "step": state.step,
            **state.skips.state_dict(),
            "positions": state.step * state.config.train.global_batch_size,
            "total_steps": state.schedule.total_steps,
            "num_images": num_images,
            **_plain(quarantine.meta()),
            "torch": torch.__version__,
            "config": state.config.model_dump(mode="json"),
        }

    def write(self, to: Directory, *, check: Callable[[], None] = lambda: None) -> None:
        """Write the checkpoint files into `to`, meta.json last; that of an earlier attempt is removed first.

        `check` is called before each attempt to change a file, as in Directory.guarded; what it raises ends the save.
        Raises DataError.
        """
        if self._end is not None:
            self._end.synchronize()
        to = to.guarded(check)
        to.delete(run_dir.META)
        names = [name for name in FILES if name != run_dir.META]
        # Files on S3 at once, because each request waits for the store; a disk takes one after the other.
        with ThreadPoolExecutor(len(names) if is_s3(to.uri) else 1) as pool:
            written = list(pool.map(lambda name: self._write_file(to, name), names))
        meta = {**self._meta, "finite": self._is_finite()}
        to.write(run_dir.META, meta_json(meta, dict(zip(names, written, strict=True))))

    def _write_file(self, to: Directory, name: str) -> WrittenFile:
        part = self._contents[name]
        num_bytes = sum(buffer.nbytes for key, buffer in self._buffers.items() if key.startswith(name))

        def produce(sink: BinaryIO) -> WrittenFile:
            file = WrittenFile(sink)
            if name == run_dir.TRAIN_STATE:
                torch.save(part, file)  # type: ignore[arg-type]
            else:
                lacks = name == run_dir.STUDENT and self._is_shared
                file.write(save(part, {FROZEN_PART: run_dir.TEACHER} if lacks else None))
            return file

        return to.write_pieces(name, produce, num_bytes=num_bytes)

    def _is_finite(self) -> bool:
        center = self._contents[run_dir.TRAIN_STATE]["center"]
        student, teacher = (self._contents[name].values() for name in (run_dir.STUDENT, run_dir.TEACHER))
        return is_finite([center, *student, *teacher])

    def _copied(self, value: Any, place: str, used: dict[str, torch.Tensor]) -> Any:
        """Return a copy of nested tensors and plain values; `place` names the buffer of a tensor."""
        if isinstance(value, torch.Tensor):
            value = value.detach()
            # Weights as safetensors takes them; the rest with the strides that it has.
            is_weight = not place.startswith(run_dir.TRAIN_STATE)
            value = value.contiguous() if is_weight else value
            buffer = used.get(place)
            if buffer is None or (buffer.shape, buffer.dtype, buffer.stride()) != (
                *(value.shape, value.dtype, value.stride()),
            ):
                buffer = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            self._buffers[place] = buffer.copy_(value, non_blocking=True)
            return buffer
        if isinstance(value, Mapping):
            return {key: self._copied(one, f"{place}/{key}", used) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._copied(one, f"{place}/{i}", used) for i, one in enumerate(value))
        return value


def mark(device: torch.device) -> torch.cuda.Event | None:
    """Return an event that marks the end of what is queued on a GPU; None for a CPU, where nothing is."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(blocking=True)
    event.record(torch.cuda.current_stream(device))
    return event


def is_finite(values: Iterable[Any]) -> bool:
    """Return True if no tensor in `values`, of any dtype, has NaN or infinity. The host waits for one answer.

    Tensors on other devices than the first one's are allowed; each costs another wait.
    """
    tensors = [v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()]
    if not tensors:
        return True
    # A sum reads each value once. It is finite only if all values are; large values may exceed it.
    sums = torch.stack([torch.isfinite(v.sum()).to(tensors[0].device) for v in tensors])
    return bool(sums.all()) or all(bool(torch.isfinite(v).all()) for v in tensors)


def _plain(value: Any) -> Any:
    """Return a copy of nested plain values, which the next steps may change."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value
