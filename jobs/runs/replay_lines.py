"""What a replay prints: metrics beside those of the run, what is not finite, and the images of the step."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

import numpy as np
import torch

from dinoray.pipeline.augment.config import CropsConfig
from dinoray.pipeline.augment.kernels.torch_colour import finished
from dinoray.pipeline.data.reading.source import Status
from dinoray.pipeline.training.config import StepSettings
from dinoray.pipeline.training.non_finite import BadOutput, NonFinite
from dinoray.pipeline.training.rank_shares import RankShares
from dinoray.pipeline.training.state import TrainState
from dinoray.pipeline.training.step import autocast

_NAMED = 5
"""Names in a line."""
_PACKAGES = ("torch", "timm", "numpy", "numba", "simplejpeg", "opencv-python-headless")
"""Packages whose version may change a result."""


def beginning(
    run: str, start: str, state: TrainState, step: int, shares: RankShares, capture: Mapping[str, Any]
) -> Iterator[str]:
    """Yield where the replay begins and how it runs."""
    num_steps = step - state.step
    yield f"replaying {run}, step {step}: {num_steps} {'step' if num_steps == 1 else 'steps'} from {start}"
    how = "at once" if shares.together else "one after the other"
    ranks = f", {shares.world_size} ranks {how}" if shares.world_size > 1 else ""
    threads = torch.get_num_threads()
    device = f"cpu with {threads} {'thread' if threads == 1 else 'threads'}"
    yield f"one process, {device if state.device.type == 'cpu' else 'cuda'}, {precision(state)}{ranks}"
    if capture:
        what = [capture["reason"], *([capture["error"]] if "error" in capture else [])]
        yield f"captured by the run: {': '.join(what)}, rank {capture['rank']} of {capture['world_size']}"


def precision(state: TrainState) -> str:
    """Return the precision of the networks."""
    with autocast(state.config.train.precision, state.device):
        return "bf16" if torch.is_autocast_enabled(state.device.type) else "fp32"


def of_step(step: int, metrics: Mapping[str, Any], logged: Mapping[str, Any]) -> str:
    """Return the line of a step before the last one."""
    values = "  ".join(
        f"{name} {float(metrics[key]):.6g}"
        for name, key in (("loss", "loss"), ("entropy", "teacher_entropy"), ("grad norm", "grad_norm"))
    )
    return f"step {step}  {values}  {_beside(metrics, logged)}"


def of_metrics(step: int, metrics: Mapping[str, Any], logged: Mapping[str, Any]) -> Iterator[str]:
    """Yield each metric of the step beside the run's."""
    yield f"{f'step {step}':<18}{'replayed':>16}{'logged':>16}"
    for name, value in metrics.items():
        if name in logged:
            difference = _difference(value, logged[name])
            how = f"{float(logged[name]):>16.9g}  {f'differs by {difference:.1e}' if difference else 'equal'}"
        else:
            how = f"{'-':>16}"
        yield f"{name:<18}{float(value):>16.9g}{how}"


def of_schedule(now: StepSettings, health: Mapping[str, Any], *, skipped: int) -> Iterator[str]:
    """Yield what is not among the metrics: the freeze, skipped steps, and the health of this step alone."""
    yield f"last layer        {'frozen' if now.freeze_last_layer else 'trained'}, {skipped} steps skipped before"
    if "entropy_ratio" in health:
        yield (
            f"teacher           entropy {health['entropy_ratio']:.1%} of uniform, "
            f"{health['commonest_prototype']:.1%} of crops have the same prototype, "
            f"feature std {health['feature_std']:.3g}"
        )


def of_found(found: NonFinite, batch: Mapping[str, Any], shares: RankShares) -> Iterator[str]:
    """Yield the first values that are not finite: weights, outputs, gradients."""
    yield f"weights before    {_named(found.weights)}"
    if not found.outputs:
        yield "outputs           all finite"
    for network in dict.fromkeys(bad.network for bad in found.outputs):
        of_network = [bad for bad in found.outputs if bad.network == network]
        first = of_network[0]
        module = f"{network} {first.module}".strip()
        inputs = (
            "finite" if first.inputs_are_finite else "not finite: what precedes it in its parent is the first"
        )
        yield f"first output      {module} is not finite, its inputs are {inputs}"
        crops = [crop for bad in of_network for crop in crops_of(bad, shares)]
        images = dict.fromkeys(batch["key"][row] for row, _ in crops)
        if crops:
            yield f"                  {len(crops)} crops of {len(images)} images: {_some(list(images))}"
    yield f"gradients         {_named(found.gradients)}"


def crops_of(bad: BadOutput, shares: RankShares) -> list[tuple[int, int]]:
    """Return (row of the batch, crop) of the rows of an output."""
    return [
        (bad.part + row % shares.rows_per_part * shares.num_parts, row // shares.rows_per_part)
        for row in bad.rows
    ]


def of_images(
    batch: Mapping[str, Any], crops: CropsConfig, shares: RankShares, found: NonFinite, *, limit: int
) -> Iterator[str]:
    """Yield a line per image, at most `limit`; those with values that are not finite and replaced ones first."""
    batch = finished(batch, crops)
    suspects = {row for bad in found.outputs for row, _ in crops_of(bad, shares)}
    positions, status = batch["position"], batch["status"]
    rows = sorted(
        range(len(positions)), key=lambda row: (row not in suspects, status[row] == Status.OK, positions[row])
    )
    yield f"{'position':>10}  {'rank':>4}  {'min':>3} {'mean':>5} {'max':>3}  image"
    for row in rows[:limit]:
        pixels = np.concatenate([batch[name][row].ravel() for name in ("global_crops", "local_crops")])
        what = [] if row not in suspects else ["not finite"]
        if status[row] != Status.OK:
            reason = json.loads(batch["note"][row])["reason"]
            what.append(f"replaced: {Status(int(status[row])).name.lower()}, {reason}")
        yield (
            f"{positions[row]:>10}  {shares.rank_of(int(positions[row])):>4}  "
            f"{pixels.min():>3} {pixels.mean():>5.1f} {pixels.max():>3}  {batch['key'][row]}"
            f"{'  ' if what else ''}{', '.join(what)}"
        )
    if len(rows) > limit:
        yield f"            and {len(rows) - limit} more images; --images {len(rows)} prints all"


def result(metrics: Mapping[str, Any], logged: Mapping[str, Any]) -> str:
    """Return how the step compares with what the run logged."""
    return f"result            {_beside(metrics, logged)}"


def other_machine(
    environment: Mapping[str, Any], device: torch.device, capture: Mapping[str, Any]
) -> Iterator[str]:
    """Yield in what the run's machines differ from this one."""
    then = {**(environment.get("packages") or {}), **(capture.get("versions") or {})}
    changed = [
        f"{name} {then[name]} there, {version} here"
        for name in _PACKAGES
        if then.get(name) and then[name] != (version := _version(name))
    ]
    if changed:
        yield f"other versions than in the run: {', '.join(changed)}"
    had_gpus = any(row.get("GPUs") for row in environment.get("hardware") or [])
    if device.type == "cpu" and str(capture.get("device", "cuda" if had_gpus else "cpu")).startswith("cuda"):
        yield (
            "the run used GPUs, which round otherwise and draw other random numbers; with train.precision=auto its "
            "networks ran in bf16: train.precision=bf16 does so here"
        )
    elif environment.get("cpus") not in (None, os.cpu_count()):
        cpus = f"{environment['cpus']} CPUs, this one has {os.cpu_count()}"
        yield f"the run's machine had {cpus}: sums may round otherwise"


def _beside(metrics: Mapping[str, Any], logged: Mapping[str, Any]) -> str:
    """Return how metrics differ from those that the run logged, by the one that differs most."""
    both = {name: _difference(value, logged[name]) for name, value in metrics.items() if name in logged}
    if not both:
        return "not logged by the run"
    name = max(both, key=both.__getitem__)
    if both[name] == 0:
        return f"equal to the run's log, bit for bit ({len(both)} values)"
    if both[name] == math.inf:
        return f"differs from the run's log: {name} is {float(metrics[name]):g}, not {float(logged[name]):g}"
    return f"differs from the run's log by {both[name]:.1e} of the value at most ({name})"


def _difference(value: Any, logged: Any) -> float:
    """Return the difference relative to the logged value, which is a string if it is not finite; 0 if both are NaN."""
    here, there = float(value), float(logged)
    if here == there or (math.isnan(here) and math.isnan(there)):
        return 0.0
    if not (math.isfinite(here) and math.isfinite(there)) or there == 0:
        return math.inf
    return abs(here - there) / abs(there)


def _named(names: Sequence[str]) -> str:
    return f"not finite: {_some(names)}" if names else "all finite"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
