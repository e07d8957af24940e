"""What a run or study says of itself before it starts: config, versions, and what the networks will see."""

import json
import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dinoray.jobs.cli.auto_recipe import AUTO
from dinoray.jobs.cli.config import load
from dinoray.jobs.cli.main import is_local
from dinoray.jobs.cli.recipes import demo_data
from dinoray.jobs.runs.choosing import kept_choices
from dinoray.jobs.runs.commit import COMMIT, commit_of
from dinoray.models.settings import flatten
from dinoray.pipeline.augment.multicrop import crop_rng, multi_crop
from dinoray.pipeline.cluster.nodes import group_identical_nodes
from dinoray.pipeline.data.decoding.bad_image import BadImage
from dinoray.pipeline.data.decoding.decode import decode
from dinoray.pipeline.data.demo_images import demo_folder, write_demo_images
from dinoray.pipeline.figures.contact_sheet import contact_sheet
from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.tracking.records import read_mapping
from dinoray.pipeline.training.init_weights import INIT_LINE
from dinoray.pipeline.worker.config import Config
from dinoray.pipeline.worker.inputs import Inputs


def draw_demo(config: Config, console: Console) -> None:
    """Draw the demo's images, if it is them that are asked for and they are not there."""
    if Path(config.data.path).is_relative_to(demo_folder()):
        console.print(f"demo images: {write_demo_images(demo_folder())} in {demo_folder()}", soft_wrap=True)


def write_about(run: Directory, config: Config, inputs: Inputs, reasons: Sequence[str]) -> None:
    """config.yaml, environment.json and crops.png."""
    run.write(run_dir.CONFIG, config.to_yaml().encode())
    write_environment(run, config, reasons)
    images, samples = inputs.images, []
    _, first = images.order(config.train.seed).locate(range(min(6, images.num_images)))
    for fetched in images.fetch(first.tolist()):
        try:
            if fetched.data is not None:
                image = decode(fetched.data, max_pixels=images.config.max_pixels, config=images.config)
                rng = crop_rng(config.train.seed, 0, fetched.key)
                samples.append((fetched.key, image, multi_crop(image, rng, config.crops)))
        except BadImage:
            continue  # counted and named when the run comes to it
    if samples:
        run.write(run_dir.CROPS, contact_sheet(samples, config.crops))


def write_environment(run: Directory, config: Config, reasons: Sequence[str]) -> None:
    """environment.json, with `reasons` of numbers that stand for auto, and what the run has started from.

    A run that resumes loads no weights anew: the lines on those stay. The file keeps the recipe's other values, because
    recipes change and a run does not. `started` is the first start of a run that was resumed, in seconds since 1970.
    """
    is_new = any(line.startswith(INIT_LINE) for line in reasons)
    before = read_mapping(run, run_dir.ENVIRONMENT)
    earlier = [] if is_new else before.get("automatic") or []
    kept = [line for line in earlier if str(line).startswith(INIT_LINE)]
    chosen = kept_choices(config, run)
    names = ["dinoray", "ray", "torch", "timm", "numpy", "pyarrow", "boto3"]
    names += ["numba", "simplejpeg", "opencv-python-headless"]
    about = {
        "started": before.get("started") or time.time(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git_commit": os.environ.get(COMMIT) or commit_of(Path(__file__).parent),
        "packages": {name: _version(name) for name in names},
        "processor": processor(),
        "cpus": os.cpu_count(),
        "cuda": torch.version.cuda,
        "recipe": {"name": config.recipe, "changed": recipe_changes(config, chosen.tree if chosen else {})},
        "automatic": [*(chosen.lines if chosen else []), *reasons, *kept],
    }
    run.write(run_dir.ENVIRONMENT, json.dumps(about, indent=1).encode())


def recipe_changes(config: Config, chosen: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """Settings that are not as the recipe of that name has them: dotted key -> `recipe`'s value and the `run`'s.

    `chosen`: what the recipe auto chose for the run. A setting that it did not choose has its default.
    """
    # Recipes have no path, but for the demo with its own images; the run's stands in for it.
    is_open = config.recipe != "demo" or config.data.path != demo_data()["data"]["path"]
    paths = [f"data.path={config.data.path}"] if is_open else []
    given = load(
        type(config), config.recipe, None, paths, chosen=chosen or {} if config.recipe == AUTO else None
    )
    recipe, run = (
        dict(flatten(one.model_dump(mode="json", exclude={"name", "recipe"}))) for one in (given, config)
    )
    if is_open:
        del recipe["data.path"]
    return {
        key: {"recipe": recipe.get(key), "run": run.get(key)}
        for key in dict.fromkeys([*recipe, *run])
        if recipe.get(key) != run.get(key)
    }


def processor() -> str:
    """The model of this machine's processor."""
    names = []
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown"


def note_hardware(run: Directory, nodes: Iterable[Mapping[str, Any]]) -> None:
    """Add what `ray.nodes()` are there now to environment.json: of each sort the most that were up at once.

    A local Ray may have more logical CPUs than this machine has CPUs; the CPUs are noted.
    """
    machine_cpus = os.cpu_count() if is_local() else None
    about = read_mapping(run, run_dir.ENVIRONMENT)
    known: dict[str, dict[str, Any]] = {}
    for row in [*about.get("hardware", []), *group_identical_nodes(nodes, machine_cpus=machine_cpus)]:
        sort = json.dumps({key: value for key, value in row.items() if key != "nodes"}, sort_keys=True)
        known[sort] = row | {"nodes": max(row["nodes"], known[sort]["nodes"] if sort in known else 0)}
    run.write(run_dir.ENVIRONMENT, json.dumps(about | {"hardware": list(known.values())}, indent=1).encode())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
