"""What cannot be searched together, or by a scheduler: one line for a person per mistake, of the space alone."""

from collections.abc import Iterator

from dinoray.models.config import LossConfig
from dinoray.pipeline.study.config import StudySettings
from dinoray.pipeline.study.space import TEACHER_TEMP, WARMUP_EPOCHS, WARMUP_TEMP, Space


def warmup_mistakes(space: Space, loss: LossConfig) -> Iterator[str]:
    """A start of the teacher's warm-up that no trial reads, or that would be above its end, the same in all trials."""
    if WARMUP_TEMP not in space:
        return
    if WARMUP_EPOCHS not in space and not loss.warmup_teacher_temp_epochs:
        yield (
            f"tune.space: {WARMUP_TEMP}: it has no effect in any trial with {WARMUP_EPOCHS}=0; leave it out, or set "
            f"{WARMUP_EPOCHS}"
        )
    elif TEACHER_TEMP not in space and not isinstance(loss.teacher_temp, str):
        for value in space[WARMUP_TEMP].values:
            if isinstance(value, int | float) and value > loss.teacher_temp:
                yield (
                    f"tune.space: {WARMUP_TEMP}={value!r}: it must not exceed {TEACHER_TEMP}={loss.teacher_temp}; "
                    f"lower it, or search {TEACHER_TEMP} too"
                )


def scheduler_mistakes(space: Space, tune: StudySettings, *, num_streams: int = 1) -> Iterator[str]:
    """What the scheduler cannot compare, or move, and what a shared stream cannot serve."""
    if tune.scheduler == "pb2":
        fixed = [key for key, domain in space.items() if not domain.is_continuous or not _moves(key)]
        if fixed:
            yield (
                f"tune.scheduler=pb2 changes settings during training, but {', '.join(fixed)} cannot change; "
                "leave them out of tune.space, or set tune.scheduler=asha"
            )
        if tune.evaluations < 4:
            yield (
                f"tune.evaluations={tune.evaluations}: tune.scheduler=pb2 needs at least 4, to rank trials from "
                "the second on and to copy weights before the last; set tune.evaluations=4 or more"
            )
        if tune.max_concurrent is not None and tune.max_concurrent < tune.trials:
            yield (
                f"tune.max_concurrent={tune.max_concurrent}: tune.scheduler=pb2 trains all tune.trials={tune.trials} "
                f"at once; leave it out, set tune.trials={tune.max_concurrent}, or set tune.scheduler=asha"
            )
        if tune.searcher == "grid":
            yield (
                "tune.searcher=grid: tune.scheduler=pb2 trains tune.trials members, but a grid sets its own "
                "number of trials; set tune.searcher=quasi for members that start evenly spread, or tune.scheduler=asha"
            )
    if tune.scheduler == "asha" and "train.global_batch_size" in space:
        yield (
            "tune.space: train.global_batch_size: tune.scheduler=asha cannot compare trials of different lengths; "
            "leave it out, or set tune.scheduler=none"
        )
    if tune.share_stream:
        moved = [key for key in space if key.startswith("crops.") or key == "train.global_batch_size"]
        if moved:
            yield (
                f"tune.share_stream=true needs the same crops in all trials, but {', '.join(moved)} varies; "
                "leave it out of tune.space, or set tune.share_stream=false"
            )
        if num_streams > 1:
            yield (
                f"data.streams={num_streams}: tune.share_stream=true makes the crops of all trials in one stream, "
                "without Ray Data; set data.streams=1, or set tune.share_stream=false"
            )


def _moves(key: str) -> bool:
    """Whether a setting may change in the middle of a run: it is read at each step and shapes no network."""
    section, _, leaf = key.partition(".")
    return section in ("loss", "teacher", "optim") and not leaf.endswith("_epochs") and leaf != "layer_decay"
