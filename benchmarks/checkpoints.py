"""How long a save holds up training, how long until it is written, and what checksums add to saving and loading.

    python benchmarks/checkpoints.py [--recipe vit_small_imagenet_vanilla] [--rounds 5] [--folder DIR]

"Before" writes the files on the training thread, from the state itself, as saves did until a copy was taken. Files are
flushed to the disk of --folder now, and were not before. They are read from the page cache.
"""

import argparse
import hashlib
import json
import statistics
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save

from dinoray.jobs.cli.config import load_config
from dinoray.jobs.cli.main import run_main
from dinoray.pipeline.storage import checkpoint_files
from dinoray.pipeline.storage.checkpoint_files import WrittenFile, meta_json
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.run_dir import META, STUDENT, TEACHER, TRAIN_STATE
from dinoray.pipeline.training.bad_images import Quarantine
from dinoray.pipeline.training.checkpoint import read_parts
from dinoray.pipeline.training.state import TrainState, build_state
from dinoray.pipeline.training.state_copy import StateCopy, is_finite

NUM_IMAGES = 1_281_167
CHECKSUMS: dict[str, Callable[[bytes], object]] = {
    "CRC-32 (zlib)": zlib.crc32,
    "SHA-256": lambda data: hashlib.sha256(data).digest(),
    "BLAKE2b": lambda data: hashlib.blake2b(data).digest(),
}


@contextmanager
def without_checksums() -> Iterator[None]:
    """Have files written without their checksums being computed."""
    checkpoint_files.zlib = SimpleNamespace(crc32=lambda data, crc=0: 0)
    try:
        yield
    finally:
        checkpoint_files.zlib = zlib


def trained_state(recipe: str) -> TrainState:
    """Return a run's state after one step of its optimizer, on made-up gradients."""
    config = load_config(recipe, None, ["data.path=none"]).algorithm()
    state = build_state(config, num_images=NUM_IMAGES)
    for parameter in state.dino.student.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    state.optimizer.step()
    return state


def save_before(state: TrainState, folder: Path) -> None:
    """Write the files of a checkpoint from the state itself."""
    written = {}
    for name, network in ((STUDENT, state.dino.student), (TEACHER, state.dino.teacher)):
        with (folder / name).open("wb") as sink:
            written[name] = WrittenFile(sink)
            written[name].write(save({k: v.detach().contiguous() for k, v in network.state_dict().items()}))
    train_state = {
        "step": state.step,
        "optimizer": state.optimizer.state_dict(),
        "center": state.dino.center,
        "health": state.health.state_dict(),
    }
    with (folder / TRAIN_STATE).open("wb") as sink:
        written[TRAIN_STATE] = WrittenFile(sink)
        torch.save(train_state, written[TRAIN_STATE])
    (folder / META).write_bytes(meta_json({"step": state.step}, written))


def check_before(state: TrainState) -> bool:
    """Return whether all is finite, value by value."""
    return all(bool(torch.isfinite(value).all()) for value in tensors(state))


def check_now(state: TrainState) -> bool:
    """Return whether all is finite, by sums."""
    return is_finite(tensors(state))


def tensors(state: TrainState) -> list[torch.Tensor]:
    """Return all that must be finite."""
    moments = [x for of in state.optimizer.state.values() for x in of.values()]
    return [*state.dino.state_dict().values(), *moments]


def longest_pause(work: Callable[[], object]) -> float:
    """Return the longest time for which this thread could not run while another does `work`, in seconds."""
    thread, longest, last = threading.Thread(target=work), 0.0, time.perf_counter()
    thread.start()
    while thread.is_alive():
        time.sleep(0.0005)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return longest


def load_plain(folder: Path) -> None:
    """Read them."""
    json.loads((folder / META).read_text())
    torch.load(folder / TRAIN_STATE, weights_only=True)
    for file in (STUDENT, TEACHER):
        touch(load_file(folder / file))


def load_verified(folder: Path) -> None:
    """Read a checkpoint as a resume does."""
    parts = read_parts(folder)
    touch(parts.student)
    touch(parts.teacher)


def touch(weights: dict[str, torch.Tensor]) -> None:
    """Read each tensor, of which a file may be mapped only."""
    for tensor in weights.values():
        tensor.sum()


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Return the wall time of `work`, and the CPU time of this process, which other processes hardly change."""
    begin, used = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - begin, time.process_time() - used


def shown(values: list[float]) -> str:
    """`0.41 (0.40 to 0.52)`: median, least and most."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="vit_small_imagenet_vanilla")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=None)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    state, copy, quarantine = trained_state(arguments.recipe), StateCopy(), Quarantine()
    pauses = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        before, now = Path(scratch, "before"), Path(scratch, "now")

        def take(into: StateCopy = copy) -> None:
            into.take(state, num_images=NUM_IMAGES, quarantine=quarantine)

        def write() -> None:
            copy.write(Directory(str(now)))

        def write_without() -> None:
            with without_checksums():
                write()

        works: dict[str, Callable[[], object]] = {
            "held, before: check that all is finite": lambda: check_before(state),
            "held, before: write all files": lambda: save_before(state, before),
            "held, now: check that all is finite": lambda: check_now(state),
            "held, now: first copy, into new memory": lambda: take(StateCopy()),
            "held, now: each later copy": take,
            "until committed, without checksums": write_without,
            "until committed": write,
            "load, without verifying": lambda: load_plain(now),
            "load": lambda: load_verified(now),
        }
        before.mkdir()
        for work in works.values():  # files and caches are made
            work()
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
        for _ in range(arguments.rounds):
            for name, work in works.items():
                times[name].append(seconds(work))
            pauses.append(longest_pause(write))
        num_bytes = sum(file.stat().st_size for file in now.iterdir())
        data = (now / TRAIN_STATE).read_bytes()
    print(f"{arguments.recipe}: {num_bytes / 1e6:.0f} MB a checkpoint, {arguments.rounds} rounds\n")
    print("| | s, median (least to most) | CPU s |\n|---|---|---|")
    for name, both in times.items():
        print(f"| {name} | {shown([wall for wall, _ in both])} | {shown([used for _, used in both])} |")
    print(f"| longest pause of the training thread while it is written | {shown(pauses)} | |")
    print("\n| checksum of these bytes | MB per CPU second, best of all rounds |\n|---|---|")
    for name, checksum in CHECKSUMS.items():
        best = min(seconds(lambda checksum=checksum: checksum(data))[1] for _ in range(arguments.rounds))
        print(f"| {name} | {len(data) / 1e6 / best:,.0f} |")


if __name__ == "__main__":
    run_main(main)
