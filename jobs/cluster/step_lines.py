"""What a plan prints of the training step: the memory that it needs of a GPU, and how it scales with the GPUs."""

from dinoray.jobs.cluster.measure import Measured
from dinoray.jobs.cluster.plan_config import PlanConfig
from dinoray.pipeline.data.partition import batch_size_per_worker
from dinoray.pipeline.planning.memory import fitting, memory_of
from dinoray.pipeline.planning.node_rates import Run
from dinoray.pipeline.planning.scaling import Scaled, scaled

SCALES = (8, 64, 256)
"""Numbers of GPUs for which an efficiency is printed."""
_USABLE = 0.9
"""Share of a GPU's memory for what is counted: the rest is for the driver, libraries and gaps. An assumption."""


def memory_rows(config: PlanConfig, run: Run, measured: Measured) -> list[tuple[str, str]]:
    """Return what a step needs of a GPU's memory, and what to set where it does not fit; nothing for other networks."""
    algorithm, of_gpu = config.algorithm(), config.plan.gpu.gpu_memory_gib
    images, bf16 = measured.num_images, config.train.precision != "fp32"
    found = memory_of(algorithm, num_images=images, train_workers=run.train_workers, bf16=bf16)
    if found is None:
        return []
    parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in found._asdict().items() if size)
    has = "" if of_gpu is None else f" {of_gpu * 2**30 / 1e9:.1f} GB"
    rows = [
        (
            "memory",
            f"a step needs {found.total / 1e9:.1f} GB of a GPU's{has} ({parts}), computed for eager blocks",
        )
    ]
    limit = None if of_gpu is None else _USABLE * of_gpu * 2**30
    if limit is not None and found.total > limit:
        changes = fitting(algorithm, limit, num_images=images, train_workers=run.train_workers, bf16=bf16)
        remedy = "take a plan.gpu_node whose GPUs have more memory, or a smaller backbone"
        if changes:
            remedy = "set " + " ".join(f"train.{name}={value}" for name, value in changes.items())
        rows.append(("", f"warning: more than {_USABLE:.0%} of {config.plan.gpu_node}'s; {remedy}"))
    return rows


def scaling_of(config: PlanConfig, run: Run, measured: Measured) -> list[Scaled]:
    """Return how the plan's step scales, with as many images for each GPU as the plan gives it."""
    rate = measured.figures.images_per_second_per_gpu
    return [
        scaled(
            gpus,
            step_seconds=batch_size_per_worker(run.global_batch_size, run.train_workers) / rate,
            gradient_bytes=run.gradient_bytes,
            crop_bytes_per_second=rate * run.crop_bytes,
            node=config.plan.gpu,
        )
        for gpus in SCALES
    ]


def scaling_row(config: PlanConfig, run: Run, measured: Measured) -> tuple[str, str]:
    """Return the efficiency on more GPUs, in a line."""
    each = batch_size_per_worker(run.global_batch_size, run.train_workers)
    shares = ", ".join(f"{x.efficiency:.0%} on {x.gpus}" for x in scaling_of(config, run, measured))
    return (
        "scaling",
        f"{each} images a GPU and step, {run.gradient_bytes / 1e6:,.0f} MB of gradients: of its rate alone a GPU keeps "
        f"{shares} GPUs, computed, not measured",
    )
