"""Exporting a checkpoint: the files of each format, and the card that says what they are."""

import json
import re
import shlex
import tempfile
from argparse import Namespace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import timm

from dinoray.jobs.cli.config import load_run_config
from dinoray.jobs.runs.open_checkpoint import best_or_newest, number_of
from dinoray.models.errors import ConfigError, DinorayError
from dinoray.models.settings import flatten
from dinoray.pipeline.export.loading_code import FILES, create_model, quoted
from dinoray.pipeline.export.model_card import RunFacts, model_card, read_scores
from dinoray.pipeline.export.onnx_export import export_onnx
from dinoray.pipeline.export.onnx_preprocessing import export_onnx_preprocessing
from dinoray.pipeline.export.readme_card import position_note, readme
from dinoray.pipeline.export.timm_export import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    evaluation_size,
    export_timm,
    largest_deviation,
    other_sizes,
    timm_arguments,
)
from dinoray.pipeline.export.transformers_export import export_transformers
from dinoray.pipeline.export.weights import export_official, export_state_dict
from dinoray.pipeline.storage.files import Directory, MissingObject, is_s3
from dinoray.pipeline.storage.run_dir import CONFIG, checkpoint_name
from dinoray.pipeline.tracking.records import read_mapping, read_records
from dinoray.pipeline.tracking.scores import best_checkpoint
from dinoray.pipeline.tracking.start import against_start, best_gain
from dinoray.pipeline.training.checkpoint import (
    FrozenBackbone,
    download_checkpoint,
    find_checkpoint,
    read_frozen,
    read_meta,
)


class Exported(NamedTuple):
    """One export: the name of its folder, the files in it, and what the card says of this format alone."""

    folder: str
    files: dict[str, bytes]
    facts: dict[str, Any]


def export(arguments: Namespace) -> None:
    """Read one checkpoint, make the files, write them and their cards, print how they are loaded."""
    license_id = _license_id(arguments.license)

    step, chosen = number_of(arguments.step, arguments.run), ""
    if arguments.step is None:
        step, chosen = best_or_newest(arguments.run)
    if chosen:
        print(f"exporting {chosen}")
        if line := beside_start(Directory(arguments.run)):
            print(line)
    found = find_checkpoint(arguments.run, step)
    if found.run is None and arguments.out is None:
        raise ConfigError(f"{found.folder.uri} is a checkpoint outside a run directory; pass --out FOLDER")
    out = Directory(arguments.out) if arguments.out or found.run is None else found.run.child("export")
    with tempfile.TemporaryDirectory(prefix="dinoray-export-") as scratch:
        folder, at = download_checkpoint(found.folder, Path(scratch)), found.folder.uri
        frozen, meta = read_frozen(folder, arguments.which, address=at), read_meta(folder, address=at)
        if step not in (None, meta["step"]):
            raise ConfigError(
                f"--step {step}, but {found.folder.uri} is of step {meta['step']}; leave --step out"
            )
        name = f"{arguments.which}_{checkpoint_name(meta['step'])}"
        run = _run_facts(found.run)
        exports = {
            form: _export(
                form, frozen, folder, at, name=name, image_size=run.image_size, license_id=license_id
            )
            for form in dict.fromkeys(arguments.format or ["timm"])
        }
    card = model_card(
        frozen,
        meta,
        which=arguments.which,
        version=_version(),
        run=run,
        scores={} if found.run is None else read_scores(found.run, meta["step"], arguments.which),
        license_id=license_id,
    )
    card["files"] = _files_before(out, f"{name}.json") | {
        form: {"file": f"{export.folder}/{FILES[form]}", **export.facts} for form, export in exports.items()
    }
    for form, export in exports.items():
        address = out.child(export.folder)
        lines = _loading_lines(card, form, address.uri, export.folder)
        card["files"][form]["load"] = _loading_lines(card, form, export.folder, export.folder)[-1]
        for file, data in {**export.files, "README.md": readme(card, form).encode()}.items():
            address.write(file, data)
        print(f"{address.uri}  ({sum(map(len, export.files.values())) / 1e6:.1f} MB)")
        print("\n".join(f"    {line}" for line in lines))
    out.write(f"{name}.json", json.dumps(card, indent=1).encode())
    print(f"facts: {out.join(name)}.json; model card: README.md in each folder")
    if license_id == "unknown":
        print("licence: unknown; choose one with --license, e.g. --license apache-2.0")


def beside_start(run: Directory) -> str:
    """Return a line on the best checkpoint of a run beside its start; empty if the two cannot be compared.

    Raises ConfigError if the run started from trained weights that are better than all its checkpoints.
    """
    records = read_records(run)
    best = best_checkpoint(run, records)
    gain, words = best_gain(records.lines, best), against_start(records.lines, best)
    config = dict(flatten(read_mapping(run, CONFIG)))
    weights = config.get("init.from") or config.get("init.path")  # as earlier versions wrote
    weights = weights or (config.get("backbone.pretrained") and config.get("backbone.name"))
    if weights and gain is not None and gain.difference < 0 and gain.is_beyond_noise:
        raise ConfigError(
            f"{run.uri}: {words}. Take the weights that it started from, {weights}; or pass --step {gain.step} to "
            "export the best checkpoint all the same"
        )
    return words


def _export(
    form: str,
    frozen: FrozenBackbone,
    folder: Path,
    address: str,
    *,
    name: str,
    image_size: int | None,
    license_id: str,
) -> Exported:
    file = FILES[form]
    facts: dict[str, Any]
    if form == "timm":
        folder_of_timm = export_timm(frozen, image_size=image_size, license_id=license_id)
        files = {CONFIG_FILE: folder_of_timm.config, WEIGHTS_FILE: folder_of_timm.weights}
        return Exported(f"{name}_timm", files, {"deviations": folder_of_timm.deviations})
    if form == "state_dict":
        facts = {"deviations": _deviations_in_timm(frozen, image_size)}
        return Exported(f"{name}_state_dict", {file: export_state_dict(frozen)}, facts)
    if form == "official":
        step = name.partition("_")[2]
        facts = {"deviations": _deviations_in_timm(frozen, image_size)}
        return Exported(f"official_{step}", {file: export_official(folder, address=address)}, facts)
    if form == "transformers":
        made = export_transformers(frozen, image_size=image_size)
        facts = {"model": made.model, "features": made.features, "max_deviation": made.deviation}
        return Exported(f"{name}_transformers", made.files, {**facts, "deviations": made.deviations})
    if form == "onnx_preprocessing":
        whole = export_onnx_preprocessing(frozen, image_size=image_size)
        facts = {"max_deviation": whole.deviation, "checked_sizes": whole.sizes}
        return Exported(f"{name}_onnx_preprocessing", {file: whole.data}, facts)
    onnx = export_onnx(frozen)
    facts = {"max_deviation": onnx.deviation, "checked_sizes": onnx.sizes, "multiple_of": onnx.multiple_of}
    return Exported(f"{name}_onnx", {file: onnx.data}, facts)


def _deviations_in_timm(frozen: FrozenBackbone, image_size: int | None) -> dict[int, float]:
    """How far features are off where timm's own network uses the weights; empty where they are the same."""
    size = evaluation_size(frozen, image_size)
    others = other_sizes(frozen, size)
    if not others:
        return {}
    model = timm.create_model(frozen.config.backbone.name, num_classes=0, **timm_arguments(frozen))
    model.load_state_dict(frozen.weights)
    return largest_deviation(frozen, model.eval(), [size, *others])


def _loading_lines(card: dict[str, Any], form: str, address: str, folder: str) -> list[str]:
    """Lines for a person that load the export at `address`; the last one loads it from a local folder."""
    local, lines = address, []
    if is_s3(address):
        local = folder
        lines.append(f"aws s3 cp --recursive {shlex.quote(address)} {shlex.quote(folder)}")
    file = f"{local}/{FILES[form]}"
    note = position_note(card, form)
    load = {
        "timm": f"timm.create_model({quoted(f'local-dir:{local}')}, pretrained=True)",
        "state_dict": f"model = {create_model(card)}; model.load_state_dict(torch.load({quoted(file)}))",
        "transformers": f"transformers.AutoModel.from_pretrained({quoted(local)})",
        "onnx": (session := f"onnxruntime.InferenceSession({quoted(file)})"),
        "onnx_preprocessing": session,
        "official": f"cp {shlex.quote(file)} OUTPUT/checkpoint.pth && python main_dino.py --output_dir OUTPUT ...",
    }[form]
    return [*lines, f"{load}  # {note}" if note else load]


def _license_id(text: str) -> str:
    """`text` as an identifier of Hugging Face's hub."""
    if re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", text.lower()) is None:
        raise ConfigError(
            f"--license {text!r} is not the identifier of a licence; use one of "
            "https://huggingface.co/docs/hub/repositories-licenses, e.g. apache-2.0, or other"
        )
    return text.lower()


def _files_before(out: Directory, name: str) -> dict[str, Any]:
    """What the card of an earlier export of the same network and step says of its files."""
    try:
        return dict(json.loads(out.read(name)).get("files", {}))
    except (MissingObject, ValueError, TypeError, AttributeError):
        return {}


def _run_facts(run: Directory | None) -> RunFacts:
    """What the run's config tells; nothing where it is gone or of another version."""
    try:
        if run is None:
            return RunFacts()
        config = load_run_config(run)
    except DinorayError:
        return RunFacts()
    return RunFacts(
        name=config.name,
        recipe=config.recipe,
        data_path=config.data.path,
        image_size=config.eval.image_size,
        init_path=config.init.path,
        init_load=config.init.load,
    )


def _version() -> str:
    try:
        return version("dinoray")
    except PackageNotFoundError:
        return "source"
