"""The training step on one device: images/s, the time of its parts, peak memory and MFU, beside the published step.

    python benchmarks/gpu_step.py [section.key=value ...] [--model NAME ...] [--batch N ...] [--steps 20] [--rounds 3]
                                  [--only dinoray | plain] [--compile auto | on | off ...] [--json FILE]

Noise that lies on the device already: uint8 crops for our step, normalised float32 crops for the plain one
(benchmarks/plain_dino.py), so neither pays for its input and ours alone pays for its conversion. Settings are those of
a run's config, e.g. head.out_dim=4096 or train.accumulate_steps=2. Of every model and batch each step runs by itself:
warm-up, then rounds of whole steps, whose fastest counts, then steps with marks between the parts, then one step for
the peak of the memory. A batch that does not fit is said so, and the others go on. `--compile off on` measures our step
with eager blocks and with compiled ones (train.compile); the plain step is always eager.

On a GPU: wall-clock, parts by CUDA events. On a CPU: CPU time on one thread, so that the ratios hold on a shared
machine. MFU is against the rate at which the same device multiplies large matrices, in bfloat16 on a GPU, measured
first. No Ray; needs torch, timm, numpy and pydantic. Prints a table.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from part_clock import PARTS, PartClock
from peak_memory import peak_of_step
from plain_dino import PlainStep
from torch import Tensor

from dinoray.models.config import Compile
from dinoray.models.errors import ConfigError, DinorayError, ResourceError
from dinoray.pipeline.augment.config import crop_shapes
from dinoray.pipeline.training.config import DINOConfig
from dinoray.pipeline.training.distributed import set_up_device
from dinoray.pipeline.training.flops import flops_per_image, matmul_rate
from dinoray.pipeline.training.pixels import pixels
from dinoray.pipeline.training.state import TrainState, build_state
from dinoray.pipeline.training.step import train_step

MODELS = ("vit_small_patch16_224", "vit_base_patch16_224", "resnet50")
NUM_IMAGES = 1_281_167
_WARM_UP = 3


class Ours:
    """Our step on one batch, and the same with marks between its parts."""

    def __init__(self, state: TrainState, crops: dict[str, Tensor]) -> None:
        self._state, self._crops, self.student = state, crops, state.dino.student
        state.compile()
        if state.compilation.note:
            print(state.compilation.note, file=sys.stderr)

    def step(self) -> None:
        """Run one step."""
        train_step(self._state, self._crops)

    def timed(self, clock: PartClock) -> None:
        """Run one step; hooks around the networks and the optimiser mark its parts."""
        dino, mark = self._state.dino, clock.mark

        def student_done(_: Any, __: Any, output: Any) -> None:
            mark("student forward")
            output.logits.register_hook(logits_done)

        def logits_done(_: Tensor) -> None:
            mark("loss")
            torch.autograd.Variable._execution_engine.queue_callback(lambda: mark("backward"))

        hooks = [
            dino.teacher.register_forward_pre_hook(lambda *_: mark("other")),
            dino.teacher.register_forward_hook(lambda *_: mark("teacher forward")),
            dino.student.register_forward_pre_hook(lambda *_: mark("other")),
            dino.student.register_forward_hook(student_done),
            self._state.optimizer.register_step_post_hook(lambda *_: mark("optimiser")),
        ]
        update = dino.update_teacher

        def update_teacher(*arguments: Any, **named: Any) -> None:
            mark("other")
            update(*arguments, **named)
            mark("EMA")

        dino.update_teacher = update_teacher  # type: ignore[method-assign]
        try:
            clock.start()
            self.step()
            clock.stop()
        finally:
            del dino.update_teacher
            for hook in hooks:
                hook.remove()


class Plain:
    """The plain step on the same batch."""

    def __init__(self, state: TrainState, crops: dict[str, Tensor]) -> None:
        config, device = state.config, state.device
        self._step = PlainStep(state.dino, config, state.schedule, device)
        self._crops, self.student = list(views(crops, config, device)), self._step.student
        torch.backends.cudnn.benchmark = True  # as published

    def step(self) -> None:
        """Run one step."""
        self._step(self._crops)

    def timed(self, clock: PartClock) -> None:
        """Run one step, whose code marks its parts."""
        clock.start()
        self._step(self._crops, clock.mark)
        clock.stop()


SIDES: dict[str, Callable[[TrainState, dict[str, Tensor]], Any]] = {"dinoray": Ours, "plain": Plain}


def views(crops: dict[str, Tensor], config: DINOConfig, device: torch.device) -> Iterator[Tensor]:
    """Yield each crop of the batch by itself, normalised float32 [B, 3, S, S], globals first."""
    for name, number in (
        ("global_crops", config.crops.num_global_crops),
        ("local_crops", config.crops.num_local_crops),
    ):
        if number:
            yield from pixels(crops[name], config.crops, device).float().contiguous().chunk(number)


def noise(config: DINOConfig, batch: int, device: torch.device) -> dict[str, Tensor]:
    """Return crops of noise on the device, uint8 [batch, number, S, S, 3]."""
    rng = torch.Generator().manual_seed(0)
    shapes = zip(("global_crops", "local_crops"), crop_shapes(config.crops), strict=True)
    return {
        name: torch.randint(0, 256, (batch, *shape), dtype=torch.uint8, generator=rng).to(device)
        for name, shape in shapes
    }


def measure(side: str, config: DINOConfig, batch: int, device: torch.device, options: Any) -> dict[str, Any]:
    """Return the figures of one side: milliseconds of a step and of its parts, images/s and bytes at the peak."""
    # The plain step copies the networks; the state that they come from is then gone.
    work = SIDES[side](
        build_state(config, num_images=NUM_IMAGES, device=device), noise(config, batch, device)
    )
    gc.collect()
    for _ in range(_WARM_UP):
        work.step()
    seconds = min(_seconds(work.step, options.steps, device) for _ in range(options.rounds))
    clock = PartClock(device)
    for _ in range(options.steps):
        work.timed(clock)
    held = 4 * 4 * sum(p.numel() for p in work.student.parameters())  # weights twice, and two moments
    return {
        "images_per_second": batch / seconds,
        "step_ms": 1000 * seconds,
        "parts_ms": clock.read(),
        "peak_bytes": peak_of_step(work.step, device, held=held),
    }


def _seconds(step: Callable[[], object], steps: int, device: torch.device) -> float:
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = clock()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (clock() - begin) / steps


def sweep(options: Any, device: torch.device, rate: float) -> Iterator[dict[str, Any]]:
    """Yield a row for each model, batch and side."""
    for model in options.model:
        for batch in options.batch:
            config = config_of(options.settings, model, batch)
            flops = flops_per_image(config)
            for side, mode in sides(options):
                row: dict[str, Any] = {"model": model, "batch": batch, "step": side}
                if side == "dinoray":
                    row["compile"] = mode
                    train = config.train.model_copy(update={"compile": mode})
                    config = config.model_copy(update={"train": train})
                chosen = torch.backends.cudnn.benchmark
                try:
                    row |= measure(side, config, batch, device, options)
                    row["tflops"] = row["images_per_second"] * flops / 1e12
                    row["mfu"] = row["images_per_second"] * flops / rate
                except (torch.OutOfMemoryError, ResourceError):
                    row["error"] = "does not fit"
                torch.backends.cudnn.benchmark = chosen
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                yield row


def sides(options: Any) -> list[tuple[str, str]]:
    """Return each step to measure, and what is compiled of it."""
    both = [*(("dinoray", mode) for mode in options.compile), ("plain", "off")]
    return [(side, mode) for side, mode in both if options.only in (None, side)]


def config_of(settings: Sequence[str], model: str, batch: int) -> DINOConfig:
    """Return the default algorithm with this model and batch, and the `section.key=value` of the command line."""
    tree: dict[str, Any] = {"backbone": {"name": model}, "train": {"global_batch_size": batch}}
    for setting in settings:
        path, is_one, text = setting.partition("=")
        section, _, key = path.partition(".")
        if not is_one or not key:
            raise ConfigError(f"{setting!r} is no setting; write section.key=value")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        tree.setdefault(section, {})[key] = value
    try:
        return DINOConfig.model_validate(tree)
    except ValueError as error:
        raise ConfigError(f"settings: {error}") from error


HEAD = ("model", "batch", "step", "images/s", "ms", *(f"{part} ms" for part in PARTS))
HEAD += ("peak GB", "TFLOP/s", "MFU", "dinoray / plain")


def cells(row: dict[str, Any], other: dict[str, Any] | None) -> list[str]:
    """Return the cells of a row; `other`: the row of the plain step before it or after it, if both are there."""
    mode = row.get("compile", "auto")
    named = [row["model"], str(row["batch"]), row["step"] + (f", compile {mode}" if mode != "auto" else "")]
    if "error" in row:
        return [*named, row["error"], *[""] * (len(HEAD) - 4)]
    ratio = ""
    if other is not None and "error" not in other:
        ratio = f"{row['images_per_second'] / other['images_per_second']:.2f}"
    return [
        *named,
        f"{row['images_per_second']:,.1f}",
        f"{row['step_ms']:,.1f}",
        *(f"{ms:,.1f}" for ms in row["parts_ms"].values()),
        f"{row['peak_bytes'] / 1e9:.2f}",
        f"{row['tflops']:.3g}",
        f"{row['mfu']:.0%}",
        ratio,
    ]


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the rows as Markdown."""
    plain = {(row["model"], row["batch"]): row for row in rows if row["step"] == "plain"}
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    for row in rows:
        other = plain.get((row["model"], row["batch"])) if row["step"] == "dinoray" else None
        lines.append(f"| {' | '.join(cells(row, other))} |")
    return lines


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", metavar="section.key=value")
    parser.add_argument("--model", nargs="+", default=list(MODELS), help="names of timm")
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 64, 128], help="images a step")
    parser.add_argument("--steps", type=int, default=20, help="in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=list(SIDES), help="leave the other step out")
    parser.add_argument(
        "--compile", choices=get_args(Compile), nargs="+", default=["auto"], help="of our step's blocks"
    )
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_intermixed_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    set_up_device(device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    rate = matmul_rate(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "one CPU thread"
    print(
        f"{name}, torch {torch.__version__}: {rate / 1e12:.3g} TFLOP/s in large matrix products", flush=True
    )
    rows: list[dict[str, Any]] = []
    facts = {"device": name, "torch": torch.__version__, "matmul_tflops": rate / 1e12, "rows": rows}
    for row in sweep(options, device, rate):
        rows.append(row)
        print(f"| {' | '.join(cells(row, None))} |", flush=True)
        if options.json:  # after each row: a later one may not end
            options.json.write_text(json.dumps(facts, indent=1))
    print("\n" + "\n".join(table(rows)))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DinorayError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
