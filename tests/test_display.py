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
