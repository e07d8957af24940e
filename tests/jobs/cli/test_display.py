"""What a person sees: lines about steps and evaluations, and a view that stays in place on a terminal."""

import io
import json
import re
from collections.abc import Callable

import pytest
from rich.console import Console
from terminal import Terminal, terminal

from dinoray.jobs.cli.display import Display


def shown(*events: dict) -> str:
    """What is printed of evaluations where there is no terminal."""
    text = io.StringIO()
    with Display(Console(file=text, width=200)) as display:
        for event in events:
            display.eval(event)
    return text.getvalue()


def test_an_evaluation_shows_its_scores() -> None:
    text = shown({"step": 7, "knn_10": 0.5, "majority": 0.25, "rankme": 12.5})
    assert "evaluation after step 7: knn_10 50.0%, majority 25.0%" in text


def test_an_evaluation_without_labelled_images_shows_nothing_and_does_no_harm() -> None:
    assert "evaluation" not in shown({"step": 7})


STEP = {
    "step": 20,
    "total_steps": 100,
    "loss": 5.25,
    "teacher_entropy": 4.5,
    "images_per_second": 310.4,
    "data_wait": 0.025,
    "bad_images": 0,
}


def line(**facts: float) -> str:
    """What is printed of a step where there is no terminal."""
    text = io.StringIO()
    with Display(Console(file=text, width=200)) as display:
        display.step(STEP | facts)
    return text.getvalue().splitlines()[-1]


def test_a_gpu_shows_what_it_does_and_what_lies_ready_for_it() -> None:
    text = line(staged_bytes=66_800_000, tflops=312.4, mfu=0.447)
    assert "data wait 2%  staged 67 MB  312 TFLOP/s  MFU 45%" in text
    assert "staged" not in line()


def test_a_step_is_one_line() -> None:
    assert line() == "step 20/100  loss 5.250  entropy 4.50  310 images/s  data wait 2%"


def test_the_line_names_what_grows_nodes_actors_and_dollars() -> None:
    nodes = {"nodes_head": 1, "nodes_cpu": 3, "nodes_gpu": 0}
    text = line(**nodes, augment_actors=5, augment_target=8, dollars=1.234, bad_images=7)
    assert text.endswith(
        "data wait 2%  nodes 1 head + 3 cpu  augment actors 5 of 8  bad images 7  cost $1.23"
    )


def test_what_could_not_be_written_is_shown() -> None:
    text = line(unsaved={"s3://b/run/metrics.jsonl": 5.2, "s3://b/run/meta.json": 41.7})
    assert text.endswith("data wait 2%  not written 2 files for 42 s")


def test_a_machine_of_its_own_is_no_news() -> None:
    assert line(nodes_head=1, nodes_cpu=0, nodes_gpu=0, augment_actors=1, augment_target=1) == line()


def test_the_rest_of_the_time_is_told_from_the_second_step_on() -> None:
    text = io.StringIO()
    with Display(Console(file=text, width=200)) as display:
        display.step(STEP)
        display.step(STEP | {"step": 100})
    first, last = text.getvalue().splitlines()[1:]
    assert "ETA" not in first
    assert last.endswith("ETA 0:00:00")


PROGRAM = """
import json, sys
from rich.console import Console
from dinoray.jobs.cli.display import Display

with Display(Console(), title=sys.argv[1]) as display:
    for line in sys.stdin:
        event, fact = json.loads(line)
        getattr(display, event)(fact)
print("this comes after the run")
"""
"""Shows the events that it reads."""
TITLE = "s3://bucket/experiments/runs/demo"
BUSY = {"nodes_head": 1, "nodes_cpu": 3, "nodes_gpu": 2, "augment_actors": 5, "augment_target": 8} | {
    "dollars": 1.234,
    "bad_images": 7,
}
PIECES = [
    *("step 21/100", "loss 5.250", "entropy 4.50", "images/s 310", "data wait 2%"),
    *("nodes 1 head + 3 cpu + 2 gpu", "augment actors 5 of 8", "bad images 7", "k-NN 50.0% k=10"),
    "cost $1.23",
]
NOTE = "warning: " + " ".join(f"word{i}" for i in range(60))
"""Longer than any of the terminals is wide."""


def send(screen: Terminal, event: str, fact: object) -> None:
    screen.send(json.dumps([event, fact]))


def view_of(lines: list[str]) -> list[str]:
    """The rows between the borders of the view, without them. There is one view, and each of its rows is whole."""
    top = [i for i, line in enumerate(lines) if "╭" in line]
    bottom = [i for i, line in enumerate(lines) if "╰" in line]
    assert len(top) == len(bottom) == 1, "\n".join(lines)
    view = lines[top[0] : bottom[0] + 1]
    assert len({len(row) for row in view}) == 1, "\n".join(lines)
    assert view[0][0] + view[0][-1] + view[-1][0] + view[-1][-1] == "╭╮╰╯"
    for row in view[1:-1]:
        assert row[:2] == "│ ", row
        assert row[-2:] == " │", row
    bar, *rows = (row[2:-2] for row in view[1:-1])
    assert set(bar) <= set("━╸╺ "), bar
    return rows


def has(piece: str) -> Callable[[list[str]], bool]:
    """Whether `piece` is shown, and the view to its last row."""
    return lambda lines: any(piece in line for line in lines) and "╯" in lines[-1]


@pytest.mark.parametrize("columns", [40, 60, 80, 120, 200])
def test_a_terminal_of_any_width_shows_all_values_below_the_bar(columns: int) -> None:
    with terminal(PROGRAM, TITLE, columns=columns) as screen:
        send(screen, "step", STEP | BUSY)
        view_of(screen.wait_until(has("step 20/100")))
        send(screen, "eval", {"step": 20, "knn_10": 0.5})
        send(screen, "note", NOTE)
        send(screen, "step", STEP | BUSY | {"step": 21})
        running = screen.wait_until(has("step 21/100"))
        ended = screen.end()
    for lines in (running, ended):
        rows = view_of(lines)
        for piece in PIECES:
            assert any(piece in row for row in rows), "\n".join(lines)
        above = [
            line.ljust(columns) for line in lines[: next(i for i, row in enumerate(lines) if "╭" in row)]
        ]
        note = next(i for i, line in enumerate(above) if line.startswith("warning:"))
        assert "".join(above[note:]).strip() == NOTE
        assert above[note - 1].strip() == "evaluation after step 20: knn_10 50.0%"
    assert "/experiments/runs/demo ─" in "\n".join(ended)
    assert ended[-1] == "this comes after the run"
    assert "╯" in ended[-2]


def test_a_title_that_is_too_long_keeps_its_end() -> None:
    with terminal(PROGRAM, f"s3://{'bucket' * 20}/runs/demo-7", columns=80) as screen:
        send(screen, "step", STEP)
        lines = screen.wait_until(has("step 20/100"))
    view_of(lines)
    assert re.fullmatch(r"╭─ \.\.\.[bucket]*bucket/runs/demo-7 ─╮", lines[0]), lines[0]


def test_the_view_follows_the_window_to_another_size() -> None:
    with terminal(PROGRAM, TITLE, columns=120) as screen:
        send(screen, "step", STEP | BUSY)
        screen.wait_until(has("step 20/100"))
        for step, columns in ((30, 60), (40, 200), (50, 80)):
            screen.resize(columns, 40)
            send(screen, "step", STEP | BUSY | {"step": step})
            screen.wait_until(has(f"step {step}/100"))
        lines = screen.end()
    rows = view_of(lines)
    assert len(lines[-2]) == 78
    for piece in ("step 50/100", "loss 5.250", "entropy 4.50", "cost $1.23"):
        assert any(piece in row for row in rows)


def test_a_key_that_the_terminal_echoes_does_not_move_the_view() -> None:
    with terminal(PROGRAM, TITLE, columns=80) as screen:
        send(screen, "step", STEP)
        screen.wait_until(has("step 20/100"))
        screen.press(b"\x03")
        screen.wait_until(has("^C"))
        send(screen, "note", "stopping")
        send(screen, "step", STEP | {"step": 21})
        screen.wait_until(has("step 21/100"))
        lines = screen.end()
    view_of(lines)
    assert lines[0] == "stopping"
    assert "^C" not in "\n".join(lines)


def test_notes_that_scroll_out_of_the_window_are_there_once_and_whole() -> None:
    with terminal(PROGRAM, TITLE, columns=80, rows=12) as screen:
        for i in range(30):
            send(screen, "step", STEP | {"step": i + 1})
            send(screen, "note", f"note {i}")
        screen.wait_until(has("step 30/100"))
        lines = screen.end()
    view_of(lines)
    assert [line for line in lines if line.startswith("note")] == [f"note {i}" for i in range(30)]


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines() -> None:
    with terminal(PROGRAM, TITLE, columns=120, term="dumb") as screen:
        send(screen, "step", STEP)
        send(screen, "step", STEP | {"step": 100})
        lines = screen.end()
    assert [line.split("  loss")[0] for line in lines] == [
        "starting the workers",
        "step 20/100",
        "step 100/100",
        "this comes after the run",
    ]
