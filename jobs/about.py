"""What a run or study says of itself before it starts: config, versions, and what the networks will see."""

import json
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from rich.console import Console

from jobs.config import Config
from jobs.running import Inputs
from pipeline.contact_sheet import contact_sheet
from pipeline.crops import crop_rng, multi_crop
from pipeline.decode import BadImage, decode
from pipeline.demo_images import demo_folder, write_demo_images
from pipeline.storage import Directory


def draw_demo(config: Config, console: Console) -> None:
    """Draw the demo's images, if it is them that are asked for and they are not there."""
    if Path(config.data.path).is_relative_to(demo_folder()):
        console.print(f"demo images: {write_demo_images(demo_folder())} in {demo_folder()}", soft_wrap=True)


def write_about(run: Directory, config: Config, inputs: Inputs, reasons: Sequence[str]) -> None:
    """config.yaml, environment.json (with `reasons` of numbers that stand for auto) and crops.png."""
    run.write("config.yaml", config.to_yaml().encode())
    names = ["dinoray", "ray", "torch", "timm", "numpy", "pyarrow", "boto3"]
    names += ["numba", "simplejpeg", "opencv-python-headless"]
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    about = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git_commit": commit.stdout.strip() or None,
        "packages": {name: _version(name) for name in names},
        "automatic": list(reasons),
    }
    run.write("environment.json", json.dumps(about, indent=1).encode())
    images, samples = inputs.images, []
    _, first = inputs.order(config.train.seed).locate(range(min(6, images.num_images)))
    for fetched in images.fetch(first.tolist()):
        try:
            if fetched.data is not None:
                image = decode(fetched.data, max_pixels=config.data.max_pixels)
                rng = crop_rng(config.train.seed, 0, fetched.key)
                samples.append((fetched.key, image, multi_crop(image, rng, config.crops)))
        except BadImage:
            continue  # counted and named when the run comes to it
    if samples:
        run.write("crops.png", contact_sheet(samples, config.crops))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
