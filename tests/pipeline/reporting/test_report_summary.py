"""The head of a report, in words: what was found, how far the run is, when, what stayed the same, what comes next."""

import html
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from report_runs import Page, jsonl, make_run, step_record, whole_run

from dinoray.jobs.cli.arguments import PretrainArguments, pretrain_config
from dinoray.jobs.cli.config import load_config
from dinoray.jobs.cli.recipes import RECIPES
from dinoray.jobs.runs.run_files import recipe_changes
from dinoray.models.errors import DataError
from dinoray.pipeline.reporting.run_report import build_report
from dinoray.pipeline.reporting.summary import duration
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.worker.config import Config
from dinoray.pipeline.worker.driver import _reported

BEGIN = 1_700_000_000  # 2023-11-14 22:13:20 UTC
SCORES = [{"step": s, "knn_10": a, "knn_20": a - 0.01, "majority": 0.1} for s, a in ((0, 0.2), (30, 0.5))]


def page_of(folder: Path, *records: dict[str, Any], ending: str = "", **files: Any) -> Page:
    run = make_run(folder, metrics_dot_jsonl=jsonl(*records), **files)
    return Page(build_report(run, ending=ending))


def timed(step: int, seconds: float, **changes: Any) -> dict[str, Any]:
    return step_record(step, time=BEGIN + seconds, **changes)


# The finding


@pytest.mark.parametrize(
    ("records", "ending", "words"),
    [
        (
            SCORES,
            "",
            "k-NN accuracy (k=20) rose from 19.0% before training to 49.0% after 30 steps. "
            "Always guessing the commonest class gives 10.0%.",
        ),
        (
            [SCORES[1], {"step": 60, "knn_20": 0.3}],
            "",
            "fell from 49.0% after 30 steps to 30.0% after 60 steps.",
        ),
        ([SCORES[0]], "", "k-NN accuracy (k=20) is 19.0% before training."),
        ([step_record(10), step_record(20)], "", "The loss fell from 4.900 to 4.800. There are no labels"),
        ([step_record(10)], "", "The run is not finished. The loss is 4.900. There are no labels"),
        (
            [step_record(10), step_record(20, verdict="uniform collapse"), SCORES[1]],
            "",
            "The run collapsed: uniform collapse since step 20. Its features are of little use. k-NN accuracy",
        ),
        (
            [step_record(10, verdict="non-finite")],
            "",
            "The run fails: loss or gradients have not been finite since step 10.",
        ),
        ([step_record(10)], "the disk is full", "The run ended early, after 10 steps. The loss"),
        ([step_record(1)], "the disk is full", "The run ended early, after 1 step. The loss"),
        ([], "the bucket is gone", "The run ended before its first step: the bucket is gone"),
        ([], "", "The run has no metrics yet."),
    ],
)
def test_the_page_begins_with_what_was_found(
    tmp_path: Path, records: list[dict[str, Any]], ending: str, words: str
) -> None:
    text = page_of(tmp_path, *records, ending=ending).text
    assert words in text
    assert text.index(words) < text.index("Settings")


# How far, and when


def test_the_page_says_which_evaluation_is_missing_and_where_quality_peaked(tmp_path: Path) -> None:
    lines = [*SCORES, {"step": 60, "knn_20": 0.3}, {"step": 90, "evaluation_missing": "no room for it"}]
    text = page_of(tmp_path, *lines).text
    assert "There is no evaluation of step 90: no room for it." in text
    assert (
        "Quality peaked at step 30 and has fallen by 19.0 points since: k-NN 49.0% (k=20), now 30.0%." in text
    )


def test_a_finished_run_has_its_dates(tmp_path: Path) -> None:
    page = page_of(
        tmp_path,
        timed(10, 60),
        timed(20, 120),
        environment_dot_json={"started": BEGIN},
        result_dot_json={"steps": 20, "ended": BEGIN + 9000},
    )
    assert "Finished after 20 steps." in page.text
    assert "Started 2023-11-14 22:13 UTC, ended 2023-11-15 00:43 UTC, duration 2.5 h." in page.text
    assert "Remaining" not in page.text


def test_a_run_of_an_earlier_version_has_the_dates_of_its_lines(tmp_path: Path) -> None:
    page = page_of(tmp_path, timed(10, 60), timed(20, 660), result_dot_json={"steps": 20})
    assert "Started 2023-11-14 22:14 UTC, ended 2023-11-14 22:24 UTC, duration 10 min." in page.text
    assert "Started" not in page_of(tmp_path / "b", step_record(10)).text


def test_a_running_run_says_how_long_the_rest_takes(tmp_path: Path) -> None:
    """4 epochs of 10 steps; 3 s a step, but for an evaluation of two minutes."""
    times = {step: step * 3 + (120 if step > 9 else 0) for step in range(1, 13)}
    page = page_of(tmp_path, *(timed(step, seconds) for step, seconds in times.items()))
    assert (
        "Not finished: step 12, epoch 1.2 of 4. Remaining: 28 steps, about 84 s at the latest speed; "
        "expected end 2023-11-14 22:17 UTC." in page.text
    )
    assert "Started 2023-11-14 22:13 UTC, latest metrics 2023-11-14 22:15 UTC, duration 3 min." in page.text


@pytest.mark.parametrize(
    "records",
    [
        [step_record(12)],
        [timed(12, 0)],
        [timed(12, 0), timed(13, 0)],
        [timed(12, 5), timed(13, 0)],
        [timed(12, 0, epoch="nan"), timed(13, 5, epoch="nan")],
        [timed(12, 0, epoch=0), timed(13, 5, epoch=0)],
        [timed(12, -1e30), timed(13, 1e30)],
    ],
)
def test_no_time_is_made_up(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    text = page_of(tmp_path, *records).text
    assert "Not finished: step 1" in text
    assert "Remaining:" not in text or "1e" not in text.split("Remaining:")[1][:60]


def test_a_run_whose_steps_are_all_done_is_not_called_unfinished(tmp_path: Path) -> None:
    text = page_of(tmp_path, timed(39, 0), timed(40, 5)).text
    assert "All 40 steps are done" in text
    assert "Not finished" not in text


def test_a_run_that_an_error_ends_says_so_on_its_page(tmp_path: Path) -> None:
    run = make_run(tmp_path, metrics_dot_jsonl=jsonl(timed(11, 0), timed(12, 5)))
    with pytest.raises(DataError), _reported(run):
        raise DataError("s3://me:secret@bucket is gone")
    text = Page((tmp_path / "report.html").read_text()).text
    assert "The run ended early, after 12 steps." in text
    assert "Not finished: step 12, epoch 1.2 of 4. Ended by: s3://...@bucket is gone" in text
    assert "Remaining" not in text
    with pytest.raises(KeyboardInterrupt), _reported(run):
        raise KeyboardInterrupt
    assert "Ended by: Ctrl-C or SIGTERM" in Page((tmp_path / "report.html").read_text()).text


@pytest.mark.parametrize(("seconds", "words"), [(0, "0 s"), (99.4, "99 s"), (100, "2 min"), (6000, "1.7 h")])
def test_times_are_said_in_few_digits(seconds: float, words: str) -> None:
    assert duration(seconds) == words


# Contents


def test_the_list_of_contents_leads_to_every_section(tmp_path: Path) -> None:
    page = Page(build_report(whole_run(tmp_path)))
    sections = [attributes["id"] for attributes in page.all("section")]
    assert [attributes["href"] for attributes in page.all("a")] == [f"#{name}" for name in sections]
    assert len(set(sections)) == len(sections) >= 8
    assert page.contents[:2] == ["Curves", "Health"]
    assert all(words in page.text for words in page.contents)


# What stays the same


def test_what_is_constant_is_a_line_and_no_chart(tmp_path: Path) -> None:
    records = [step_record(s, lr=s / 1000, nodes_head=1, nodes_cpu=0, data_wait=0.25) for s in range(1, 9)]
    text = build_report(make_run(tmp_path, metrics_dot_jsonl=jsonl(*records)))
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    assert titles[:3] == [
        "Loss, and KL divergence of teacher and student (nats)",
        "Teacher entropy (nats)",
        "Learning rate",
    ]
    lines = [html.unescape(line) for line in re.findall(r'<p class="constant">(.*?)</p>', text)]
    assert lines[0] == "Constant: Teacher momentum 0.99; Teacher temperature 0.04."
    assert lines[1] == "Constant: Gradient norm 1."
    assert lines[2] == "Constant: Time spent waiting for data 25%; Running nodes: head 1."
    assert not {"Teacher temperature", "Running nodes"} & set(titles)


@pytest.mark.parametrize("values", [[0.04], [0.04, 0.0400001], [0.04, "nan", 0.04], [0.04, 0.05]])
def test_one_reading_a_change_and_a_gap_are_drawn(tmp_path: Path, values: list[Any]) -> None:
    records = [step_record(step, teacher_temp=value) for step, value in enumerate(values, start=1)]
    text = build_report(make_run(tmp_path, metrics_dot_jsonl=jsonl(*records)))
    assert "<figcaption>Teacher temperature</figcaption>" in text


# What RankMe is worth


@pytest.mark.parametrize(
    ("labels", "words"),
    [(True, "judge this run by k-NN accuracy"), (False, "The evaluation images have no labels.")],
)
def test_a_fall_of_rankme_is_explained(tmp_path: Path, labels: bool, words: str) -> None:
    records = [
        {"step": step, "rankme": value, **({"knn_20": 0.3, "majority": 0.1} if labels else {})}
        for step, value in ((0, 28.04), (30, 9.3))
    ]
    text = page_of(tmp_path, *records, step_record(30, verdict="healthy")).text
    section = text.split("Health")[1]
    assert "RankMe in this run: first 28.0, latest 9.3." in section
    assert "A lower RankMe therefore does not mean a worse network." in section
    assert words in section
    assert "healthyno sign of collapse" in section
    assert "RankMe" not in page_of(tmp_path / "b", step_record(3, verdict="healthy")).text


# What comes next


def test_commands_have_the_runs_own_addresses(tmp_path: Path) -> None:
    folder = tmp_path / "my runs"
    snapshot = {"checkpoint_results": [{"checkpoint_dir_name": "step_00000030"}]}
    whole_run(folder)
    run = make_run(folder, checkpoints__checkpoint_manager_snapshot_dot_json=snapshot)
    assert "evaluate" not in build_report(run).partition("Next commands")[2]  # the checkpoint is gone
    (folder / "checkpoints" / "step_00000030").mkdir()
    (commands,) = re.findall(r'<section id="next-commands">.*?</section>', build_report(run), re.DOTALL)
    assert "resume" not in commands
    lines = [shlex.split(html.unescape(line)) for line in re.findall(r"<code>(.*?)</code>", commands)]
    assert {line[0] for line in lines} == {"dinoray"}
    assert [line[1] for line in lines] == ["evaluate", "attention", "export", "embed"]
    assert all(line[2] == str(folder) for line in lines)
    assert lines[1][3:] == ["/images", "--animate"]
    assert lines[3][3:] == ["/images", "--out", f"{folder}/embeddings"]


def asked_for(recipe: str, storage: str) -> Config:
    given = ["data.path=/my images/a b", "optim.base_lr=1e-3", "resources.augment_actors=[1, 2]"]
    given += ["backbone.name=vit_small_patch16_224", "crops.blur_sigma=[0.1, 0.5]", "name=second"]
    return load_config(recipe, None, [*given, f"storage_path={storage}"])


def resumed(run: Directory) -> Config:
    """The config that the page's line asks for."""
    (line,) = re.findall(r"<dt>resume</dt><dd><code>(.*?)</code>", build_report(run))
    arguments = shlex.split(html.unescape(line))
    assert arguments[:2] == ["dinoray", "pretrain"]
    return pretrain_config(PretrainArguments().parse_args(arguments[2:]))


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_line_that_resumes_asks_for_the_same_config(tmp_path: Path, recipe: str) -> None:
    config = asked_for(recipe, str(tmp_path))
    files = {"config_dot_yaml": config.to_yaml(), "metrics_dot_jsonl": jsonl(step_record(3))}
    assert resumed(make_run(tmp_path / "my second", **files)) == config


@pytest.mark.s3
def test_the_line_that_resumes_a_run_on_s3_asks_for_the_same_config(bucket: str) -> None:
    run, config = Directory(f"s3://{bucket}/runs/second"), asked_for("demo", f"s3://{bucket}/runs")
    run.write("config.yaml", config.to_yaml().encode())
    run.write("metrics.jsonl", jsonl(step_record(3)))
    run.write(
        "environment.json",
        json.dumps({"recipe": {"name": "demo", "changed": recipe_changes(config)}}).encode(),
    )
    assert resumed(run) == config
    run.write("environment.json", b"{}")
    assert "repeat the command that started the run" in build_report(run)


# The line to beat


def start_run(*scores: tuple[float, float, float]) -> list[dict[str, Any]]:
    """Evaluations at steps 0, 10, 20, ...: k-NN, RankMe and intrinsic dimension."""
    return [
        {"step": 10 * i, "knn_20": knn, "majority": 0.1, "num_val": 500, "rankme": rank}
        | {"cluster_learnability": 0.5, "intrinsic_dim": dim}
        for i, (knn, rank, dim) in enumerate(scores)
    ]


def test_each_curve_of_an_evaluation_has_a_line_at_the_start(tmp_path: Path) -> None:
    run = make_run(
        tmp_path,
        metrics_dot_jsonl=jsonl(*start_run((0.3, 90, 8), (0.4, 80, 9), (0.5, 70, 10)), step_record(20)),
    )
    text = build_report(run)
    for title in (
        "k-NN accuracy of the teacher",
        "RankMe: effective rank",
        "Intrinsic dimension, half of CLID",
    ):
        assert ">start<" in text.split(f"<figcaption>{title}")[1].split("</svg>")[0], title
    assert ">start<" not in text.split("<figcaption>Loss")[1].split("</svg>")[0]


def test_a_run_that_is_worse_than_its_start_says_so_first(tmp_path: Path) -> None:
    records = [*start_run((0.5, 90, 8), (0.3, 80, 8)), step_record(20, verdict="worse than the start")]
    text = page_of(tmp_path, *records).text
    assert "The run is worse than its start since step 20." in text
    assert "worse than the start since step 20: training makes the features worse" in text


def test_the_page_shows_how_each_metric_without_labels_agreed_with_knn(tmp_path: Path) -> None:
    scores = [(0.3, 90, 8), (0.4, 80, 9), (0.5, 70, 10), (0.6, 60, 11)]
    section = page_of(tmp_path, *start_run(*scores)).text.split("Health")[-1]
    assert (
        "Agreement with k-NN over the evaluations of this run (Kendall's tau): RankMe -1.00, CLID +1.00."
        in section
    )
    assert "RankMe need not follow it: it may fall while k-NN rises." in section
    assert "Agreement" not in page_of(tmp_path / "b", *start_run(*scores[:3])).text
