"""What a study leaves for people: page, table, picture and lines, at any moment and whatever its files hold."""

import csv
import io
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from report_runs import Page
from studies import SPACE, about, tried, write_tried, write_whole_study

from dinoray.pipeline.figures.palette import DARK, LIGHT, TOKENS
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.study.findings.summary import findings
from dinoray.pipeline.study.page.axes import score_range, ticks
from dinoray.pipeline.study.page.plots import curve_charts, importance_bars, parallel_coordinates
from dinoray.pipeline.study.page.score_map import expected, score_map
from dinoray.pipeline.study.page.study_report import describe_study, write_study_report
from dinoray.pipeline.study.space import CENTER_MOMENTUM, TEACHER_TEMP, Domain
from dinoray.pipeline.study.trials import TrialRecord, read_study, read_trials, write_study


def write_small(folder: Path, trials: list[TrialRecord], metrics: bytes = b"", **changes: Any) -> Directory:
    study = Directory(str(folder))
    for one in trials:
        write_tried(study, one, metrics)
    write_study(study, about(**changes))
    return study


def page_of(study: Directory) -> Page:
    write_study_report(study)
    return Page(study.read("study.html").decode())


def rows_of(study: Directory) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(study.read("study.csv").decode())))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Directory:
    study = write_whole_study(tmp_path_factory.mktemp("study"))
    study.write("best.yaml", b"loss:\n  teacher_temp: 0.0377\n")
    write_study_report(study)
    return study


def test_a_whole_study_has_every_section(whole: Directory) -> None:
    page = Page(whole.read("study.html").decode())
    for heading in (
        *(
            "Findings",
            "Map",
            "Curves",
            "Parallel coordinates",
            "Importance of settings",
            "Agreement of metrics",
        ),
        *("Candidates", "Collapsed trials", "Errors", "All trials", "Best config", "Settings"),
        *("k-NN (k=20)", "RankMe: effective rank of the features", "teacher entropy / ln K"),
    ):
        assert heading in page.text, heading
    assert "tied with the best" in page.text
    assert "teacher_temp: 0.0377" in page.text
    assert f"dinoray pretrain --from-study {whole.uri}" in page.text
    assert "there are labels" in page.text
    found = findings(read_trials(whole), read_study(whole))
    for sentence in found.words:
        assert sentence in page.text
    assert len(page.all("svg")) == 6


def test_a_page_asks_nothing_of_the_network_and_runs_nothing(whole: Directory) -> None:
    text = whole.read("study.html").decode()
    page = Page(text)
    assert not page.all("script")
    assert not page.all("link")
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]
    addresses = re.findall(r"""(?:src|href)=["']([^"']*)""", text)
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert "url(http" not in text


def test_drawings_take_the_pages_colours(whole: Directory) -> None:
    text = whole.read("study.html").decode()
    assert not any(token in text for token in TOKENS.values())
    assert "var(--scale-9)" in text
    assert LIGHT.keys() == DARK.keys()
    assert all(
        f"--{name}: {colour};" in text for palette in (LIGHT, DARK) for name, colour in palette.items()
    )


def test_the_table_has_a_row_a_trial_with_what_was_recorded(whole: Directory) -> None:
    rows, trials = rows_of(whole), read_trials(whole)
    assert len(rows) == len(trials) == 32
    for row, one in zip(rows, trials, strict=True):
        assert (int(row["number"]), row["status"], row["seed"]) == (
            one.trial.number,
            one.status,
            str(one.trial.seed),
        )
        assert row["confirms"] == ("" if one.trial.confirms is None else str(one.trial.confirms))
        for key, value in one.trial.params.items():
            assert row[key] == str(value)
        if one.outcome and one.status != "failed":
            assert float(row["score"]) == one.outcome.score
            assert float(row["rankme"]) == one.outcome.scores["rankme"]
            assert float(row["cpu_hours"]) == one.outcome.cpu_hours
    assert list(rows[0])[:6] == ["number", "status", "verdict", "origin", "seed", "confirms"]
    assert rows[30]["message"] == "bucket is gone: <b>s3://x</b>"
    assert rows[31]["status"] == "unfinished"


def test_the_picture_is_one_for_a_readme(whole: Directory) -> None:
    image = Image.open(io.BytesIO(whole.read("study.png")))
    image.load()
    assert (image.format, image.size) == ("PNG", (1650, 780))
    pixels = np.asarray(image.convert("RGB"))
    assert (pixels[0, 0] == 255).all()
    assert pixels.std() > 10


def test_lines_for_a_terminal_say_the_same(whole: Directory) -> None:
    text = describe_study(whole)
    found = findings(read_trials(whole), read_study(whole))
    assert found.best is not None
    assert text.startswith("study sweep\n\ntrial  k-NN (k=20)")
    assert text.splitlines()[3].startswith(f"{found.best.name}   {found.best.mean:.1%} ± ")
    assert all(sentence in text.splitlines() for sentence in found.words)
    assert text.splitlines()[-1] == "Reserved: 9.12 CPU-hours, 2.03 GPU-hours in 90 min."
    assert f"and {len(found.candidates) - 10} more in" in text


def test_the_same_files_make_the_same_page(whole: Directory) -> None:
    before = {name: whole.read(name) for name in ("study.html", "study.csv", "study.png")}
    write_study_report(whole)
    assert {name: whole.read(name) for name in before} == before


def test_a_study_without_labels_is_told_by_rankme(tmp_path: Path) -> None:
    study = write_whole_study(tmp_path, labels=False, num=9)
    page = page_of(study)
    assert "necessary for good features, not sufficient" in page.text
    assert "k-NN (k=" not in page.text
    assert "knn_20" not in rows_of(study)[0]


POINT = {TEACHER_TEMP: 0.05, CENTER_MOMENTUM: 0.9, "optim.name": "adamw"}


@pytest.mark.parametrize(
    ("trials", "words"),
    [
        ([], "No trial has been started yet."),
        ([tried(0, params=POINT)], "by other seeds. No other trial finished without a collapse."),
        (
            [tried(0, params=POINT), tried(1, 0.4, params=POINT)],
            "with one seed, not confirmed by other seeds.",
        ),
        ([tried(0, status="unfinished", params=POINT)], "Unfinished: 1 trial;"),
        ([tried(i, 0.0, "collapsed", params=POINT) for i in range(2)], "all 2 ended trials collapsed"),
        ([tried(i, None, "failed", params=POINT) for i in range(2)], "all 2 ended trials failed"),
        (
            [tried(i, s, params=POINT) for i, s in enumerate((math.nan, math.inf, -math.inf))],
            "There is no best trial",
        ),
        ([tried(0, params={})], "The best trial is 0000: k-NN"),
    ],
    ids=["none", "one", "two", "unfinished", "collapsed", "failed", "not finite", "no settings"],
)
def test_a_study_in_any_state_has_a_page(tmp_path: Path, trials: list[TrialRecord], words: str) -> None:
    study = write_small(tmp_path, trials)
    assert words in page_of(study).text
    assert words in describe_study(study)
    assert len(rows_of(study)) == len(trials)
    Image.open(io.BytesIO(study.read("study.png"))).load()


def test_damage_is_left_out(tmp_path: Path) -> None:
    metrics = b'{"step": 1, "knn_20": 0.1}\nnot json\n{"step": 2, "knn_20": "nan"}\n{"step": 3, "knn_20": 0.3}\n{"st'
    study = write_small(tmp_path, [tried(i, 0.1 * i, params=POINT) for i in range(3)], metrics)
    study.write("study.json", b'{"name": "swe')
    page = page_of(study)
    assert "The best trial is 0002" in page.text
    assert "Curves" in page.text
    study.write(
        "study.json", b'{"space": {"a": {"kind": "spiral"}, "b": 3}, "total_steps": "many", "plan": []}'
    )
    assert "The best trial is 0002" in page_of(study).text


def test_hostile_names_are_text(tmp_path: Path) -> None:
    key, value = "a.<script>alert(1)</script>", "$x^{</svg><img src=x onerror=y>\x07\udce9"
    space = {key: Domain(kind="choice", values=(value, "b")), TEACHER_TEMP: SPACE[TEACHER_TEMP]}
    trials = [tried(i, 0.1 * i, params={key: (value, "b")[i % 2], TEACHER_TEMP: 0.03}) for i in range(9)]
    trials.append(tried(9, None, "failed", message='"><script>x</script>'))
    study = write_small(tmp_path, trials, space=space, name="<h1>&amp;</h1>")
    page = page_of(study)
    assert not page.all("script")
    assert not page.all("img")
    assert "<h1>&amp;</h1>" in page.text
    assert [row[key][:6] for row in rows_of(study)] == [value[:6], "b"] * 4 + [value[:6], ""]
    assert describe_study(study)


# Drawings


def drawn(trials: list[TrialRecord], space: dict[str, Domain] | None = None, **changes: Any) -> str:
    return score_map(trials, findings(trials, about(space, **changes)))


def test_the_map_shows_each_verdict_and_what_was_given_up() -> None:
    trials = [
        tried(0, 0.5, params=POINT),
        tried(1, 0.4, "stopped", params=POINT | {TEACHER_TEMP: 0.03}),
        tried(2, 0.0, "collapsed", params=POINT | {TEACHER_TEMP: 0.08}),
        tried(
            3, 0.0, "collapsed", params=POINT | {CENTER_MOMENTUM: 0.5}, verdict="single-prototype collapse"
        ),
    ]
    text = drawn(trials)
    for words in (
        *(
            ">finished<",
            ">early-stopped<",
            "uniform collapse",
            "single-prototype collapse",
            "best",
        ),
        *("loss.teacher_temp", "loss.center_momentum", ">0000<", ">0.95<", ">0.05<"),
    ):
        assert words in text, words


def test_members_of_a_population_are_replaced_not_given_up() -> None:
    trials = [
        tried(0, 0.3, "stopped", params=POINT, origin="pb2"),
        tried(1, 0.5, params=POINT | {TEACHER_TEMP: 0.03}, origin="pb2"),
    ]
    text = drawn(trials)
    assert "replaced by copies of better trials" in text
    assert "early-stopped" not in text


def test_each_verdict_has_its_own_sign() -> None:
    def signs(verdict: str) -> set[str]:
        text = drawn([tried(0, 0.0, "collapsed", params=POINT, verdict=verdict)])
        return set(re.findall(r'<path id="[^"]*" d="([^"]*)" style="stroke: var\(--warn\)', text))

    found = [signs(verdict) for verdict in ("uniform collapse", "single-prototype collapse", "non-finite")]
    assert all(found)
    assert not found[0] & found[1]
    assert not found[1] & found[2]
    assert not found[0] & found[2]


def test_a_map_whose_trials_share_a_value_is_drawn() -> None:
    trials = [tried(i, 0.1 * i, params=POINT | {CENTER_MOMENTUM: 0.5 + 0.05 * i}) for i in range(8)]
    assert "loss.teacher_temp" in drawn(trials)
    alone = [tried(i, 0.5, params=POINT) for i in range(8)]
    assert "loss.teacher_temp" in drawn(alone)


def test_one_setting_makes_a_scatter_and_none_no_map() -> None:
    space = {"optim.base_lr": Domain(kind="log", values=(1e-4, 1e-2))}
    trials = [tried(i, 0.1 * i, params={"optim.base_lr": 1e-4 * 2**i}) for i in range(4)]
    text = drawn(trials, space)
    assert "optim.base_lr" in text
    assert "k-NN (k=20)" in text
    assert drawn([tried(0)], {"a": Domain(kind="uniform", values=(0, 1))})
    assert score_map([tried(0)], findings([tried(0)], {})) == ""
    assert drawn([tried(0, status="unfinished", params=POINT)]) == ""


def test_the_ground_is_near_what_was_measured() -> None:
    across = np.linspace(0, 1, 5)
    ground = expected(np.array([[0.0, 0.0, 1.0], [1.0, 1.0, 0.0]]), across)
    assert ground[0, 0] == pytest.approx(1.0, abs=0.01)
    assert ground[-1, -1] == pytest.approx(0.0, abs=0.01)
    assert ground[2, 2] == pytest.approx(0.5)
    assert ((ground >= 0) & (ground <= 1)).all()


@pytest.mark.parametrize(
    ("domain", "labels"),
    [
        (SPACE[TEACHER_TEMP], ["0.02", "0.03", "0.04", "0.05", "0.06", "0.07", "0.08"]),
        (SPACE[CENTER_MOMENTUM], ["0.5", "0.8", "0.9", "0.95", "0.98", "0.99"]),
        (
            Domain(kind="log", values=(1e-4, 1e-2)),
            ["0.0001", "0.0002", "0.0005", "0.001", "0.002", "0.005", "0.01"],
        ),
        (Domain(kind="log", values=(0.31, 0.42)), ["0.31", "0.42"]),
        (Domain(kind="int", values=(1, 3)), ["1", "2", "3"]),
        (Domain(kind="choice", values=(True, "auto", 3)), ["True", "auto", "3"]),
    ],
)
def test_ticks_are_round_values_where_they_lie(domain: Domain, labels: list[str]) -> None:
    marks = ticks(domain)
    assert [mark.label for mark in marks] == labels
    assert [mark.place for mark in marks] == sorted(mark.place for mark in marks)
    if domain.kind != "choice":
        assert [mark.place for mark in marks] == pytest.approx([domain.place(float(x)) for x in labels])


def test_colours_tell_finished_trials_apart_whatever_the_scores() -> None:
    scores = score_range([tried(0, 0.2), tried(1, 0.8), tried(2, 0.0, "stopped"), tried(3, 0.0, "collapsed")])
    assert scores is not None
    assert (scores.level(0.2), scores.level(0.8), scores.level(-9.0), scores.level(9.0)) == (0, 8, 0, 8)
    assert 0.1 < scores.low < 0.2 < 0.8 < scores.high < 0.9
    flat = score_range([tried(0, 0.0)])
    assert flat is not None
    assert flat.low < 0 < flat.high
    assert score_range([tried(0, None, "failed")]) is None


def test_nothing_is_drawn_of_nothing() -> None:
    found = findings([], about())
    assert score_map([], found) == parallel_coordinates([], found) == importance_bars(found) == ""
    assert list(curve_charts([], found)) == []
