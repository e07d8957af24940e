"""benchmarks/gpu_feed.py at toy size: it runs, and its processes make the crops that one process makes."""

import json
from contextlib import closing
from itertools import islice
from pathlib import Path

import gpu_feed as benchmark
import numpy as np
import pytest
from crop_processes import CropProcesses
from image_files import encode, picture

from dinoray.models.errors import ResourceError
from dinoray.pipeline.augment.config import CropsConfig
from dinoray.pipeline.augment.multicrop import apply
from dinoray.pipeline.augment.params import sample_image
from dinoray.pipeline.data.decoding.jpeg import open_image

TOY = {"global_crop_size": 32, "local_crop_size": 16, "num_local_crops": 2}


def test_it_runs_to_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(encode(picture(), "JPEG"))
    out = tmp_path / "out.json"
    settings = [
        *(f"crops.{key}={value}" for key, value in TOY.items()),
        "head.out_dim=64",
        "head.hidden_dim=32",
    ]
    few = ["--model", "test_vit", "--batch", "2", "--steps", "2", "--processes", "1"]
    benchmark.main([*settings, *few, "--images", str(tmp_path), "--json", str(out)])
    facts = json.loads(out.read_text())
    assert min(facts["step_alone"], facts["stream_alone"], facts["fed"]) > 0
    assert 0 <= facts["data_wait"] < 1
    printed = capsys.readouterr().out
    assert f"keeps {facts['fed'] / facts['step_alone']:.1%} of its rate; the bottleneck is" in printed


def test_crops_are_those_of_one_process() -> None:
    files, config = [encode(picture(), "JPEG")] * 2, CropsConfig(**TOY)
    with closing(CropProcesses(files, config, batch_size=3, number=2)) as processes:
        for batch in islice(processes.batches(), 6):
            assert not batch["global_crops"].flags.writeable
            for row, position in enumerate(batch["position"].tolist()):
                epoch, number = divmod(position, 2)
                image = open_image(files[number])
                params = sample_image(0, epoch, str(number), image.width, image.height, config)
                expected = apply(image, params)
                assert np.array_equal(batch["global_crops"][row], expected.global_crops)
                assert np.array_equal(batch["local_crops"][row], expected.local_crops)


def test_a_file_that_is_no_image_ends_in_one_line() -> None:
    processes = CropProcesses([b"\xff\xd8 no"], CropsConfig(**TOY), batch_size=1, number=1)
    with (
        closing(processes),
        pytest.raises(ResourceError, match=r"a crop process failed: .*; check the images"),
    ):
        next(processes.batches())


@pytest.mark.parametrize(
    ("stream_alone", "bottleneck"), [(900.0, "the stream: more --processes"), (2000.0, "the step")]
)
def test_the_slower_one_is_named(stream_alone: float, bottleneck: str) -> None:
    facts = {"step_alone": 1000.0, "stream_alone": stream_alone, "fed": 850.0}
    assert f"keeps 85.0% of its rate; the bottleneck is {bottleneck}" in benchmark.sentence(facts)
