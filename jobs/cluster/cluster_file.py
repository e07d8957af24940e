"""cluster.yaml filled in with a plan's nodes. Its text is edited, line by line, so that all comments stay."""

import re
from pathlib import Path

from dinoray.models.errors import ConfigError
from dinoray.pipeline.planning.forecast import Forecast
from dinoray.pipeline.planning.prices import NodeType, PlanSettings

NAME = "cluster.yaml"
_PLACES = (Path(), Path(__file__).parents[2])
"""Where it is looked for: in the folder that the job is run in, then in the checkout."""


def write_cluster_file(out: Path, plan: PlanSettings, forecast: Forecast) -> Path:
    """Write `out` and return the file that it was made from. ConfigError, and nothing written, where that cannot be."""
    if out.exists():
        raise ConfigError(f"--out {out} already exists; remove it, or choose another file")
    found = [place / NAME for place in _PLACES if (place / NAME).is_file()]
    if not found:
        raise ConfigError(
            f"--out {out} is made from {NAME}, which was not found; run this job in a checkout of the project"
        )
    text = fill_in(found[0].read_text(), plan, forecast, what=str(found[0]))
    try:
        out.write_text(text)
    except OSError as error:
        raise ConfigError(f"--out {out}: {error.strerror}; name a file that can be written") from error
    return found[0]


def fill_in(text: str, plan: PlanSettings, forecast: Forecast, *, what: str = NAME) -> str:
    """The text with instance types, most nodes of each type and in all, and, if the plan names one, the zone.

    ConfigError when a line that is to change is not there.
    """
    # A ceiling costs nothing: one CPU node may come even if none is planned, should the forecast be wrong.
    cpu_nodes, gpu_nodes = max(1, forecast.cpu_nodes), forecast.gpu_nodes
    types = {
        "head": (plan.head_node, plan.head, None),
        "augment": (plan.cpu_node, plan.cpu, cpu_nodes),
        "train": (plan.gpu_node, plan.gpu, gpu_nodes),
    }
    text = _line(text, r"max_workers: \d+ .*", f"max_workers: {cpu_nodes + gpu_nodes}  # the ceiling on what the "
                 f"cluster may cost: {cpu_nodes} augment + {gpu_nodes} train nodes", what)  # fmt: skip
    if plan.availability_zone:
        zone = plan.availability_zone
        text = _line(text, r"(  region: )\S+(.*)", rf"\g<1>{zone[:-1]}\g<2>", what)
        text = _line(text, r"(  availability_zone: )\S+(.*)", rf"\g<1>{zone}\g<2>", what)
    for name, (instance, node, most) in types.items():
        start = re.search(rf"^  {name}:$", text, flags=re.MULTILINE)
        if start is None:
            raise ConfigError(f"{what} has no node type {name}; start from the cluster.yaml of the project")
        rest = text[start.end() :]
        end = re.search(r"^ {0,2}\S", rest, flags=re.MULTILINE)
        section, after = (rest[: end.start()], rest[end.start() :]) if end else (rest, "")
        if most is not None:
            section = _line(section, r"(    max_workers: )\d+(.*)", rf"\g<1>{most}\g<2>", f"{what}, {name}")
        if not re.search(rf"^ +InstanceType: {re.escape(instance)}(\s|$)", section, flags=re.MULTILINE):
            new = rf"\g<1>{instance}  # {_described(node)}"
            section = _line(section, r"( +InstanceType: )\S+.*", new, f"{what}, {name}")
        text = text[: start.end()] + section + after
    return text


def _line(text: str, old: str, new: str, what: str) -> str:
    changed, count = re.subn(rf"^{old}$", new, text, flags=re.MULTILINE)
    if count != 1:
        raise ConfigError(
            f"{what} has {count} lines like {old!r}, not one; start from the cluster.yaml of the project"
        )
    return changed


def _described(node: NodeType) -> str:
    gpus = f"{node.gpus} GPU{'s' * (node.gpus > 1)}, " if node.gpus else ""
    return f"{gpus}{node.cpus} CPUs, {node.gbit:g} Gbit/s for hours"
