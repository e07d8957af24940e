"""Evaluate a checkpoint of a run: `python -m jobs.evaluate RUN [--step N] [eval.key=value ...]`.

Ray Data embeds the labelled images with the teacher's backbone on a pool of actors; weighted k-NN classifies them.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import ray
from rich.console import Console
from rich.table import Table

from jobs.config import CommandLine, load_run_config
from jobs.entry import run_main, start_ray
from models.settings import ConfigError
from pipeline.checkpoint import download_checkpoint, pick_checkpoint, read_teacher
from pipeline.dataset import embed_images
from pipeline.features import knn_accuracy, labelled_sources, subset
from pipeline.storage import Directory


def main(argv: Sequence[str]) -> None:
    """Embed, classify, print a table, and keep the scores in the run directory."""
    parser = CommandLine(prog="python -m jobs.evaluate", description="k-NN accuracy of a checkpoint.")
    parser.add_argument("run", help="run directory, local or s3://")
    parser.add_argument("--step", type=int, default=None, help="which checkpoint (default: the newest)")
    parser.add_argument("--verbose", action="store_true", help="show Ray's own logs")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="e.g. eval.val_path=s3://bucket/val"
    )
    arguments = parser.parse_args(argv)

    run = Directory(arguments.run)
    config = load_run_config(run, arguments.overrides)
    name = pick_checkpoint(run, arguments.step)
    sources = labelled_sources(config.data, config.eval)
    if sources is None:
        raise ConfigError(
            "eval.val_path is not set; give labelled images, e.g. eval.val_path=s3://bucket/val"
        )

    use_gpu, (_, actors) = start_ray(config.resources, verbose=arguments.verbose)
    try:
        with tempfile.TemporaryDirectory(prefix="dinoray-evaluate-") as scratch:
            teacher = ray.put(read_teacher(download_checkpoint(run, name, Path(scratch))))
        sides = [
            embed_images(
                teacher,
                source,
                subset(source.num_images, limit),
                config.eval,
                actors=actors,
                use_gpu=use_gpu,
                precision=config.train.precision,
            )
            for source, limit in zip(
                sources, (config.eval.max_train_images, config.eval.max_val_images), strict=True
            )
        ]
    finally:
        ray.shutdown()
    scores = knn_accuracy(sides[0], sides[1], config.eval)
    result = {
        "checkpoint": name,
        "num_train": len(sides[0].labels),
        "num_val": len(sides[1].labels),
        "num_unreadable": sides[0].num_bad + sides[1].num_bad,
        **scores,
    }
    run.write(f"evaluation_{name}.json", json.dumps(result, indent=1).encode())
    table = Table("score", "value", title=f"{run.uri} {name}, teacher")
    for key, value in result.items():
        if key != "checkpoint":
            table.add_row(key, f"{value:.1%}" if isinstance(value, float) else str(value))
    Console().print(table)


if __name__ == "__main__":
    run_main(main)
