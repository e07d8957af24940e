"""Run directories as a run leaves them, made by hand, and the report page as a reader finds it."""

import io
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from dinoray.pipeline.cluster.nodes import group_identical_nodes
from dinoray.pipeline.storage.files import Directory

CONFIG = {"name": "first", "head": {"out_dim": 64}, "train": {"epochs": 4.0}, "data": {"path": "/images"}}


class Page(HTMLParser):
    """What a browser would find: tags, attributes, text outside of them, and apart from that the words of the list of
    contents; fails on tags left open."""

    VOID = frozenset({"meta", "img", "use", "path"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.contents: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "nav" in self._open:
            self.contents.append(data)
        elif "style" not in self._open:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def png(width: int = 40, height: int = 20, seed: int | None = None) -> bytes:
    pixels = np.zeros((height, width, 3), np.uint8)
    if seed is not None:
        pixels = np.random.default_rng(seed).integers(0, 256, pixels.shape, dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def step_record(step: int, **changes: Any) -> dict[str, Any]:
    record = {
        "step": step,
        "loss": 5 - step / 100,
        "kl": 1.0,
        "teacher_entropy": 2.0,
        "lr": 1e-3,
        "teacher_temp": 0.04,
        "teacher_momentum": 0.99,
        "grad_norm": 1.0,
        "images_per_second": 100.0 + step,
        "data_wait": 0.25,
        "epoch": step / 10,
        "bad_images": 0,
    }
    return record | changes


def jsonl(*records: dict[str, Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def make_run(folder: Path, **files: bytes | str | dict[str, Any] | None) -> Directory:
    """A run directory with a config and these files; `__` in a name is a slash, `_dot_` a dot."""
    run = Directory(str(folder))
    contents = {"config_dot_yaml": CONFIG, **files}
    for name, content in contents.items():
        name = name.replace("__", "/").replace("_dot_", ".")
        if isinstance(content, dict):
            content = yaml.safe_dump(content) if name.endswith("yaml") else json.dumps(content)
        if content is not None:
            run.write(name, content.encode() if isinstance(content, str) else content)
    return run


def whole_run(folder: Path) -> Directory:
    scores = [{"step": s, "knn_10": a, "knn_20": a - 0.01, "majority": 0.1} for s, a in ((0, 0.2), (30, 0.5))]
    health = {"entropy_ratio": 0.4, "mutual_information": 1.5, "feature_std": 0.05, "verdict": "healthy"}
    return make_run(
        folder,
        metrics_dot_jsonl=jsonl(scores[0], *(step_record(s, **health) for s in range(1, 31)), scores[1]),
        quarantine_dot_jsonl=jsonl(
            *({"position": p, "status": "corrupt", "key": f"{p}.jpg", "reason": "cut off"} for p in range(50))
        ),
        crops_dot_png=png(),
        attention__step_00000000_dot_png=png(),
        attention__step_00000030_dot_png=png(),
        environment_dot_json={"python": "3.11.1"},
        result_dot_json={"steps": 30, "after": {"knn_20": 0.49}, "last": step_record(30)},
        evaluation_step_00000030_dot_json={"checkpoint": "step_00000030", "knn_20": 0.481},
    )


BEGIN = 1_700_000_000.0
HEAD = {"CPU": 4.0, "memory": 12 * 2.0**30, "object_store_memory": 4 * 2.0**30, "node:__internal_head__": 1.0}
GPU = {"CPU": 8.0, "GPU": 1.0, "memory": 64 * 2.0**30, "accelerator_type:A10G": 1.0}


def fed_record(step: int, seconds: float, **changes: Any) -> dict[str, Any]:
    """A line as a run on a cluster writes it: nodes come, the pool follows, waiting ends."""
    cpu_nodes = min(3, step // 60)
    return step_record(
        step,
        time=BEGIN + seconds,
        images_per_second=300.0 + 250 * cpu_nodes + 20 * math.sin(step),
        data_wait=max(0.004, 0.6 - 0.2 * cpu_nodes),
        nodes_head=1,
        nodes_cpu=cpu_nodes,
        nodes_gpu=1,
        augment_actors=4 + 8 * cpu_nodes,
        augment_target=4 + 8 * min(3, (step + 20) // 60),
        dollars=round(seconds / 3600 * 4.2, 4),
        fetch_cpu_ms=0.6,
        decode_cpu_ms=5.2 + 0.2 * math.sin(step / 7),
        crop_cpu_ms=7.9 + 0.2 * math.cos(step / 5),
        bad_images=step // 4,
        **changes,
    )


def fed_run(folder: Path) -> Directory:
    """Four hours and a half, of which the run was down for one, with every kind of file that it leaves."""
    health = {
        "entropy_ratio": 0.4,
        "mutual_information": 1.5,
        "feature_std": 0.05,
        "verdict": "healthy",
        "prototypes_used": 0.8,
        "commonest_prototype": 0.02,
        "rankme": 40.0,
    }
    lines: list[dict[str, Any]] = []
    for step in range(10, 401, 2):
        lines.append(fed_record(step, step * 30.0 + (3600 if step > 200 else 0), **health))
        if step % 100 == 0:
            knn = 0.1 + step / 900
            lines.append({"step": step, "knn_10": knn - 0.01, "knn_20": knn, "majority": 0.08})
    reasons = [
        ("corrupt", "damaged or cut off JPEG: OpenCV finds no whole picture"),
        ("corrupt", "damaged or cut off JPEG: OpenCV finds no whole picture"),
        ("missing", "s3://photos/train/{}: there is no such object (404)"),
        ("corrupt", "0 bytes"),
        ("too_large", "99887{}66 bytes, more than data.max_object_bytes=67108864"),
    ]
    bad = []
    for i in range(100):
        status, reason = reasons[i % len(reasons)]
        key = f"train/2019/archive-of-summer/IMG_{i:06d}.jpg"
        bad.append({"position": 40 * i, "status": status, "key": key, "reason": reason.format(i)})
    config = CONFIG | {
        "name": "photos-vit-s",
        "recipe": "photos_small",
        "data": {"path": "s3://photos/train", "max_bad_fraction": 0.01},
        "train": {"epochs": 40.0, "global_batch_size": 64, "precision": "bf16"},
    }
    changed = {
        "data.path": {"recipe": None, "run": "s3://photos/train"},
        "train.epochs": {"recipe": 20.0, "run": 40.0},
        "crops.blur_sigma": {"recipe": [0.1, 0.9], "run": [0.1, 2.0]},
    }
    environment = {
        "python": "3.11.1",
        "platform": "Linux-6.1-x86_64",
        "processor": "Xeon",
        "git_commit": "0123456789abcdef0123456789abcdef01234567",
        "cuda": "12.8",
        "packages": {"dinoray": "0.1.0", "ray": "2.60.0", "torch": "2.10.0", "numba": None},
        "automatic": ["head.out_dim=1024: 4000 images"],
        "recipe": {"name": "photos_small", "changed": changed},
        "hardware": group_identical_nodes([{"Alive": True, "Resources": r} for r in (HEAD, GPU, GPU)]),
    }
    return make_run(
        folder,
        config_dot_yaml=config,
        metrics_dot_jsonl=jsonl(*lines),
        quarantine_dot_jsonl=jsonl(*bad),
        crops_dot_png=png(600, 200, seed=1),
        attention__step_00000000_dot_png=png(700, 180, seed=2),
        attention__step_00000400_dot_png=png(700, 180, seed=3),
        environment_dot_json=environment,
        evaluation_step_00000400_dot_json={"checkpoint": "step_00000400", "knn_20": 0.481},
    )
