"""What a person sees: lines about steps and evaluations, with scores or without."""

import io

from rich.console import Console

from jobs.display import Display


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


def test_a_step_is_one_line() -> None:
    assert line() == "step 20/100  loss 5.250  entropy 4.50  310 images/s  data wait 2%"


def test_the_line_names_what_grows_nodes_actors_and_dollars() -> None:
    nodes = {"nodes_head": 1, "nodes_cpu": 3, "nodes_gpu": 0}
    text = line(**nodes, augment_actors=5, augment_target=8, dollars=1.234, bad_images=7)
    assert text.endswith(
        "data wait 2%  nodes 1 head + 3 cpu  augment actors 5 of 8  bad images 7  cost $1.23"
    )


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


def test_a_terminal_shows_the_same_in_place() -> None:
    text = io.StringIO()
    console = Console(file=text, width=80, force_terminal=True, color_system=None)
    with Display(console, title="runs/demo") as display:
        display.step(STEP | {"dollars": 2.5})
        display.eval({"step": 20, "knn_10": 0.5})
        display.step(STEP | {"step": 21, "dollars": 2.5})
    seen = text.getvalue()
    for piece in ("runs/demo", "step 21/100", "images/s 310", "cost $2.50", "k-NN 50.0% k=10"):
        assert piece in seen
    assert "evaluation after step 20: knn_10 50.0%" in seen
