"""A job's main within this process, in a folder with inputs of many kinds, right and wrong, and how it ended."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from no_ray import forbid_ray
from samples import parquet, write_all
from servers import use_aws

from dinoray.jobs.cli.main import run_main
from dinoray.pipeline.data.demo_images import draw_demo_image

TINY = [
    "--recipe=vit_small_imagenet_vanilla",
    "name=run",
    "backbone.kwargs={patch_size: 8, embed_dim: 16, depth: 1, num_heads: 2}",
    "crops.global_crop_size=32",
    "crops.local_crop_size=16",
    "head.out_dim=64",
    "train.global_batch_size=8",
    "resources.train_workers=2",
]
CONFIG, DATA, RESOURCES = 2, 3, 4


@dataclass
class Ending:
    """How a job ended: its exit code and its two streams."""

    code: int
    output: str
    errors: str

    def check(self, code: int, *lines: Sequence[str]) -> None:
        """The exit code, and for each line of stderr the words that it must hold."""
        found = self.errors.splitlines()
        assert self.code == code, self.errors
        assert "Traceback" not in self.output + self.errors
        assert len(found) == len(lines), found
        for line, words in zip(found, lines, strict=True):
            assert line.startswith("error: ")
            for word in words:
                assert word in line


Job = Callable[..., Ending]


def runner_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Job:
    """What runs a job's main as its command line does, in a folder of its own; `WORLD` stands for that folder."""

    def run(main: Callable[[Sequence[str]], None], *arguments: str) -> Ending:
        monkeypatch.setattr(sys, "argv", ["job", *(x.replace("WORLD", str(tmp_path)) for x in arguments)])
        with pytest.raises(SystemExit) as exit_:
            run_main(main)
        assert isinstance(exit_.value.code, int)
        return Ending(exit_.value.code, *capsys.readouterr())

    forbid_ray(monkeypatch)
    monkeypatch.setenv("DINORAY_CACHE", str(tmp_path / "cache"))
    use_aws(monkeypatch, {"AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null"})
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    image = draw_demo_image("dots", "train", 0)
    write_all(
        tmp_path,
        {
            **{f"images/{label}/{i}.jpg": image for label in ("dots", "rings") for i in range(4)},
            **{f"loose/{i}.jpg": image for i in range(8)},
            "one/1.jpg": image,
            "texts/readme.txt": b"words",
            "shards/a.parquet": parquet({"jpeg": [image], "label": [1]}),
            "tables/a.parquet": parquet({"url": ["http://x/1.jpg"], "label": [1]}),
            "corrupt/a.parquet": b"PAR1 nothing of the kind PAR1",
            "mixed/1.jpg": image,
            "mixed/a.parquet": parquet({"image": [image]}),
            "broken.yaml": b"optim: {base_lr: 1\n",
            "list.yaml": b"- optim\n",
            "file": b"",
        },
    )
    (tmp_path / "empty").mkdir()
    return run
