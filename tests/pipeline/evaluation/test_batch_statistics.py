"""Batch norm of a new network is calibrated before its first evaluation; training stays as it is."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import eval_config, labelled_source, on_two_ranks
from rich.console import Console
from tiny import TINY_RESNET, Batch, tiny_batch, tiny_config
from torch import Tensor, nn

from dinoray.jobs.cli.display import Display
from dinoray.jobs.runs.result import describe_result, write_result
from dinoray.pipeline.augment.multicrop import crop_rng, multi_crop
from dinoray.pipeline.data.decoding.decode import decode
from dinoray.pipeline.data.demo_images import draw_demo_image
from dinoray.pipeline.data.manifests.manifest import DataConfig, build_manifest
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.evaluation.batch_statistics import calibrated
from dinoray.pipeline.evaluation.config import ProbeConfig
from dinoray.pipeline.evaluation.features import embed_source
from dinoray.pipeline.evaluation.in_training import evaluate
from dinoray.pipeline.reporting.run_report import build_report
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.training.config import DINOConfig
from dinoray.pipeline.training.ddp import distribute
from dinoray.pipeline.training.state import TrainState, build_state
from dinoray.pipeline.training.step import train_step

LABELS = ("checks", "dots", "rings", "stripes")


def images_in(folder: Path, split: str, *, per_label: int) -> Source:
    for label in LABELS:
        (folder / split / label).mkdir(parents=True)
        for i in range(per_label):
            (folder / split / label / f"{i}.jpg").write_bytes(draw_demo_image(label, split, i))
    config = DataConfig(path=str(folder / split), label_from_parent=True)
    return Source(config, build_manifest(config))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return images_in(tmp_path_factory.mktemp("images"), "train", per_label=12)


def resnet_state(**train: Any) -> TrainState:
    """A new tiny ResNet in training mode, two crops of 32 px, batches of 8 images."""
    config = tiny_config(
        backbone=TINY_RESNET,
        crops={"global_crop_size": 32, "num_local_crops": 0},
        train={"global_batch_size": 8, **train},
        optim={"base_lr": 1e-12},
    )
    return build_state(config, num_images=48)


def norms(network: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {name: m for name, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}


def statistics(network: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in network.named_buffers()}


def batches(source: Source, config: DINOConfig, *, num_steps: int) -> Iterator[Batch]:
    """The crops of training: each epoch in another order."""
    fetched = source.fetch(range(source.num_images))
    pictures = [(one.key, decode(one.data, max_pixels=10**6)) for one in fetched if one.data]
    per_epoch = len(pictures) // config.train.global_batch_size
    for step in range(num_steps):
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng(epoch).permutation(len(pictures))
        rows = order[place * config.train.global_batch_size :][: config.train.global_batch_size]
        crops = [
            multi_crop(pictures[i][1], crop_rng(config.train.seed, epoch, pictures[i][0]), config.crops)
            for i in rows
        ]
        yield {
            "global_crops": np.stack([one.global_crops for one in crops]),
            "local_crops": np.stack([one.local_crops for one in crops]),
        }


def look(state: TrainState, images: Source, **labelled: Any) -> dict[str, float]:
    """Evaluate the teacher as a run does."""
    found = evaluate(
        state.dino.teacher.backbone,
        labelled.get("sides"),
        images,
        [],
        title="",
        algorithm=state.config,
        config=eval_config(),
        probe=ProbeConfig(),
    )
    assert found is not None
    return found.scores


def test_without_learning_the_features_before_training_are_those_after(images: Source) -> None:
    state = resnet_state()
    new = state.dino.teacher.backbone

    def features(backbone: nn.Module) -> np.ndarray:
        indices = np.arange(images.num_images)
        rows = embed_source(
            backbone.eval(), images, indices, state.config.crops, eval_config(), precision="fp32"
        )
        return rows.features / np.linalg.norm(rows.features, axis=1, keepdims=True)

    before, num_images = calibrated(new, images, state.config)
    assert num_images == 48
    wrong = features(new)
    new.train()
    for batch in batches(images, state.config, num_steps=100):
        train_step(state, batch)
    after = features(state.dino.teacher.backbone)

    def distance(a: np.ndarray) -> float:
        return float(np.linalg.norm(a - after, axis=1).mean())

    # The running means of training are those of its last batches, so some noise is left.
    assert distance(wrong) > 1
    assert distance(features(before)) < distance(wrong) / 3


def test_an_evaluation_leaves_network_and_training_bit_for_bit_as_they_are(images: Source) -> None:
    state, twin = resnet_state(), resnet_state()
    twin.optimizer.param_groups[0]["lr"] = state.optimizer.param_groups[0]["lr"] = 1e-3
    assert look(state, images)["calibration_images"] == 48
    for batch in batches(images, state.config, num_steps=3):
        assert train_step(state, batch) == train_step(twin, batch)
    ours, theirs = state.dino.state_dict(), twin.dino.state_dict()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_the_same_images_give_the_same_statistics(images: Source) -> None:
    first, second = (resnet_state() for _ in range(2))
    torch.rand(3)
    a, b = (
        statistics(calibrated(state.dino.teacher.backbone, images, state.config)[0])
        for state in (first, second)
    )
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_statistics_are_the_mean_over_batches_of_all_global_crops(images: Source) -> None:
    state = resnet_state()
    stem = next(iter(norms(state.dino.teacher.backbone)))
    seen: list[Tensor] = []
    teacher = state.dino.teacher.backbone
    hook = norms(teacher)[stem].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    found, _ = calibrated(teacher, images, state.config)
    hook.remove()
    assert [len(x) for x in seen] == [16] * 6  # 8 images by 2 global crops
    expected = torch.stack([x.mean(dim=(0, 2, 3)) for x in seen]).mean(0)
    torch.testing.assert_close(norms(found)[stem].running_mean, expected)
    expected = torch.stack([x.var(dim=(0, 2, 3)) for x in seen]).mean(0)
    torch.testing.assert_close(norms(found)[stem].running_var, expected)


def test_trained_statistics_stay(images: Source) -> None:
    state = resnet_state()
    train_step(state, tiny_batch(state.config, num_images=8))
    backbone = state.dino.teacher.backbone
    assert calibrated(backbone, images, state.config) == (backbone, 0)
    assert "calibration_images" not in look(state, images)


def test_of_some_trained_layers_only_the_others_are_calibrated(images: Source) -> None:
    state = resnet_state()
    backbone = state.dino.teacher.backbone
    trained, *others = norms(backbone)
    norms(backbone)[trained].running_mean.fill_(0.5)  # type: ignore[union-attr]
    found, num_images = calibrated(backbone, images, state.config)
    assert num_images == 48
    assert norms(found)[trained].running_mean.eq(0.5).all()  # type: ignore[union-attr, operator]
    for name in others:
        assert norms(found)[name].running_mean.any()  # type: ignore[union-attr]


def test_a_network_without_batch_norm_is_not_touched(images: Source) -> None:
    state = build_state(tiny_config(), num_images=48)
    backbone = state.dino.teacher.backbone
    assert calibrated(backbone, images, state.config)[0] is backbone


@pytest.mark.parametrize(("num_bad", "used"), [(1, 47), (12, 36), (48, 0)])
def test_unreadable_images_are_left_out(tmp_path: Path, num_bad: int, used: int) -> None:
    source = images_in(tmp_path, "train", per_label=12)
    for path in sorted(tmp_path.glob("train/*/*.jpg"))[:num_bad]:
        path.write_bytes(b"no picture")
    state = resnet_state()
    found, num_images = calibrated(state.dino.teacher.backbone, source, state.config)
    assert num_images == used
    assert all(torch.isfinite(buffer).all() for buffer in statistics(found).values())


def test_fewer_images_than_a_batch_are_one_batch(images: Source) -> None:
    state = resnet_state(global_batch_size=64)
    found, num_images = calibrated(state.dino.teacher.backbone, images, state.config)
    assert num_images == 48
    assert next(iter(norms(found).values())).num_batches_tracked == 1


def work(rank: int, source: Source, few: Source) -> list[dict[str, Tensor]]:
    found = []
    for images, accumulate_steps in ((source, 1), (source, 2), (few, 1)):
        state = resnet_state(accumulate_steps=accumulate_steps)
        distribute(state.dino, torch.device("cpu"))
        found.append(statistics(calibrated(state.dino.teacher.backbone, images, state.config)[0]))
    return found


def test_two_workers_calibrate_as_one(images: Source, tmp_path: Path) -> None:
    few = labelled_source(tmp_path / "few")
    ranks = on_two_ranks(work, images, few)
    for number, (source, accumulate_steps) in enumerate(((images, 1), (images, 2), (few, 1))):
        state = resnet_state(accumulate_steps=accumulate_steps)
        alone = statistics(calibrated(state.dino.teacher.backbone, source, state.config)[0])
        first, second = (found[number] for found in ranks)
        assert first.keys() == second.keys() == alone.keys()
        for name, expected in alone.items():
            assert torch.equal(first[name], second[name])
            torch.testing.assert_close(first[name], expected, rtol=1e-4, atol=1e-6)


def test_the_evaluation_says_that_it_calibrated(images: Source, capsys: pytest.CaptureFixture[str]) -> None:
    scores = look(resnet_state(), images, sides=(images, images))
    Display(Console(width=200)).eval({"step": 0, **scores})
    output = capsys.readouterr().out
    assert "evaluation after step 0: knn_1 " in output
    assert "batch norm calibrated on 48 training images, without learning" in output


def test_result_and_report_say_that_the_scores_before_training_are_calibrated(tmp_path: Path) -> None:
    run = Directory(str(tmp_path))
    step = {"step": 1, "loss": 1.0, "verdict": "healthy", "skipped_steps": 0, "bad_images": 0}
    before = {"step": 0, "knn_20": 0.4, "majority": 0.1, "calibration_images": 512}
    lines = [before, step, {"step": 1, "knn_20": 0.5, "majority": 0.1}]
    run.write("metrics.jsonl", "\n".join(json.dumps(line) for line in lines).encode())
    write_result(run)
    assert (
        "  before training   40.0%  (batch norm calibrated on 512 training images, without learning)\n"
        "  after 1 steps     50.0%\n"
    ) in describe_result(run)
    assert "best checkpoint" not in describe_result(run)  # there is none
    assert "initially 40.0%, with calibrated batch norm, majority guess 10.0%" in build_report(run)
