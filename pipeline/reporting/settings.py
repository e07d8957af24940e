"""What a run was told, how that differs from its recipe, and what it ran on: config.yaml and environment.json.

Of a run of any version: what its files do not say is left out. No Ray here.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from dinoray.pipeline.reporting.page import Html, details, facts, section, sentences, table
from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.tracking.records import read, read_mapping

_HIGHLIGHTS = (
    "recipe",
    "data.path",
    "backbone.name",
    "backbone.kwargs",
    "crops.global_crop_size",
    "crops.num_local_crops",
    "crops.local_crop_size",
    "head.out_dim",
    "loss.centering",
    "loss.teacher_temp",
    "teacher.teacher_momentum",
    "optim.name",
    "optim.base_lr",
    "optim.weight_decay",
    "train.epochs",
    "train.global_batch_size",
    "train.precision",
    "train.seed",
)


def settings(run: Directory, values: Mapping[str, Any]) -> Html:
    """The settings that matter most, those that are not the recipe's, and config.yaml folded away."""
    automatic = _environment(run).get("automatic")
    return section(
        "Settings",
        facts({key: values[key] for key in _HIGHLIGHTS if key in values}),
        sentences([str(reason) for reason in automatic]) if isinstance(automatic, list) else Html(""),
        *_changed(run),
        _folded(run, run_dir.CONFIG),
    )


def versions(run: Directory) -> Html:
    """Commit, packages and hardware, and environment.json folded away."""
    about = _environment(run)
    packages, hardware = about.get("packages"), about.get("hardware")
    told = {label: about[key] for key, label in _ABOUT.items() if about.get(key)}
    if isinstance(packages, dict):
        told |= {str(name): version or "not installed" for name, version in packages.items()}
    nodes = [row for row in hardware if isinstance(row, dict)] if isinstance(hardware, list) else []
    return section("Versions and hardware", facts(told), table(nodes), _folded(run, run_dir.ENVIRONMENT))


_ABOUT = {
    "git_commit": "commit",
    "python": "Python",
    "platform": "driver's operating system",
    "processor": "driver's processor",
    "cpus": "driver's CPUs",
    "cuda": "PyTorch's CUDA version",
}


def _environment(run: Directory) -> dict[str, Any]:
    return read_mapping(run, run_dir.ENVIRONMENT)


def _changed(run: Directory) -> Iterator[Html]:
    """What is not as the recipe has it; nothing where the run did not write that down."""
    recipe = _environment(run).get("recipe")
    changed = recipe.get("changed") if isinstance(recipe, dict) else None
    if not isinstance(recipe, dict) or not isinstance(changed, dict):
        return
    name = recipe.get("name")
    columns = {f"recipe {name}": "recipe", "this run": "run"}
    if not changed:
        yield sentences([f"No setting differs from the recipe {name}."])
    rows = [
        {"setting": key} | {of: "not set" if two.get(k) is None else two[k] for of, k in columns.items()}
        for key, two in changed.items()
        if isinstance(two, dict)
    ]
    yield table(rows)


def _folded(run: Directory, name: str) -> Html:
    data = read(run, name)
    return details(name, data.decode(errors="replace")) if data else Html("")
