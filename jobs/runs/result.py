"""What a finished run came to: result.json, and the same in words."""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from dinoray.jobs.cli.display import describe_calibration
from dinoray.models.errors import DataError
from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.tracking.records import read_records
from dinoray.pipeline.tracking.scalar_names import BAD_IMAGES_OF
from dinoray.pipeline.tracking.scores import best_checkpoint, decline, evaluations, scores_of
from dinoray.pipeline.tracking.start import LABEL_FREE_NAMES, against_start, start_of
from dinoray.pipeline.training.verdict import Verdict


def write_result(run: Directory) -> None:
    """Sum the run up: its first, last and best evaluation, the metrics of its last step, and when it ended."""
    all_records = read_records(run)
    records = all_records.lines
    steps = [r for r in records if "loss" in r]
    if not steps:
        raise DataError(
            f"{run.join('metrics.jsonl')} holds no training step; train again under another name=..."
        )
    evaluations = [r for r in records if "majority" in r]  # that of the last step may be missing
    result: dict[str, Any] = {"steps": steps[-1]["step"], "ended": time.time(), "last": steps[-1]}
    if evaluations:
        result |= {"before": evaluations[0], "after": evaluations[-1]}
    if best := best_checkpoint(run, all_records):
        result["best"] = best._asdict()
    run.write(run_dir.RESULT, json.dumps(result, indent=1).encode())


def describe_result(run: Directory) -> str:
    """k-NN before and after, what could not be used, and where everything is."""
    result = json.loads(run.read(run_dir.RESULT))
    lines = []
    if "after" in result:
        after = f"after {result['after']['step']} steps"
        lines += [
            f"k-NN accuracy of the teacher, {', '.join(k.replace('knn_', 'k=') for k in _knn(result['after']))}",
            f"  {'before training':17} {_percent(result['before'])}{_calibration(result['before'])}",
            f"  {after:17} {_percent(result['after'])}",
            f"  {'majority guess':17} {result['after']['majority']:.1%}",
        ]
    records = read_records(run)
    if "after" not in result:
        lines += _label_free(records.lines)
    if best := best_checkpoint(run, records):
        lines.append(f"best checkpoint: {best}")
    if words := against_start(records.lines, best):
        lines.append(words)
    if fall := decline(scores_of(records.lines)):
        lines.append(str(fall))
    lines += [
        f"checkpoints   {run.join('checkpoints')}",
        f"report        {run.join('report.html')}",
        f"crops         {run.join('crops.png')}",
        f"metrics       {run.join('metrics.jsonl')}, tensorboard --logdir {run.join('tensorboard')}",
    ]
    verdict = Verdict(result["last"]["verdict"])
    if verdict is not Verdict.HEALTHY:
        lines.append(f"health        {verdict.value}: {verdict.remedy}")
    if result["last"]["skipped_steps"]:
        lines.append(f"skipped       {result['last']['skipped_steps']} steps that were not finite")
    if result["last"]["bad_images"]:
        lines.append(f"bad images    {_accounts(result['last'])}, listed in {run.join('quarantine.jsonl')}")
    return "\n".join(lines)


def _label_free(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """The metrics without labels before and after training."""
    start, scored = start_of(lines), evaluations(lines)
    if start is None or len(scored) < 2:
        return []
    last = scored[-1]
    both = [name for name in LABEL_FREE_NAMES if name in start and name in last]
    parts = (f"{LABEL_FREE_NAMES[name]} {start[name]:.3g}, now {last[name]:.3g}" for name in both)
    return [f"without labels, at the start: {'; '.join(parts)}; none of them alone measures quality"]


def _accounts(last: dict[str, Any]) -> str:
    """Every position of the stream, as trained on or replaced."""
    bad = last["bad_images"]
    if "trained_images" not in last:  # a run of an earlier version
        return f"{bad:,}"
    trained = last["trained_images"]
    counts = {key.removeprefix(BAD_IMAGES_OF): n for key, n in last.items() if key.startswith(BAD_IMAGES_OF)}
    kinds = (f"{n:,} {status}" for status, n in counts.items())
    return f"{trained + bad:,} images seen = {trained:,} trained on + {bad:,} replaced ({', '.join(kinds)})"


def _calibration(scores: dict[str, float]) -> str:
    return f"  ({describe_calibration(scores)})" if "calibration_images" in scores else ""


def _knn(scores: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in scores.items() if k.startswith("knn_")}


def _percent(scores: dict[str, float]) -> str:
    return "  ".join(f"{v:.1%}" for v in _knn(scores).values())
