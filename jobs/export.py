"""Give a checkpoint to others: `python -m jobs.export RUN [--step N] [--format timm|state_dict|onnx|official]`.

One file per format, and one JSON card beside them that says what they hold; each file has been loaded back and
compared before it is written. Runs in one process, without Ray.
"""

import json
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from jobs.arguments import CommandLine
from jobs.config import load_run_config
from jobs.entry import run_main
from models.settings import ConfigError, DinorayError
from pipeline.checkpoint import (
    Frozen,
    checkpoint_name,
    download_checkpoint,
    find_checkpoint,
    read_frozen,
    read_meta,
)
from pipeline.export import (
    export_official,
    export_state_dict,
    export_timm,
    knn_scores,
    model_card,
    timm_arguments,
)
from pipeline.onnx_export import export_onnx
from pipeline.storage import Directory, MissingObject, is_s3

FORMATS = ("timm", "state_dict", "onnx", "official")


class Exported(NamedTuple):
    """One file: its name, its bytes, the line that loads it, and what the card says of it besides."""

    name: str
    data: bytes
    load: str
    facts: dict[str, Any]


def main(argv: Sequence[str]) -> None:
    """Read one checkpoint, make the files, write them and the card, print how they are loaded."""
    parser = CommandLine(
        prog="python -m jobs.export", description="Files of a checkpoint for other programs."
    )
    parser.add_argument("run", help="run directory or checkpoint folder, local or s3://")
    parser.add_argument("--step", type=int, default=None, help="which checkpoint (default: the newest)")
    parser.add_argument("--which", choices=("teacher", "student"), default="teacher", help="which network")
    parser.add_argument(
        "--format", choices=FORMATS, action="append", help="which file, may be repeated (default: timm)"
    )
    parser.add_argument("--out", default=None, help="folder or s3:// prefix (default: RUN/export)")
    arguments = parser.parse_args(argv)

    found = find_checkpoint(arguments.run, arguments.step)
    if found.run is None and arguments.out is None:
        raise ConfigError(
            f"{found.folder.uri} is a checkpoint without its run; say with --out where files go"
        )
    out = Directory(arguments.out) if arguments.out or found.run is None else found.run.child("export")
    with tempfile.TemporaryDirectory(prefix="dinoray-export-") as scratch:
        folder = download_checkpoint(found.folder, Path(scratch))
        frozen, meta = read_frozen(folder, arguments.which), read_meta(folder)
        if arguments.step not in (None, meta["step"]):
            raise ConfigError(
                f"--step {arguments.step}, but {found.folder.uri} is of step {meta['step']}; leave --step out"
            )
        stem = checkpoint_name(meta["step"])
        files = {
            form: _export(form, frozen, folder, f"{arguments.which}_{stem}", f"official_{stem}")
            for form in dict.fromkeys(arguments.format or ["timm"])
        }
    card = model_card(
        frozen,
        meta,
        which=arguments.which,
        version=_version(),
        data_path=_data_path(found.run),
        knn=None if found.run is None else knn_scores(found.run, meta["step"]),
    )
    name = f"{arguments.which}_{stem}.json"
    card["files"] = _files_before(out, name) | {
        form: {"file": file.name, "load": file.load, **file.facts} for form, file in files.items()
    }
    for file in files.values():
        out.write(file.name, file.data)
        address = out.join(file.name)
        load = file.load if is_s3(address) else file.load.replace(file.name, address)
        print(f"{address}  ({len(file.data) / 1e6:.1f} MB)\n    {load}")
    out.write(name, json.dumps(card, indent=1).encode())
    print(out.join(name))


def _export(form: str, frozen: Frozen, folder: Path, stem: str, official: str) -> Exported:
    create = [f'"{frozen.config.backbone.name}"', "num_classes=0"]
    create += [f"{k}={v!r}" for k, v in timm_arguments(frozen).items()]
    if form == "timm":
        name = f"{stem}.safetensors"
        create.insert(1, f'checkpoint_path="{name}"')
        return Exported(name, export_timm(frozen), f"timm.create_model({', '.join(create)})", {})
    if form == "state_dict":
        name = f"{stem}.pth"
        load = f'model = timm.create_model({", ".join(create)}); model.load_state_dict(torch.load("{name}"))'
        return Exported(name, export_state_dict(frozen), load, {})
    if form == "official":
        name = f"{official}.pth"
        load = f"cp {name} OUTPUT/checkpoint.pth && python main_dino.py --output_dir OUTPUT ...  # resumes it"
        return Exported(name, export_official(folder), load, {})
    name = f"{stem}.onnx"
    onnx = export_onnx(frozen)
    facts = {"max_deviation": onnx.deviation, "checked_sizes": onnx.sizes, "multiple_of": onnx.multiple_of}
    return Exported(name, onnx.data, f'onnxruntime.InferenceSession("{name}")', facts)


def _files_before(out: Directory, name: str) -> dict[str, Any]:
    """What the card of an earlier export of the same network and step says of its files."""
    try:
        return dict(json.loads(out.read(name)).get("files", {}))
    except (MissingObject, ValueError, TypeError, AttributeError):
        return {}


def _data_path(run: Directory | None) -> str | None:
    """Where the images of the run were; None where its config is gone or of another version."""
    try:
        return None if run is None else load_run_config(run).data.path
    except DinorayError:
        return None


def _version() -> str:
    try:
        return version("dinoray")
    except PackageNotFoundError:
        return "source"


if __name__ == "__main__":
    run_main(main)
