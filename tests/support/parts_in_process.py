"""Parts of a table made in this process, one after the other, in place of actors: quick, and killed where one likes."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from dinoray.jobs.runs import parts_job
from dinoray.pipeline.evaluation.actors import EmbedTask


class KilledError(Exception):
    """As a kill between two parts."""


class Pool:
    """In place of actors: the parts in their order."""

    in_second_pass: Callable[[int], None] = staticmethod(lambda number: None)
    """Called before each part of a second pass, with its place among those to do."""
    in_first_pass: Callable[[int], None] = staticmethod(lambda number: None)
    """The same for the pass that reads the source."""

    def __call__(self, _: Any, tasks: Sequence[EmbedTask], **options: Any) -> Iterator[tuple[int, Any]]:
        (task,) = tasks
        is_second = task.source.manifest.path.endswith("-first-pass")
        for number, part in enumerate(task.items):
            (self.in_second_pass if is_second else self.in_first_pass)(number)
            yield 0, task.work(None, task.source, part)


def use_pool(monkeypatch: pytest.MonkeyPatch) -> Pool:
    """Make the parts of all jobs in this process, without Ray."""
    pool = Pool()
    monkeypatch.setattr(parts_job, "embed_on_actors", pool)
    monkeypatch.setattr(parts_job, "start_ray", lambda *_, **__: (False, (1, 1)))
    monkeypatch.setattr(parts_job, "leave_ray", lambda: None)
    monkeypatch.setattr(parts_job.ray, "put", lambda value: value)
    return pool
