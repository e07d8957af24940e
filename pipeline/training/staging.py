"""Bring batches to the device while the step before them is computed. No Ray here.

    stream -> thread: copy into pinned memory -> side stream of the GPU: copy to the device -> training thread

Batches of the stream are views of blocks in an object store. Once a batch is copied nothing here refers to it, so the
store can release its block although the step has not begun. Order and values are those of the stream, and what is
staged is no part of a run's state: a run that resumes reads it again.
"""

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

DEVICE_COLUMNS = ("global_crops", "local_crops", "global_photometric", "local_photometric")
"""What a step reads of a batch on the device; the last two with crops.photometric=device."""
STAGED_BYTES = "staged_bytes"
"""Key of a staged batch: bytes of the crops that lay on the device ready for the next steps as it was taken."""

DEPTH = 2
"""Batches that are staged at most, beside the one that the step has: one is copied while the other waits."""
_JOIN_SECONDS = 10.0
"""Longest wait for the thread at the end: the stream may have nothing for it."""

Batch = Mapping[str, Any]


def staged(batches: Iterable[Batch], device: torch.device) -> Iterable[Batch]:
    """Return `batches` for steps on `device`: staged for a GPU, as they are for a CPU, where nothing needs to travel.

    On a CPU the step reads the store's memory itself; a thread that copies would take time from it. The thread of a
    GPU starts with the first batch that is asked for, and ends with the iterator.
    """
    return batches if device.type == "cpu" else _staged(batches, device)


def _staged(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    with contextlib.closing(Staging(batches, device)) as staging:
        yield from staging


class Staging:
    """Iterates over `batches`: their crops uint8 tensors on the device, their other columns copied numpy arrays.

    The next `DEPTH` batches are pulled and copied on a thread, and no more: at most so many batches lie in pinned
    memory, and on the device beside the batch in use. An error of the stream is raised unchanged, after the batches
    that came before it. `close` must be called at the end.
    """

    def __init__(self, batches: Iterable[Batch], device: torch.device) -> None:
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())  # this thread's, not the other one's
        self._device = device
        self._free: SimpleQueue[_Slot | None] = SimpleQueue()
        self._ready: SimpleQueue[_Staged | BaseException | None] = SimpleQueue()
        for _ in range(DEPTH):
            self._free.put(_Slot(device))
        self._is_closed = False
        self._thread = threading.Thread(
            target=self._pull, args=(iter(batches),), name="dinoray-staging", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> "Staging":
        return self

    def __next__(self) -> dict[str, Any]:
        if self._is_closed:
            raise StopIteration
        found = self._ready.get()
        if not isinstance(found, _Staged):
            self.close()
            raise StopIteration if found is None else found
        self._free.put(found.slot)
        if found.copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(found.copied)
            for crops in found.crops.values():
                crops.record_stream(stream)  # their memory belongs to the side stream
        waiting = self._ready.qsize() * sum(crops.nbytes for crops in found.crops.values())
        return {**found.others, **found.crops, STAGED_BYTES: waiting}

    def close(self) -> None:
        """End the thread; batches that are staged are dropped."""
        self._is_closed = True
        self._free.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join(_JOIN_SECONDS)

    def _pull(self, batches: Iterator[Batch]) -> None:
        """Stage batches until the last one, an error, or the end of this object. Runs on the thread."""
        try:
            stream = None
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
                stream = torch.cuda.Stream(self._device)
            while (slot := self._free.get()) is not None and not self._is_closed:
                batch = next(batches, None)
                if batch is None:
                    break
                staged_batch = slot.stage(batch, stream)
                del batch  # before the next one is awaited
                self._ready.put(staged_batch)
                del staged_batch
            self._ready.put(None)
        except BaseException as error:
            self._ready.put(error)
        finally:
            # A generator is closed by the thread that runs it.
            if (close := getattr(batches, "close", None)) is not None:
                with contextlib.suppress(Exception):
                    close()


class _Staged(NamedTuple):
    """A batch on the device. `copied`: after this event its crops are there; None: they are."""

    crops: dict[str, Tensor]
    others: dict[str, Any]
    copied: torch.cuda.Event | None
    slot: "_Slot"


class _Slot:
    """Host memory for the crops of one batch, pinned if there is a GPU to copy them to."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: dict[str, Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    def stage(self, batch: Batch, stream: torch.cuda.Stream | None) -> _Staged:
        """Copy a batch into this memory, and have it copied to the device on `stream`, without waiting for that."""
        if self._copied is not None:
            self._copied.synchronize()  # the batch before it has left this memory
        for name in batch.keys() & set(DEVICE_COLUMNS):
            shape, dtype = batch[name].shape, getattr(torch, str(batch[name].dtype))
            if name not in self._memory or self._memory[name].shape != shape:
                self._memory[name] = torch.empty(shape, dtype=dtype, pin_memory=stream is not None)
            np.copyto(self._memory[name].numpy(), batch[name])
        others = {name: np.array(column) for name, column in batch.items() if name not in DEVICE_COLUMNS}
        with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
            crops = {
                name: memory.to(self._device, non_blocking=True, copy=True)
                for name, memory in self._memory.items()
            }
            if stream is not None:
                self._copied = torch.cuda.Event(blocking=True)
                self._copied.record(stream)
        return _Staged(crops, others, self._copied, self)
