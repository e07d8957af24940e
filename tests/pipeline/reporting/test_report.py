"""The report: one page that needs nothing else, at any moment of a run, whatever its files hold."""

from pathlib import Path
from typing import Any

import pytest
from report_runs import Page, jsonl, make_run, png, step_record, whole_run

from dinoray.models.errors import ConfigError
from dinoray.models.settings import flatten
from dinoray.pipeline.reporting.page import escape
from dinoray.pipeline.reporting.run_report import LiveReport, build_report, write_report
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.training.verdict import Verdict


def test_a_finished_run_has_every_section(tmp_path: Path) -> None:
    page = Page(build_report(whole_run(tmp_path)))
    assert page.text.count("Finished after 30 steps.") == 1
    for heading in (
        *("Curves", "Health", "Attention maps", "Crops", "Bad images", "Scores", "Settings"),
        *(
            "Loss, and KL divergence of teacher and student (nats)",
            "Teacher entropy (nats)",
            "k-NN accuracy of the teacher",
        ),
        *("Learning rate", "Teacher temperature", "Teacher momentum", "Images per second"),
        *(
            "Time spent waiting for data",
            "Mutual information of image and prototype (nats)",
            "Standard deviation of the features",
        ),
    ):
        assert heading in page.text, heading
    assert "uniform: ln K = 4.16" in page.text
    assert "k-NN, k=2049.0%initially 19.0%, majority guess 10.0%" in page.text
    assert "teacher entropy40%" in page.text
    assert "images/s130latest value; with free data it would be 173" in page.text
    assert "data wait25%" in page.text
    assert "Rows of quarantine.jsonl: first 20 of 50" in page.text
    assert "19.jpg" in page.text
    assert "20.jpg" not in page.text
    assert "evaluation_step_00000030.json" in page.text
    assert "0.481" in page.text
    assert "3.11.1" in page.text
    assert len(page.all("img")) == 3
    assert "warning" not in [attributes.get("class") for attributes in page.all("p")]


def test_a_page_asks_nothing_of_the_network(tmp_path: Path) -> None:
    text = build_report(whole_run(tmp_path))
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), tag
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                assert value is not None
                assert value.startswith(("data:image/", "#")), (tag, value[:80])
    assert "@import" not in text
    assert text.count("url(") == text.count("url(#")


def test_the_page_is_a_function_of_the_files(tmp_path: Path, drawn_charts: dict[bytes, str]) -> None:
    run = whole_run(tmp_path)
    page = build_report(run)
    drawn_charts.clear()
    assert build_report(run) == page


def test_the_report_is_written_into_the_run(tmp_path: Path) -> None:
    run = whole_run(tmp_path)
    assert write_report(run) == str(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == build_report(run)


def test_a_live_report_takes_a_twentieth_of_the_time(tmp_path: Path) -> None:
    run, page = whole_run(tmp_path), tmp_path / "report.html"
    times = iter(
        [0.0, 2.0, 39.9, 40.0, 50.0, 239.0, 240.0, 241.0]
    )  # two seconds, too early, ten, too early, one
    report, written = LiveReport(run, clock=lambda: next(times)), []
    for _ in range(5):
        page.unlink(missing_ok=True)
        report.update()
        written.append(page.exists())
    assert written == [True, False, True, False, True]


# Any moment


def test_a_run_without_metrics_has_a_page(tmp_path: Path) -> None:
    page = Page(build_report(make_run(tmp_path)))
    assert "No metrics yet." in page.text
    assert "/images" in page.text
    for absent in ("Curves", "Health", "Crops", "Bad images", "Attention maps", "Scores"):
        assert absent not in page.text


@pytest.mark.parametrize("record", [step_record(1), {"step": 0, "knn_10": 0.2, "majority": 0.1}])
def test_a_run_with_one_line_has_a_page(tmp_path: Path, record: dict[str, Any]) -> None:
    text = Page(build_report(make_run(tmp_path, metrics_dot_jsonl=jsonl(record)))).text
    assert f"Not finished: step {record['step']}" in text


def test_a_running_run_says_how_far_it_is(tmp_path: Path) -> None:
    run = make_run(tmp_path, metrics_dot_jsonl=jsonl(step_record(12)) + b'{"step": 13, "lo')
    text = Page(build_report(run)).text
    assert "Not finished: step 12, epoch 1.2 of 4." in text
    assert "Unreadable lines" not in text  # the last line is just being written


def test_a_folder_that_is_no_run_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"is not a run directory: it has neither config\.yaml"):
        build_report(Directory(str(tmp_path)))


@pytest.mark.s3
def test_a_run_on_s3_is_reported_in_its_place(bucket: str, tmp_path: Path) -> None:
    run = Directory(f"s3://{bucket}/runs/first")
    local = whole_run(tmp_path)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            run.write(path.relative_to(tmp_path).as_posix(), path.read_bytes())
    assert write_report(run) == f"s3://{bucket}/runs/first/report.html"
    assert run.read("report.html").decode() == build_report(local).replace(local.uri, run.uri)
    empty = Directory(f"s3://{bucket}/nothing")
    with pytest.raises(ConfigError, match="not a run directory"):
        write_report(empty)


# Damage


def test_damaged_files_are_left_out(tmp_path: Path) -> None:
    run = make_run(
        tmp_path,
        config_dot_yaml=b"\xff\xfe: [",
        metrics_dot_jsonl=b'nonsense\n[1]\n{"loss": 1}\n{"step": "3"}\n' + jsonl(step_record(4)),
        quarantine_dot_jsonl=b"\n{\n[]\n",
        crops_dot_png=png()[:60],
        attention__step_00000001_dot_png=b"no picture",
        environment_dot_json=b"\xff",
        result_dot_json="[1, 2]",
    )
    page = Page(build_report(run))
    assert "Unreadable lines in metrics.jsonl: 4; this page omits them." in page.text
    assert "step 4" in page.text
    assert not page.all("img")
    assert "Bad images" not in page.text


def test_values_that_are_not_finite_are_gaps_and_are_told(tmp_path: Path) -> None:
    records = [
        step_record(1),
        step_record(2, loss="nan"),
        step_record(3, loss="inf"),
        step_record(4, loss=2.5),
    ]
    text = Page(build_report(make_run(tmp_path, metrics_dot_jsonl=jsonl(*records)))).text
    assert "The loss was not finite at 2 logged steps." in text
    assert "loss2.500" in text
    lost = [step_record(step, loss="nan") for step in (1, 2)]
    text = Page(build_report(make_run(tmp_path / "b", metrics_dot_jsonl=jsonl(*lost)))).text
    assert "The loss was not finite at 2 logged steps." in text


def test_all_text_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>&\"$^_"
    run = make_run(
        tmp_path,
        config_dot_yaml={"name": evil, "data": {"path": evil}, "backbone": {"kwargs": {evil: evil}}},
        metrics_dot_jsonl=jsonl(step_record(1, verdict=evil, **{evil: 1.0})),
        quarantine_dot_jsonl=jsonl({"key": f"{evil}\udce9", "reason": evil, evil: [evil]}),
        result_dot_json={"steps": 1, evil: evil, "knn": evil},
        environment_dot_json={evil: evil},
        evaluation_x_dot_json={evil: evil},
    )
    write_report(run)
    page = Page((tmp_path / "report.html").read_text())
    assert not page.all("script")
    assert page.text.count(evil) > 8


# Verdicts


def test_trouble_stands_on_top_with_its_remedy(tmp_path: Path) -> None:
    verdicts = ["healthy", "healthy", "uniform collapse", "uniform collapse"]
    records = [step_record(s, verdict=v, skipped_steps=s // 4) for s, v in enumerate(verdicts, start=1)]
    text = Page(build_report(make_run(tmp_path, metrics_dot_jsonl=jsonl(*records)))).text
    assert f"uniform collapse since step 3: {Verdict.UNIFORM.remedy}" in text
    assert text.index("uniform collapse since") < text.index("Curves")
    assert "1 step skipped: loss or gradients were not finite." in text


@pytest.mark.parametrize(
    ("verdicts", "told"),
    [
        (["healthy"] * 3, ""),
        (["healthy", "non-finite", "healthy"], "The run had an unhealthy verdict and recovered; see Health."),
        (["healthy", "of another version"], "of another version since step 2"),
        ([None, None], ""),
    ],
)
def test_verdicts_become_words(tmp_path: Path, verdicts: list[str | None], told: str) -> None:
    records = [step_record(s, **({"verdict": v} if v else {})) for s, v in enumerate(verdicts, start=1)]
    page = Page(build_report(make_run(tmp_path, metrics_dot_jsonl=jsonl(*records))))
    warned = "warning" in [attributes.get("class") for attributes in page.all("p")]
    assert warned is bool(told)
    assert told in page.text


@pytest.mark.parametrize(
    ("out_dim", "ratio", "line"),
    [
        (1024, None, "ln K = 6.93"),
        ("auto", 0.5, "ln K = 4.00"),  # an entropy of 2 nats is half of it
        ("auto", None, None),
        (None, None, None),
    ],
)
def test_uniform_entropy_is_drawn_where_it_is_known(
    tmp_path: Path, out_dim: Any, ratio: float | None, line: str | None
) -> None:
    run = make_run(
        tmp_path,
        config_dot_yaml={"name": "a", "head": {"out_dim": out_dim}},
        metrics_dot_jsonl=jsonl(step_record(1, **({"entropy_ratio": ratio} if ratio else {}))),
    )
    text = Page(build_report(run)).text
    assert ("ln K =" in text) is (line is not None)
    assert (line or "") in text


def test_names_are_dotted_and_values_are_text() -> None:
    assert dict(flatten({"a": {"b": {"c": 1}}, "d": [2], "e": {}})) == {"a.b.c": 1, "d": [2], "e": {}}
    assert escape({"<": "é"}) == "{&quot;&lt;&quot;: &quot;é&quot;}"
