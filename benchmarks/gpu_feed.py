"""How much of the step's rate is left when it is fed with real crops: through staging, on one device.

    python benchmarks/gpu_feed.py [section.key=value ...] [--model NAME] [--batch 64] [--processes N]
                                  [--images FOLDER] [--steps 50] [--json FILE]

Three rates: the step alone, on a batch that lies on the device; the stream alone, its batches staged and dropped; and
the step fed by the stream. Processes decode and crop JPEG files in shared memory, which stands for the object store
of a cluster; from there batches go the way of a run (pipeline/training/staging.py: pinned memory, a stream of its
own, two deep). Images are drawn (benchmarks/augment_images.py) unless a folder is given. The share kept is fed over
alone; where the stream alone is slower than the step, it cannot reach 100 %, and the line says so.

By the clock: the machine must have no other work. No Ray; needs torch, timm, numpy, numba, simplejpeg, OpenCV and
pydantic.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from augment_images import KINDS, draw_photos, read_photos
from crop_processes import CropProcesses
from gpu_step import NUM_IMAGES, config_of, noise

from dinoray.models.errors import DinorayError
from dinoray.pipeline.training.distributed import set_up_device
from dinoray.pipeline.training.staging import staged
from dinoray.pipeline.training.state import TrainState, build_state
from dinoray.pipeline.training.step import train

_WARM_UP = 5
_DRAWN = 32


def seconds_of(batches: Iterable[Any], work: Callable[[Any], object], device: torch.device) -> float:
    """Return the seconds of `work` on each batch after the first few."""
    begin = 0.0
    for number, batch in enumerate(batches):
        if number == _WARM_UP:
            _wait(device)
            begin = time.perf_counter()
        work(batch)
    _wait(device)
    return time.perf_counter() - begin


def trained(state: TrainState, batches: Iterable[Mapping[str, Any]], steps: int) -> dict[str, float]:
    """Return images/s of the training loop after the first few steps, and its data wait, a share of the time."""
    done, begin, waited, images = 0, 0.0, 0.0, 0

    def on_step(batch: Mapping[str, Any], _: Any, wait_seconds: float) -> bool:
        nonlocal done, begin, waited, images
        done += 1
        if done == _WARM_UP:
            _wait(state.device)
            begin = time.perf_counter()
        elif done > _WARM_UP:
            waited, images = waited + wait_seconds, images + len(batch["global_crops"])
        return done == _WARM_UP + steps

    train(state, batches, on_step=on_step)
    _wait(state.device)
    seconds = time.perf_counter() - begin
    return {"images_per_second": images / seconds, "data_wait": waited / seconds}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def sentence(facts: Mapping[str, Any]) -> str:
    """Return the result in words."""
    alone, stream, fed = (facts[name] for name in ("step_alone", "stream_alone", "fed"))
    text = f"fed, the step keeps {fed / alone:.1%} of its rate"
    if stream < alone:
        return f"{text}; the bottleneck is the stream: more --processes, on more CPU cores, would raise it"
    return f"{text}; the bottleneck is the step"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", metavar="section.key=value")
    parser.add_argument("--model", default="vit_small_patch16_224", help="name of timm")
    parser.add_argument("--batch", type=int, default=64, help="images a step")
    parser.add_argument(
        "--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="that make crops"
    )
    parser.add_argument("--images", type=Path, help="folder of JPEG files")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_intermixed_args(argv)
    config = config_of(options.settings, options.model, options.batch)
    if options.images:
        files, _ = read_photos(options.images, 1000)
    else:
        files = draw_photos(KINDS["0.2 MP"], _DRAWN)
    # Before a GPU is used: a process that uses one cannot be forked.
    crops = CropProcesses(files, config.crops, batch_size=options.batch, number=options.processes)
    with closing(crops):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        set_up_device(device)
        count = options.steps * options.batch

        def stream() -> Iterable[Mapping[str, Any]]:
            return staged(crops.batches(), device)

        seconds = seconds_of(islice(stream(), _WARM_UP + options.steps), lambda _: None, device)
        facts: dict[str, Any] = {"stream_alone": count / seconds}
        state = build_state(config, num_images=NUM_IMAGES, device=device)
        state.compile()
        same = [noise(config, options.batch, device)] * (_WARM_UP + options.steps)
        facts["step_alone"] = trained(state, same, options.steps)["images_per_second"]
        fed = trained(state, stream(), options.steps)
        facts |= {"fed": fed["images_per_second"], "data_wait": fed["data_wait"]}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{options.model}, batch {options.batch}, {name}, {options.processes} crop processes")
    print("| step alone | stream alone | fed | kept | data wait |\n|---|---|---|---|---|")
    rates = (f"{facts[key]:,.1f} images/s" for key in ("step_alone", "stream_alone", "fed"))
    print(f"| {' | '.join(rates)} | {facts['fed'] / facts['step_alone']:.1%} | {facts['data_wait']:.1%} |")
    print(sentence(facts))
    if options.json:
        facts |= {"device": name, "torch": torch.__version__, "model": options.model, "batch": options.batch}
        options.json.write_text(json.dumps({**facts, "processes": options.processes}, indent=1))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DinorayError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
