"""The evaluation job: each score is the one that the same probe gives without Ray."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from ray_head import RayHead
from tiny_run import NAME, STEP, write_images, write_run

from dinoray.jobs import evaluate
from dinoray.jobs.cli.config import load_run_config
from dinoray.jobs.runs.prober import sharded_knn
from dinoray.jobs.runs.scoring import chosen_probes
from dinoray.models.errors import ConfigError
from dinoray.pipeline.data.manifests.manifest import build_manifest
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.evaluation.backbone_outputs import embed_views, with_blocks
from dinoray.pipeline.evaluation.config import EvalConfig
from dinoray.pipeline.evaluation.features import Features, embed_source
from dinoray.pipeline.evaluation.knn import KnnProblem, class_numbers, detailed_scores, knn_accuracy
from dinoray.pipeline.evaluation.labels import labelled_sources, subset
from dinoray.pipeline.evaluation.probes import collapsed_dims, feature_std, lidar, linear_probe, rankme
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.training.checkpoint import FrozenBackbone, read_frozen
from dinoray.pipeline.worker.config import Config

LABELS = ("dots", "rings", "stripes")
SETTINGS = [
    "eval.k=[1, 5]",
    "eval.batch_size=8",
    "eval.max_train_images=20",
    "probe.max_images=15",
    "probe.lidar_images=6",
    "probe.lidar_views=3",
    "probe.linear_epochs=5",
    "probe.linear_lrs=[0.01, 1]",
    "probe.linear_mean_patches=true",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on labelled images, one of them unreadable, one without a label."""
    folder = tmp_path_factory.mktemp("evaluate")
    train = write_images(folder / "train", "train", labels=LABELS, per_label=8)
    (train / "rings" / "03.jpg").write_bytes(b"no picture")
    val = write_images(folder / "val", "val", labels=LABELS, per_label=4)
    shutil.copy(val / "dots" / "00.jpg", val / "stray.jpg")
    return write_run(folder / "run", f"data.path={train}", f"eval.val_path={val}", *SETTINGS)


def frozen(run: Path, which: str = "teacher") -> tuple[Config, FrozenBackbone]:
    return load_run_config(Directory(str(run))), read_frozen(run / "checkpoints" / NAME, which)  # type: ignore[arg-type]


def embedded(config: Config, network: FrozenBackbone, source: Source, limit: int, **how) -> Features:
    indices = subset(source.num_images, limit)
    crops = network.config.crops
    return embed_source(network.backbone(), source, indices, crops, config.eval, precision="fp32", **how)


def close_to(found: dict, expected: dict) -> None:
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-3), key


@pytest.mark.ray
def test_every_score_is_that_of_the_probe_without_ray(run: Path, run_here: Callable[..., str]) -> None:
    output = run_here("jobs.evaluate", str(run))
    found = json.loads((run / f"evaluation_{NAME}.json").read_text())
    config, network = frozen(run)
    sources = labelled_sources(config.data, config.eval)
    assert sources is not None

    sides = [
        embedded(config, network, source, limit) for source, limit in zip(sources, (20, 99), strict=True)
    ]
    assert (found["num_train"], found["num_val"], found["num_unreadable"]) == (19, 12, 1)
    scores = knn_accuracy(sides[0], sides[1], config.eval)
    assert {k: found[k] for k in scores} == scores

    blocks = partial(with_blocks, num_blocks=4, mean_patches=True)
    rows = [
        embedded(config, network, source, limit, forward=blocks).features[:, 32:]
        for source, limit in zip(sources, (20, 99), strict=True)
    ]
    classes = class_numbers(sides[0], sides[1])
    labels = [torch.tensor([classes[x] for x in side.labels]) for side in sides]
    linear = linear_probe(rows[0], labels[0], rows[1], labels[1], num_classes=3, config=config.probe)
    assert found["linear_dim"] == rows[0].shape[1] == 3 * 32  # two blocks and the mean patch
    assert [row["val"] for row in found["linear_table"]] == list(linear.val)
    assert (found["linear"], found["linear_lr"]) == (linear.val[linear.best], linear.lrs[linear.best])

    images = Source(config.data, build_manifest(config.data))
    features = embedded(config, network, images, 15, labelled=False).features
    close_to(
        found,
        {
            "num_images": len(features),
            "rankme": rankme(features),
            "feature_std": feature_std(features),
            "feature_std_healthy": 32**-0.5,
            "collapsed_dims": collapsed_dims(features),
        },
    )
    views = embed_views(
        network.backbone(),
        images,
        subset(images.num_images, 6).tolist(),
        network.config.crops,
        num_views=3,
        seed=0,
        batch_size=8,
        precision="fp32",
    )
    close_to(found, {"lidar": lidar(views), "lidar_images": len(views), "lidar_views": 3})
    lines = output.splitlines()[-6:]
    best = max(found["knn_1"], found["knn_5"])
    assert re.match(rf"k-NN     {best:.1%}  best k=[15], majority guess {found['majority']:.1%}$", lines[0])
    worst = found["by_class"][0]
    assert lines[1].startswith(
        f"classes  balanced accuracy {found['balanced_accuracy']:.1%}, lowest recall {worst['recall']:.1%} "
        f"({worst['class']})"
    )
    assert lines[1].endswith(f"retrieval mAP {found['retrieval_map']:.1%}")
    lines = [lines[0], *lines[2:]]
    assert lines[1] == f"linear   {found['linear']:.1%}  learning rate {found['linear_lr']:g}"
    assert lines[2].startswith(
        f"features RankMe {found['rankme']:.1f}, LiDAR {found['lidar']:.1f}, feature std "
    )
    assert lines[3].startswith("images   19 training, 12 validation, 1 unreadable, 3 classes, ")
    assert lines[4] == f"scores   {run}/evaluation_{NAME}.json"
    assert "learning rates" not in output
    (warning,) = [line for line in output.splitlines() if line.startswith("warning: ")]
    val = config.eval.val_path
    assert warning.startswith(f"warning: 1 image at {val} without a label: not evaluated; move")


@pytest.mark.ray
def test_disjoint_classes_are_named_and_not_scored(
    run: Path, tmp_path: Path, run_here: Callable[..., str]
) -> None:
    val = tmp_path / "val"
    shutil.copytree(run.parent / "val" / "dots", val / "n01440764")
    checkpoint = shutil.copytree(run, tmp_path / "run")
    of_other_images = {"val_path": str(run.parent / "val"), "knn_5": 0.9, "linear": 0.9}
    (checkpoint / f"evaluation_{NAME}.json").write_text(json.dumps(of_other_images))
    output = run_here("jobs.evaluate", str(checkpoint), f"eval.val_path={val}")
    (first,) = [line for line in output.splitlines() if line.startswith("warning: ")]
    assert first.startswith(
        "warning: k-NN and linear accuracy have no meaning, because the classes are disjoint"
    )
    assert "has 1 class ('n01440764')" in first
    assert "has 3 classes ('dots', 'rings', 'stripes')" in first
    assert [line.split()[0] for line in output.splitlines()[-3:]] == ["features", "images", "scores"]
    found = json.loads((checkpoint / f"evaluation_{NAME}.json").read_text())
    assert "rankme" in found
    assert "knn_5" not in found
    assert "linear" not in found
    assert found["val_path"] == str(val)


@pytest.mark.ray
def test_a_lone_checkpoint_is_evaluated_where_the_overrides_say(
    run: Path, tmp_path: Path, run_here: Callable[..., str]
) -> None:
    lone = shutil.copytree(run / "checkpoints" / NAME, tmp_path / "best model")
    arguments = [str(lone), f"data.path={run.parent / 'val'}", "--which", "student", "--probes", "std,rankme"]
    file = lone / "evaluation_best model_student.json"
    file.write_text(json.dumps({"images_path": str(run.parent / "val"), "knn_5": 0.9}))
    run_here("jobs.evaluate", *arguments)
    found = json.loads(file.read_text())
    assert found["knn_5"] == 0.9, "a score of other probes is kept"
    config, network = frozen(run, "student")
    at = config.data.model_copy(update={"path": str(run.parent / "val")})
    features = embedded(config, network, Source(at, build_manifest(at)), 99, labelled=False).features
    assert found["which"] == "student"
    assert "lidar" not in found
    close_to(found, {"num_images": 13, "rankme": rankme(features)})
    teacher = embedded(config, frozen(run)[1], Source(at, build_manifest(at)), 99, labelled=False).features
    assert rankme(teacher) != pytest.approx(found["rankme"], rel=1e-2)


@pytest.fixture
def on_cluster(cluster: RayHead) -> Iterator[None]:
    ray.init(address=cluster.gcs, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


@pytest.mark.ray
@pytest.mark.usefixtures("on_cluster")
def test_votes_counted_by_tasks_are_those_counted_here() -> None:
    rng = np.random.default_rng(0)
    train, val = (
        Features(rng.normal(size=(n, 8)).astype(np.float32), [str(x) for x in rng.integers(0, 5, n)], 0)
        for n in (500, 3000)
    )
    config = EvalConfig(k=(1, 10, 20))
    problem = KnnProblem.of(train, val, config)
    assert len(problem.blocks) == 3
    found = detailed_scores(problem, sharded_knn(problem), class_numbers(train, val))
    wanted = knn_accuracy(train, val, config)
    assert {name: found[name] for name in wanted} == wanted


# What is refused before anything starts


def refused(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        evaluate.main(arguments)
    return str(caught.value)


def test_classifying_without_labelled_images_says_what_to_set(run: Path) -> None:
    message = refused(str(run), "eval.val_path=null", "--probes=rankme,knn")
    assert "eval.val_path is not set" in message
    assert "--probes rankme,clid,lidar,std" in message


def test_without_labelled_images_what_needs_no_labels_is_left() -> None:
    assert chosen_probes(None, labelled=False) == ["rankme", "clid", "lidar", "std"]
    assert chosen_probes(None, labelled=True) == ["knn", "linear", "rankme", "clid", "lidar", "std"]
    assert chosen_probes("std, knn", labelled=True) == ["std", "knn"]


def test_an_unknown_probe_is_named(run: Path) -> None:
    assert "'knnn' must be one of knn, linear" in refused(str(run), "--probes=knnn")


def test_a_lone_checkpoint_without_data_says_what_to_set(run: Path, tmp_path: Path) -> None:
    lone = shutil.copytree(run / "checkpoints" / NAME, tmp_path / NAME)
    assert "data.path: must be set, e.g. data.path=s3://bucket/train" in refused(str(lone))


def test_another_step_than_that_of_the_folder_is_refused(run: Path) -> None:
    checkpoint = str(run / "checkpoints" / NAME)
    assert f"is {NAME}; leave --step out" in refused(checkpoint, f"--step={STEP + 1}")
    assert "is not among" in refused(str(run), f"--step={STEP + 1}")


def test_images_of_a_size_that_the_network_cannot_take_are_refused(run: Path) -> None:
    assert "cannot take images of 33 px" in refused(str(run), "eval.image_size=33")
