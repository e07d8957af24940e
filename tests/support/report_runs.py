"""Run directories as a run leaves them, made by hand, and the report page as a reader finds it."""

import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

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
