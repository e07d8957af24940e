"""The page about neighbours, from runs on disk; the actors' work is done in this process."""

import base64
import io
import re
import shutil
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_run import NAME, write_images, write_run

from dinoray.jobs.runs import neighbours, scoring
from dinoray.pipeline.evaluation.actors import EmbedTask
from dinoray.pipeline.training.checkpoint import FrozenBackbone

LABELS = ("dots", "rings")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two classes of images, one image of them damaged."""
    folder = tmp_path_factory.mktemp("neighbours")
    images = write_images(folder / "images", "train", labels=LABELS, per_label=10)
    (images / "rings" / "03.jpg").write_bytes(b"no picture")
    return write_run(folder / "run", f"data.path={images}", "eval.batch_size=6", "eval.max_train_images=15")


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def embed(network: FrozenBackbone, tasks: Sequence[EmbedTask], **_: Any) -> Iterator[tuple[int, Any]]:
        for number, task in enumerate(tasks):
            for item in task.items:
                yield number, task.work(network.backbone(), task.source, item)

    monkeypatch.setattr(neighbours, "embed_on_actors", embed)
    monkeypatch.setattr(neighbours.ray, "put", lambda value: value)
    monkeypatch.setattr(scoring, "start_ray", lambda *_, **__: (False, (1, 1)))
    monkeypatch.setattr(scoring, "leave_ray", lambda: None)


def page_of(run: Path, *overrides: str, checkpoint: Path | None = None) -> str:
    arguments = Namespace(checkpoint=str(checkpoint or run), step=None, which="teacher", probes="neighbours")
    scoring.score(Namespace(**vars(arguments), overrides=list(overrides), verbose=False))
    return ((checkpoint or run) / "neighbours.html").read_text()


def strips(text: str, name: str) -> list[str]:
    return re.findall(rf'<div class="strip"><h3>{name}(.*?)</div>', text)


def test_queries_and_neighbours_are_those_of_k_nn(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = page_of(run)
    assert f"page     {run}/neighbours.html" in capsys.readouterr().out
    assert "<title>Nearest neighbours: teacher at step 7</title>" in text
    assert "Before: the teacher as the run began, random weights, seed 0." in text
    # A fifth of 20 images is classified; all queries fit into the sample.
    before, after = strips(text, "before"), strips(text, "after")
    assert (len(before), len(after), text.count('class="query"')) == (4, 4, 4)
    assert all(strip.count("<figure") == 8 for strip in (*before, *after))
    rights = sum(strip.count('"near right"') for strip in after)
    assert f"{rights / 32:.0%} of the neighbours have the label of their query" in text
    # Right and wrong differ by sign, not by colour alone; the number beside a strip counts them.
    for strip in (*before, *after):
        assert (
            strip.count("✓") == strip.count('"near right"') == int(re.findall(r"(\d) of 8 right", strip)[0])
        )
        assert strip.count("✗") == 8 - strip.count("✓")
    assert "<i>new</i>" not in "".join(before)
    num_new = sum(strip.count("<i>new</i>") for strip in after)
    assert f"<b>{num_new / 32:.1%}</b><small>of the neighbours" in text
    assert num_new > 0
    assert "://" not in text  # one file that asks nothing of the network
    for data in re.findall(r"data:image/jpeg;base64,([^\"]*)", text):
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (128, 128)
    assert text == page_of(run)


def test_without_labels_images_are_compared_with_one_another(run: Path) -> None:
    text = page_of(run, "data.label_from_parent=false", "eval.val_path=null", "probe.max_images=18")
    assert re.search(r"of the neighbours are new\.</p>", text)
    assert "Queries and neighbours are images of " in text
    assert '"near right"' not in text
    assert "✓" not in text
    queries = re.findall(r'class="query"><figure><img [^>]*alt="([^"]*)"', text)
    assert 10 <= len(queries) == len(set(queries)) <= 18
    for name, strip in zip(queries, strips(text, "after"), strict=True):
        assert f'alt="{name}"' not in strip


def test_a_start_that_is_gone_is_said_and_nothing_is_compared(run: Path, tmp_path: Path) -> None:
    text = page_of(run, "init.path=/nowhere/weights.pth")
    assert "The weights that the run began with cannot be loaded, so nothing is compared: " in text
    lone = shutil.copytree(run / "checkpoints" / NAME, tmp_path / "lone")
    other = page_of(run, f"data.path={run.parent}/images", checkpoint=lone)
    assert "lies outside its run, so the weights that it began with are not known" in other
    for page in (text, other):
        assert not strips(page, "before")
        assert len(strips(page, "after")) == 4
        assert "<i>new</i>" not in page
