"""What a person sees of a run: a view that stays in place on a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.columns import Columns
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.padding import Padding
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.text import Text

_PLAIN_SECONDS = 5.0
"""Least time between plain lines, so that a log of a long run stays readable."""
_KINDS = ("head", "cpu", "gpu")


class Display:
    """Shows events of a run as they come; use as a context manager."""

    def __init__(self, console: Console, *, title: str = "", start: Mapping[str, Any] | None = None) -> None:
        """`title`: what the view is headed with. `start`: the first line of the log, if there is one."""
        self._console, self._title, self._start = console, title, start
        self._knn = ""
        self._last_plain = 0.0
        self._first: tuple[int, float] | None = None
        # TERM=dumb is a terminal that cannot move its cursor.
        in_place = console.is_terminal and not console.is_dumb_terminal
        self._live = Live(console=console, refresh_per_second=2) if in_place else None

    def __enter__(self) -> "Display":
        if self._live:
            self._live.start()
            self._live.update(Text("starting the workers"))
        else:
            self._console.print("starting the workers")
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def step(self, facts: dict[str, Any]) -> None:
        """Metrics of a logged step."""
        step, total = int(facts["step"]), int(facts["total_steps"])
        shown = describe_step(facts, knn=self._knn, eta_seconds=self._eta(step, total))
        if self._live:
            self._live.update(_View(self._title, shown, step, total))
        elif step == total or time.monotonic() - self._last_plain >= _PLAIN_SECONDS:
            self._last_plain = time.monotonic()
            self._console.print(status_line(shown), highlight=False, soft_wrap=True, markup=False)

    def eval(self, facts: dict[str, Any]) -> None:
        """Scores of an evaluation."""
        if self._start is None:
            self._start = facts
        for name, score in facts.items():
            if name.startswith("knn_"):
                self._knn = f"{score:.1%} k={name.removeprefix('knn_')}"
                if self._start["step"] != facts["step"] and name in self._start:
                    self._knn += f" (start {self._start[name]:.1%})"
                break
        if scores := describe_scores(facts):  # without labelled images there are none
            self.note(f"evaluation after step {facts['step']}: {scores}")
        if "calibration_images" in facts:
            self.note(f"  {describe_calibration(facts)}")
        self._first = None  # the pause would count as training time

    def note(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def _eta(self, step: int, total: int) -> float | None:
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
        first_step, since = self._first
        return (now - since) / (step - first_step) * (total - step) if step > first_step else None


def describe_step(facts: dict[str, Any], *, knn: str, eta_seconds: float | None) -> dict[str, str]:
    """What is worth a look of one step, by name; what is not there is left out."""
    shown = {
        "step": f"{facts['step']}/{facts['total_steps']}",
        "loss": f"{facts['loss']:.3f}",
        "entropy": f"{facts['teacher_entropy']:.2f}",
        "images/s": f"{facts['images_per_second']:.0f}",
        "data wait": f"{facts['data_wait']:.0%}",
    }
    if "staged_bytes" in facts:
        shown["staged"] = f"{facts['staged_bytes'] / 1e6:.0f} MB"
    if "mfu" in facts:
        shown["TFLOP/s"], shown["MFU"] = f"{facts['tflops']:.0f}", f"{facts['mfu']:.0%}"
    if sum(facts.get(f"nodes_{kind}", 0) for kind in _KINDS) > 1:
        shown["nodes"] = " + ".join(
            f"{facts[f'nodes_{kind}']:.0f} {kind}" for kind in _KINDS if facts[f"nodes_{kind}"]
        )
    if (target := facts.get("augment_target", 1)) > 1:
        shown["augment actors"] = f"{facts['augment_actors']:.0f} of {target:.0f}"
    if facts.get("unsaved"):
        files = facts["unsaved"]
        shown["not written"] = f"{len(files)} files for {max(files.values()):.0f} s"
    if facts.get("bad_images"):
        shown["bad images"] = f"{facts['bad_images']}"
    if knn:
        shown["k-NN"] = knn
    if "dollars" in facts:
        shown["cost"] = f"${facts['dollars']:.2f}"
    if eta_seconds is not None:
        minutes, seconds = divmod(int(eta_seconds), 60)
        shown["ETA"] = f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
    return shown


def status_line(shown: dict[str, str]) -> str:
    """One line about one step."""
    return "  ".join(
        f"{value} {name}" if name in ("images/s", "TFLOP/s") else f"{name} {value}"
        for name, value in shown.items()
    )


@dataclass(frozen=True)
class _View:
    """The same for a terminal: a bar above as many columns as fit, drawn for the width that the terminal has now."""

    title: str
    shown: Mapping[str, str]
    step: int
    total: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # The two columns left over take the ^C that a terminal echoes: it would wrap, and move the view.
        width = max(1, options.max_width - 2)
        items = [
            Text.assemble((f"{name} ", "dim"), value, overflow="fold") for name, value in self.shown.items()
        ]
        # A bar ends without a line break; a padded one has its own line.
        bar = Padding(ProgressBar(total=self.total, completed=self.step), 0)
        panel = Panel(
            Group(bar, Columns(items, padding=(0, 2))),
            title=Text(_tail(self.title, width - 6)) if self.title else None,
            title_align="left",
            width=width,
        )
        # A note is printed without wrapping; the view below it must still wrap.
        yield from console.render(panel, options.update(no_wrap=False, overflow="fold"))


def _tail(text: str, width: int) -> str:
    """The end of `text` in `width` columns: the name of a run is the last part of its directory."""
    if cell_len(text) <= width:
        return text
    while text and cell_len(text) > width - 3:
        text = text[1:]
    return f"...{text}"


def describe_calibration(scores: Mapping[str, Any]) -> str:
    """`batch norm calibrated on 512 training images, without learning`."""
    return f"batch norm calibrated on {scores['calibration_images']:.0f} training images, without learning"


def describe_scores(scores: dict[str, Any]) -> str:
    """`knn_10 61.2%, knn_20 60.8%, majority 8.3%`; without labels `rankme 31.2, cluster_learnability 0.61`."""
    shown = [f"{k} {v:.1%}" for k, v in scores.items() if k.startswith("knn_") or k == "majority"]
    if shown:
        return ", ".join(shown)
    forms = {"rankme": ".1f", "lidar": ".1f", "cluster_learnability": ".2f", "intrinsic_dim": ".1f"}
    return ", ".join(f"{name} {scores[name]:{form}}" for name, form in forms.items() if name in scores)
