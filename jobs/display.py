"""What a person sees of a run: one live line on a terminal, plain lines elsewhere."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

_PLAIN_SECONDS = 5.0
"""Least time between plain lines, so that a log of a long run stays readable."""


class Display:
    """Shows events of the board as they come; use as a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._knn = ""
        self._last_plain = 0.0
        self._first: tuple[int, float] | None = None
        self._progress: Progress | None = None
        if console.is_terminal:
            self._progress = Progress(
                SpinnerColumn(), BarColumn(bar_width=24), TextColumn("{task.description}"), console=console
            )
            self._task = self._progress.add_task("starting the workers", total=None)

    def __enter__(self) -> "Display":
        if self._progress:
            self._progress.start()
        else:
            self._console.print("starting the workers")
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()

    def step(self, facts: dict[str, Any]) -> None:
        """Metrics of a logged step."""
        step, total = int(facts["step"]), int(facts["total_steps"])
        line = status_line(facts, knn=self._knn, eta_seconds=self._eta(step, total))
        if self._progress:
            self._progress.update(self._task, completed=step, total=total, description=line)
        elif step == total or time.monotonic() - self._last_plain >= _PLAIN_SECONDS:
            self._last_plain = time.monotonic()
            self._console.print(line, highlight=False, soft_wrap=True)

    def eval(self, facts: dict[str, Any]) -> None:
        """Scores of an evaluation."""
        for name, score in facts.items():
            if name.startswith("knn_"):
                self._knn = f"{name} {score:.1%}"
                break
        if scores := describe_scores(facts):  # without labelled images there are none
            self.note(f"evaluation after step {facts['step']}: {scores}")
        self._first = None  # the pause would count as training time

    def note(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def _eta(self, step: int, total: int) -> float | None:
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
        first_step, since = self._first
        return (now - since) / (step - first_step) * (total - step) if step > first_step else None


def status_line(facts: dict[str, Any], *, knn: str, eta_seconds: float | None) -> str:
    """One line about one step."""
    parts = [
        f"step {facts['step']}/{facts['total_steps']}",
        f"loss {facts['loss']:.3f}",
        f"entropy {facts['teacher_entropy']:.2f}",
        f"{facts['images_per_second']:.0f} images/s",
        f"data wait {facts['data_wait']:.0%}",
    ]
    if facts.get("bad_images"):
        parts.append(f"bad images {facts['bad_images']}")
    if knn:
        parts.append(knn)
    if eta_seconds is not None:
        minutes, seconds = divmod(int(eta_seconds), 60)
        parts.append(f"ETA {minutes // 60}:{minutes % 60:02}:{seconds:02}")
    return "  ".join(parts)


def describe_scores(scores: dict[str, Any]) -> str:
    """`knn_10 61.2%, knn_20 60.8%, majority 8.3%`; without labels `rankme 31.2`."""
    shown = [f"{k} {v:.1%}" for k, v in scores.items() if k.startswith("knn_") or k == "majority"]
    return ", ".join(shown or [f"{k} {scores[k]:.1f}" for k in ("rankme", "lidar") if k in scores])
