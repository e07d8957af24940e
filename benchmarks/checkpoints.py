"""What checksums add to saving and loading a checkpoint: seconds with and without them, and rates of checksums.

    python benchmarks/checkpoints.py [--recipe vit_small_imagenet_vanilla] [--rounds 5] [--folder DIR]

"Without" writes and reads the same files as save_checkpoint and read_parts do, but for the checksums. Files are read
from the page cache, and nothing is flushed to the disk: the device would hide what checksums cost.
"""

import argparse
import hashlib
import json
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dinoray.jobs.cli.config import load_config
from dinoray.jobs.cli.main import run_main
from dinoray.pipeline.storage.run_dir import META, STUDENT, TEACHER, TRAIN_STATE
from dinoray.pipeline.training.bad_images import Quarantine
from dinoray.pipeline.training.checkpoint import read_parts, save_checkpoint
from dinoray.pipeline.training.step import TrainState, build_state

NUM_IMAGES = 1_281_167
CHECKSUMS: dict[str, Callable[[bytes], object]] = {
    "CRC-32 (zlib)": zlib.crc32,
    "SHA-256": lambda data: hashlib.sha256(data).digest(),
    "BLAKE2b": lambda data: hashlib.blake2b(data).digest(),
}


def trained_state(recipe: str) -> TrainState:
    """Return a run's state after one step of its optimizer, on made-up gradients."""
    config = load_config(recipe, None, ["data.path=none"]).algorithm()
    state = build_state(config, num_images=NUM_IMAGES)
    for parameter in state.dino.student.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    state.optimizer.step()
    return state


def save_plain(state: TrainState, folder: Path) -> None:
    """Write the files of a checkpoint without checksums, as format 2 did."""
    for file, network in ((STUDENT, state.dino.student), (TEACHER, state.dino.teacher)):
        save_file({k: v.detach().contiguous() for k, v in network.state_dict().items()}, folder / file)
    train_state = {
        "optimizer": state.optimizer.state_dict(),
        "center": state.dino.center,
        "health": state.health.state_dict(),
    }
    torch.save(train_state, folder / TRAIN_STATE)
    (folder / META).write_text(json.dumps({"config": state.config.model_dump(mode="json")}))


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


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="vit_small_imagenet_vanilla")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=None)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    state = trained_state(arguments.recipe)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        plain, verified = Path(scratch, "plain"), Path(scratch, "verified")
        works: dict[str, Callable[[], object]] = {
            "save without": lambda: save_plain(state, plain),
            "save with": lambda: save_checkpoint(
                state, verified, num_images=NUM_IMAGES, quarantine=Quarantine()
            ),
            "load without": lambda: load_plain(plain),
            "load with": lambda: load_verified(verified),
        }
        for folder in (plain, verified):
            folder.mkdir()
        for work in works.values():  # files and caches are made
            work()
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
        for _ in range(arguments.rounds):
            for name, work in works.items():
                times[name].append(seconds(work))
        num_bytes = sum(file.stat().st_size for file in verified.iterdir())
        data = (verified / TRAIN_STATE).read_bytes()
    print(f"{arguments.recipe}: {num_bytes / 1e6:.0f} MB a checkpoint, {arguments.rounds} rounds\n")
    print(
        "| seconds, median (least to most) | without checksums | with | difference of medians |\n|---|---|---|---|"
    )
    for what in ("save", "load"):
        for place, kind in enumerate(("wall", "CPU")):
            two = [[pair[place] for pair in times[f"{what} {how}"]] for how in ("without", "with")]
            cells = [f"{statistics.median(t):.2f} ({min(t):.2f} to {max(t):.2f})" for t in two]
            difference = statistics.median(two[1]) - statistics.median(two[0])
            print(f"| {what}, {kind} | {cells[0]} | {cells[1]} | {difference:+.2f} |")
    print("\n| checksum of these bytes | MB per CPU second, best of all rounds |\n|---|---|")
    for name, checksum in CHECKSUMS.items():
        best = min(seconds(lambda checksum=checksum: checksum(data))[1] for _ in range(arguments.rounds))
        print(f"| {name} | {len(data) / 1e6 / best:,.0f} |")


if __name__ == "__main__":
    run_main(main)
