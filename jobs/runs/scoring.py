"""Evaluating a checkpoint: the probes that its images allow, and the file of scores."""

import contextlib
import json
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dinoray.jobs.cli.config import load_run_config
from dinoray.jobs.cli.main import start_ray
from dinoray.jobs.runs.data_lines import unlabelled_warnings
from dinoray.jobs.runs.neighbours import Images, Where, write_neighbours
from dinoray.jobs.runs.open_checkpoint import open_network, standalone_config
from dinoray.jobs.runs.prober import Prober
from dinoray.models.errors import ConfigError, DinorayError
from dinoray.pipeline.cluster.lost_ray import leave_ray
from dinoray.pipeline.data.listing.folder_labels import AUTO
from dinoray.pipeline.data.manifests.manifest import build_manifest
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.evaluation.backbone_outputs import check_size
from dinoray.pipeline.evaluation.class_names import class_mismatch, overlap_warnings
from dinoray.pipeline.evaluation.config import LABEL_FREE, LABELLED, NEIGHBOURS
from dinoray.pipeline.reporting.run_report import write_report
from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.worker.config import Config
from dinoray.pipeline.worker.inputs import evaluated_images


def _with_own_manifest(config: Config, run: Directory, overrides: Sequence[str]) -> Config:
    """Return the config of a run that began from a file of images, with the run's own copy in its place."""
    if config.data.manifest is None or any(one.startswith("data.manifest=") for one in overrides):
        return config
    data = config.data.model_copy(update={"manifest": run.join(run_dir.MANIFEST)})
    return config.model_copy(update={"data": data})


def score(arguments: Namespace) -> None:
    """Embed, probe, print a summary, and write all scores to the run directory (a lone checkpoint: its folder)."""
    here = Directory(arguments.checkpoint)
    # Of a run the settings come first: where they are missing, it is no run.
    config = None if here.exists(run_dir.META) else load_run_config(here, arguments.overrides)
    opened = open_network(arguments.checkpoint, arguments.step, arguments.which)
    found, network = opened.found, opened.network
    if config is None and found.run is not None and found.run.exists(run_dir.CONFIG):
        config = load_run_config(found.run, arguments.overrides)
    if config is None:
        config = standalone_config(network, {}, arguments.overrides)
    elif found.run is not None and found.run.exists(run_dir.MANIFEST):
        config = _with_own_manifest(config, found.run, arguments.overrides)
    config = config.with_pixels_of(network.config)
    check_size(network, config.eval.image_size or network.config.crops.global_crop_size)
    asked = set(chosen_probes(arguments.probes, labelled=True))
    wants_images = not asked.isdisjoint((*LABEL_FREE, NEIGHBOURS))
    images = (
        Source(config.data, build_manifest(config.data, config.storage), config.storage)
        if wants_images or config.eval.val_path == AUTO
        else None
    )
    sides = None if asked.isdisjoint((*LABELLED, NEIGHBOURS)) else evaluated_images(config, images)
    for line in [*unlabelled_warnings(sides, config.eval), *overlap_warnings(sides, config.eval)]:
        print(f"warning: {line}", flush=True)
    paths = {"train_path": sides[0].config.path, "val_path": sides[1].config.path} if sides else {}
    paths |= {"images_path": config.data.path} if wants_images else {}
    mismatch = class_mismatch(*sides, config.eval) if sides else None
    if mismatch:
        print(f"warning: {mismatch.text}", flush=True)
    scored = None if mismatch and mismatch.is_disjoint else sides
    probes = chosen_probes(arguments.probes, labelled=(sides if arguments.probes else scored) is not None)

    no_training = config.resources.model_copy(update={"train_workers": 1, "cpus_per_train_worker": 0})
    use_gpu, (_, actors) = start_ray(no_training, verbose=arguments.verbose)
    try:
        prober = Prober(config, network, actors=actors, use_gpu=use_gpu)
        labelled = None if set(LABELLED).isdisjoint(probes) else sides
        is_scored = set(probes) != {NEIGHBOURS}
        scores = prober.scores(probes, labelled=labelled, images=images) if is_scored else {}
        page = None
        if NEIGHBOURS in probes:
            compared = _compared(config, scored, images)
            where = Where(actors, use_gpu)
            page = write_neighbours(opened, config, compared, which=arguments.which, where=where)
    finally:
        leave_ray()
    lines = []
    if is_scored:
        result = {"checkpoint": found.name, "which": arguments.which, **paths, **scores}
        file, folder = run_dir.evaluation_name(found.name, arguments.which), found.run or found.folder
        # Scores of other probes stay, unless they are of other images.
        before = json.loads(folder.read(file)) if folder.exists(file) else {}
        kept = before if all(before.get(name, path) == path for name, path in paths.items()) else {}
        folder.write(file, json.dumps(kept | result, indent=1).encode())
        lines = summary(result, where=folder.join(file))
    print("\n".join([*lines, *([] if page is None else [f"page     {page}"])]))
    if is_scored and found.run is not None:
        with contextlib.suppress(DinorayError):  # the scores are written; a page may come later
            write_report(found.run)


def _compared(config: Config, sides: tuple[Source, Source] | None, images: Source | None) -> Images:
    """Return the images of the page about neighbours: those of k-NN, or without labels those of `data.path`."""
    if sides is not None:
        return Images(sides[1], sides[0], config.eval.max_train_images)
    assert images is not None
    return Images(images, images, config.probe.max_images)


def chosen_probes(text: str | None, *, labelled: bool) -> list[str]:
    """The probes that are asked for, or those that the data allows."""
    if text is None:
        return [*(LABELLED if labelled else ()), *LABEL_FREE]
    probes = [probe.strip() for probe in text.split(",")]
    known = (*LABELLED, *LABEL_FREE, NEIGHBOURS)
    for probe in probes:
        if probe not in known:
            raise ConfigError(f"--probes: {probe!r} must be one of {', '.join(known)}")
    if not labelled and set(probes) & set(LABELLED):
        raise ConfigError(
            "eval.val_path is not set, or the images of data.path have no labels; give labelled images, e.g. "
            "eval.val_path=s3://bucket/val eval.train_path=s3://bucket/train, "
            f"or pass --probes {','.join(LABEL_FREE)}"
        )
    return probes


def summary(result: Mapping[str, Any], *, where: str) -> list[str]:
    """At most six lines; the file at `where` has all scores."""
    lines = []
    accuracies = {key: value for key, value in result.items() if key.startswith("knn_")}
    if accuracies:
        best = max(accuracies, key=accuracies.__getitem__)
        guess = f"majority guess {result['majority']:.1%}"
        lines.append(f"k-NN     {accuracies[best]:.1%}  best k={best.removeprefix('knn_')}, {guess}")
    if "by_class" in result:
        lines.append(f"classes  {', '.join(_classes(result))}")
    if "linear" in result:
        lines.append(f"linear   {result['linear']:.1%}  learning rate {result['linear_lr']:g}")
    ranks = [f"{name} {result[name.lower()]:.1f}" for name in ("RankMe", "LiDAR") if name.lower() in result]
    if "feature_std" in result:
        ranks.append(f"feature std {result['feature_std']:.3g} (healthy {result['feature_std_healthy']:.3g})")
    if "intrinsic_dim" in result:
        ranks.append(
            f"cluster learnability {result['cluster_learnability']:.2f}, intrinsic dimension "
            f"{result['intrinsic_dim']:.1f}"
        )
    if ranks:
        lines.append(f"features {', '.join(ranks)}")
    lines.append(f"images   {', '.join(_counts(result))}")
    return [*lines, f"scores   {where}"]


def _classes(result: Mapping[str, Any]) -> Iterator[str]:
    """What the k-NN line averages: classes that are alike in weight, the worst, the most confused; and retrieval."""
    yield f"balanced accuracy {result['balanced_accuracy']:.1%}"
    worst = result["by_class"][0]
    yield f"lowest recall {worst['recall']:.1%} ({worst['class']})"
    for pair in result["confusions"][:1]:
        yield f"{pair['images']} of {pair['class']} taken for {pair['taken_for']}"
    if "retrieval_map" in result:
        yield f"retrieval mAP {result['retrieval_map']:.1%}"


def _counts(result: Mapping[str, Any]) -> Iterator[str]:
    for key, what in (
        ("num_train", "training"),
        ("num_val", "validation"),
        ("num_unreadable", "unreadable"),
        ("num_classes", "classes"),
        ("num_images", "label-free"),
        ("num_images_unreadable", "unreadable label-free"),
        ("lidar_images", "for LiDAR"),
    ):
        if result.get(key):
            yield f"{result[key]:,} {what}"
