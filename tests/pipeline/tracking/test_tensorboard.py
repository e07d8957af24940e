"""What TensorBoard shows of a run: numbers, pictures and embeddings, each once however often it is continued."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from PIL import Image
from run_logs import BLUE, RED, embedding, lines, log_of, log_steps, png_of
from servers import S3Server
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig
from tensorboard.summary.writer import event_file_writer
from torch.utils.tensorboard import SummaryWriter

from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.tracking import tensorboard
from dinoray.pipeline.tracking.projector import CONFIG
from dinoray.pipeline.tracking.prometheus import GAUGES
from dinoray.pipeline.tracking.run_log import MetricsLog
from dinoray.pipeline.tracking.scalar_names import GROUPS, group_of


@pytest.fixture(autouse=True)
def _files_are_numbered_from_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that one process begins in one second are read in the order of their names, in which 10 is before 9."""
    counter = event_file_writer.AtomicCounter(0)
    monkeypatch.setattr(event_file_writer, "_global_uid", counter)


def shown(folder: Path) -> EventMultiplexer:
    """What TensorBoard shows with `--logdir FOLDER/tensorboard`."""
    events = EventMultiplexer(size_guidance={"scalars": 0, "images": 0})
    events.AddRunsFromDirectory(str(folder / "tensorboard"))
    return events.Reload()


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    events = shown(folder)
    (run,) = events.Runs()
    return [(event.step, event.value) for event in events.Scalars(run, name)]


def test_tensorboard_shows_what_was_logged(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    log.log(1, {"loss": 2.5})
    log.log(4, {"loss": 2.25, "knn_10": 0.5})
    log.close()
    assert scalars(tmp_path, "train/loss") == [(1, 2.5), (4, 2.25)]
    assert scalars(tmp_path, "eval/knn_10") == [(4, 0.5)]


PICTURES = ("attention", "crops")


def logged(step: int) -> dict[str, Any]:
    """A line of a run, with every number that runs log."""
    numbers = [name for names in GROUPS.values() for name in names if name not in PICTURES]
    return {name.replace(r"\d+", "20").replace(r"\w+", "corrupt"): 1.0 for name in numbers} | {
        "time": 1.7e9,
        "verdict": "healthy",
    }


def test_tensorboard_has_one_section_a_subject_and_the_loss_first(tmp_path: Path) -> None:
    log = log_of(tmp_path / "runs" / "first")
    log.log(1, logged(1))
    for name in PICTURES:
        log.picture(name, 1, png_of((255, 0, 0)))
    log.close()
    events = shown(tmp_path / "runs" / "first")
    assert list(events.Runs()) == ["first"]
    tags = sorted(events.Runs()["first"]["scalars"])
    pictures = events.Runs()["first"]["images"]
    assert sorted(pictures) == ["eval/attention", "health/crops"]
    sections = list(dict.fromkeys(tag.partition("/")[0] for tag in sorted([*tags, *pictures])))
    assert sections == ["cluster", "eval", "health", "schedule", "throughput", "train"]
    assert not [tag for tag in tags if tag.count("/") != 1 or tag.endswith("/time")]
    assert next(tag for tag in tags if tag.startswith("train/")) == "train/loss"
    assert len(tags) == len(logged(1)) - 2
    assert lines(tmp_path / "runs" / "first") == [{"step": 1, **logged(1)}]


def test_a_number_of_no_subject_is_shown_too(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    log.log(1, {"of another version": 2.0})
    log.close()
    assert scalars(tmp_path, "train/of another version") == [(1, 2.0)]


def test_every_gauge_has_a_subject() -> None:
    assert [name for name in GAUGES if name not in ("step", "total_steps") and group_of(name) is None] == []


def test_runs_are_called_by_their_names_also_beside_others(tmp_path: Path) -> None:
    for name in ("first", "second"):
        log_steps(log := log_of(tmp_path / name), 1, 2, loss=1.0)
        log.close()
    events = EventMultiplexer()
    events.AddRunsFromDirectory(str(tmp_path))
    assert sorted(events.Reload().Runs()) == ["first/tensorboard/first", "second/tensorboard/second"]


def test_files_of_an_earlier_version_are_moved_to_where_the_run_has_a_name(tmp_path: Path) -> None:
    old = SummaryWriter(str(tmp_path / "tensorboard"))
    for step in range(1, 5):
        old.add_scalar("loss", 1.0, step)
    old.close()
    config = 'embeddings { tensor_name: "teacher, step 0" tensor_path: "projector_first/tensors.tsv" }'
    for name, text in (("projector_first/tensors.tsv", "1\t2\n"), (CONFIG, config)):
        Directory(str(tmp_path / "tensorboard")).write(name, text.encode())
    log = log_of(tmp_path, first_step=2)
    log_steps(log, 3, 4, loss=2.0)
    log.embedding(4, embedding(1.0, labels=("", "", "")))
    log.close()
    assert list(shown(tmp_path).Runs()) == [tmp_path.name]
    assert scalars(tmp_path, "loss") == [(1, 1.0), (2, 1.0)]
    assert scalars(tmp_path, "train/loss") == [(3, 2.0), (4, 2.0)]
    place = tmp_path / "tensorboard" / tmp_path.name
    read = text_format.Parse((place / CONFIG).read_text(), ProjectorConfig())
    assert [info.tensor_name for info in read.embeddings] == [
        "newest: teacher, step 4",
        "start: teacher, step 0",
    ]
    assert all((place / info.tensor_path).exists() for info in read.embeddings)


@pytest.mark.parametrize("first_step", [0, 5])
def test_tensorboard_shows_each_step_of_a_resumed_run_once(tmp_path: Path, first_step: int) -> None:
    first = log_of(tmp_path)
    log_steps(first, 0, 7, loss=1.0)
    first.close()
    second = log_of(tmp_path, first_step=first_step)
    again = first_step + 1 if first_step else 0  # a run that starts over evaluates step 0 again
    log_steps(second, again, 8, loss=2.0)
    second.close()
    expected = [(step, 1.0) for step in range(again)] + [(step, 2.0) for step in range(again, 9)]
    assert scalars(tmp_path, "train/loss") == expected
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == expected


def test_what_is_synced_can_be_read_while_the_run_goes_on(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    log.log(1, {"loss": 2.5})
    log.add_bad_images([{"position": 0, "key": "a.jpg"}])
    log.sync()
    assert lines(tmp_path)[0]["loss"] == 2.5
    assert lines(tmp_path, "quarantine.jsonl") == [{"key": "a.jpg", "epochs": [0], "positions": [0]}]
    assert scalars(tmp_path, "train/loss") == [(1, 2.5)]
    log.close()


# Pictures


def images(folder: Path, name: str) -> list[tuple[int, tuple[int, ...]]]:
    """(step, the colour of its first pixel) of the pictures that TensorBoard shows."""
    events = shown(folder)
    (run,) = events.Runs()
    found = [
        (event.step, Image.open(io.BytesIO(event.encoded_image_string))) for event in events.Images(run, name)
    ]
    assert {image.size for _, image in found} <= {(6, 4)}
    return [(step, image.getpixel((0, 0))) for step, image in found]


def test_pictures_are_files_and_images_in_tensorboard(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    log.picture("attention", 0, png_of(RED))
    log.picture("attention", 540, png_of(BLUE))
    log.close()
    assert images(tmp_path, "eval/attention") == [(0, RED), (540, BLUE)]
    assert (tmp_path / "attention" / "step_00000540.png").read_bytes() == png_of(BLUE)


@pytest.mark.parametrize(("first_step", "kept"), [(0, []), (5, [0]), (540, [0, 540]), (700, [0, 540])])
def test_a_resumed_run_drops_the_figures_of_steps_that_it_repeats(
    tmp_path: Path, first_step: int, kept: list[int]
) -> None:
    log = log_of(tmp_path)
    for step in (0, 540, 810):
        log.picture("attention", step, png_of(RED))
    log.close()
    log_of(tmp_path, first_step=first_step).close()
    found = sorted((tmp_path / "attention").iterdir())
    assert [path.name for path in found] == [f"step_{step:08d}.png" for step in kept]


def test_the_contact_sheet_is_shown_once_however_often_a_run_is_continued(tmp_path: Path) -> None:
    (tmp_path / "crops.png").write_bytes(png_of(RED))
    log_of(tmp_path).close()
    log_of(tmp_path, first_step=5).close()
    log_of(tmp_path).close()  # killed before its first checkpoint
    assert images(tmp_path, "health/crops") == [(0, RED)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("crops.png", "metrics.jsonl", "quarantine.jsonl", "tensorboard")
    ]


# Embeddings


def projected(folder: Path) -> dict[str, tuple[list[list[float]], list[str]]]:
    """Title -> (rows, labels) of what TensorBoard's projector is told to show."""
    (place,) = (folder / "tensorboard").iterdir()
    config = text_format.Parse((place / CONFIG).read_text(), ProjectorConfig())
    found = {}
    for info in config.embeddings:
        table = (place / info.tensor_path).read_text()
        labels = (place / info.metadata_path).read_text().split("\n")
        rows = [[float(number) for number in line.split("\t")] for line in table.splitlines()]
        assert labels.pop() == ""
        found[info.tensor_name] = (rows, labels)
    return found


def test_the_projector_shows_the_first_features_and_the_newest(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    for step in (0, 540, 810):
        log.embedding(step, embedding(step))
    log.close()
    labels = ["cat", "a b c", "-"]
    assert projected(tmp_path) == {
        "start: teacher, step 0": ([[0, 2], [3, 4], [5, 6]], labels),
        "newest: teacher, step 810": ([[810, 2], [3, 4], [5, 6]], labels),
    }
    assert min(projected(tmp_path)) == "newest: teacher, step 810"  # of sets of equal size it opens this
    place = tmp_path / "tensorboard" / tmp_path.name
    folders = [path.name for path in place.iterdir() if path.is_dir()]
    assert sorted(folders) == ["projector_first", "projector_newest"]
    sprite = np.asarray(Image.open(place / "projector_newest" / "sprite.png"))
    assert sprite[::2, ::2, 0].tolist() == [[10, 20], [30, 0]]


def test_a_continued_run_keeps_its_first_features_and_one_that_starts_over_does_not(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    for step in (0, 540):
        log.embedding(step, embedding(step))
    log.close()
    log = log_of(tmp_path, first_step=400)
    log.embedding(540, embedding(-1.0))
    log.close()
    assert {title: rows[0][0] for title, (rows, _) in projected(tmp_path).items()} == {
        "start: teacher, step 0": 0.0,
        "newest: teacher, step 540": -1.0,
    }
    log = log_of(tmp_path)
    log.embedding(0, embedding(7.0))
    log.close()
    assert {title: rows[0][0] for title, (rows, _) in projected(tmp_path).items()} == {
        "start: teacher, step 0": 7.0
    }


def test_images_without_labels_are_projected_without_a_table_of_them(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    log.embedding(0, embedding(1.0, labels=("", "", "")))
    log.close()
    place = tmp_path / "tensorboard" / tmp_path.name
    assert "metadata_path" not in (place / CONFIG).read_text()
    assert not (place / "projector_first" / "metadata.tsv").exists()


# On S3, which cannot append


@pytest.mark.s3
def test_a_run_on_s3_leaves_what_a_local_one_leaves(
    tmp_path: Path, s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorboard, "_FULL_BYTES", 600)
    run = Directory(f"s3://{bucket}/run")
    run.write("crops.png", png_of(RED))

    def live(first_step: int, last: int, *, loss: float) -> None:
        log = MetricsLog(run, num_images=20, first_step=first_step)
        for step in range(first_step + 1 if first_step else 0, last + 1):
            log.log(step, {"loss": loss})
            if step % 10 == 0:
                log.picture("attention", step, png_of(BLUE))
                log.embedding(step, embedding(step))
                log.sync()
        log.close()

    live(0, 39, loss=1.0)
    live(30, 60, loss=2.0)
    client = s3.client()
    listed = client.list_objects_v2(Bucket=bucket, Prefix="run/")["Contents"]
    for key in (entry["Key"] for entry in listed):
        path = tmp_path / key.removeprefix("run/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(client.get_object(Bucket=bucket, Key=key)["Body"].read())
    assert scalars(tmp_path, "train/loss") == [(s, 1.0) for s in range(31)] + [
        (s, 2.0) for s in range(31, 61)
    ]
    assert images(tmp_path, "eval/attention") == [(step, BLUE) for step in range(0, 61, 10)]
    assert images(tmp_path, "health/crops") == [(0, RED)]
    assert [line["step"] for line in lines(tmp_path)] == list(range(61))
    assert list(projected(tmp_path)) == ["newest: teacher, step 60", "start: teacher, step 0"]
    sizes = [path.stat().st_size for path in (tmp_path / "tensorboard" / "run").glob("events.*")]
    assert len(sizes) > 5  # a file that is full is not uploaded again and again
    assert max(sizes) < 2000
