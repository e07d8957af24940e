"""The report: one page that needs nothing else, at any moment of a run, whatever its files hold."""

import base64
import io
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from report_runs import Page, jsonl, make_run, png, step_record, whole_run

from dinoray.models.errors import ConfigError
from dinoray.models.settings import flatten
from dinoray.pipeline.augment.config import CropsConfig
from dinoray.pipeline.augment.multicrop import crop_rng, multi_crop
from dinoray.pipeline.figures.contact_sheet import contact_sheet
from dinoray.pipeline.reporting.page import escape, picture
from dinoray.pipeline.reporting.plots import Curve, Level, chart, downsample
from dinoray.pipeline.reporting.run_report import LiveReport, build_report, write_report
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.tracking.records import Records, Series, attention_figures
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
    assert "images/s130" in page.text
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


def test_the_page_is_a_function_of_the_files(tmp_path: Path) -> None:
    run = whole_run(tmp_path)
    assert build_report(run) == build_report(run)


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


# Records


def test_series_are_sorted_and_a_step_that_was_repeated_counts_once() -> None:
    records = Records(
        jsonl({"step": 5, "a": 1}, {"step": 2, "a": "inf"}, {"step": 5, "a": 3}, {"step": 9, "b": 1})
    )
    steps, values = records.series("a")
    assert steps.tolist() == [2, 5]
    assert math.isnan(values[0])
    assert values[1] == records.series("a").last == 3
    assert math.isnan(records.series("c").last)
    assert records.last_step == 9


def test_text_and_truth_values_are_no_metrics() -> None:
    records = Records(jsonl({"step": 1, "a": True, "b": "high", "c": None, "d": [1], "e": 10**400, "f": 2}))
    assert [len(records.series(name).steps) for name in "abcdef"] == [0, 0, 0, 0, 1, 1]
    assert math.isnan(records.series("e").values[0])


@pytest.mark.parametrize(("number", "limit"), [(1, 300), (300, 300), (301, 300), (100_000, 300), (7, 3)])
def test_downsampling_keeps_mean_least_and_largest(number: int, limit: int) -> None:
    values = np.random.default_rng(0).normal(size=number)
    series, lows, highs = downsample(Series(np.arange(number, dtype=float), values), limit)
    assert len(series.steps) == len(lows) == len(highs) == min(number, limit)
    assert lows.min() == values.min()
    assert highs.max() == values.max()
    assert (lows <= series.values).all()
    assert (series.values <= highs).all()
    assert (np.diff(series.steps) > 0).all()
    assert series.values.mean() == pytest.approx(values.mean(), abs=0.05)


def test_downsampling_leaves_out_what_is_not_finite() -> None:
    values = np.array([1, np.nan, 3, np.nan, np.nan, np.nan, 5, 7, 9])
    series, lows, highs = downsample(Series(np.arange(9.0), values), 3)
    np.testing.assert_array_equal(series.values, [2, np.nan, 7])
    np.testing.assert_array_equal(lows, [1, np.nan, 5])
    np.testing.assert_array_equal(highs, [3, np.nan, 9])


def test_a_long_run_has_a_small_page(tmp_path: Path) -> None:
    losses = np.random.default_rng(0).normal(size=20_000).tolist()
    run = make_run(tmp_path, metrics_dot_jsonl=jsonl(*(step_record(s, loss=v) for s, v in enumerate(losses))))
    assert len(build_report(run)) < 400_000


def test_a_chart_takes_its_colours_from_the_page() -> None:
    series = Series(np.arange(3.0), np.array([1.0, 4.0, 2.0]))
    svg = chart([Curve("a $x^2$", series), Curve("b", series)], levels=[Level("most", 5.0)])
    assert svg.startswith("<svg")
    assert "#0101" not in svg
    for part in (
        "var(--series-1)",
        "var(--series-2)",
        "var(--ink)",
        "var(--faint)",
        ">a $x^2$</text>",
        ">most</text>",
    ):
        assert part in svg
    assert "width=" not in svg[: svg.index(">")]


@pytest.mark.parametrize("number", [1, 2, 4])
def test_a_legend_stands_above_the_axes_and_covers_no_curve(number: int) -> None:
    series = Series(np.arange(9.0), np.array([1.0, 9.0] * 4 + [1.0]))  # whose points are everywhere
    curves = [Curve(f"curve number {i}", series) for i in range(number)]
    tree = ElementTree.fromstring(chart(curves, levels=[Level("ln K = 6.24: uniform", 5.0)]))
    groups = {group.get("id"): group for group in tree.iter("{http://www.w3.org/2000/svg}g")}
    words = list(groups["legend_1"].iter("{http://www.w3.org/2000/svg}text"))
    assert len(words) == number + 1
    width, height = map(float, tree.attrib["viewBox"].split()[2:])
    (frame,) = groups["patch_2"].iter("{http://www.w3.org/2000/svg}path")  # of the axes
    top = min(float(y) for y in re.findall(r"[ML] [-\d.]+ ([-\d.]+)", frame.attrib["d"]))
    assert max(float(text.attrib["y"]) for text in words) < top < height / 2
    assert max(float(text.attrib["x"]) + 4.4 * len(text.text or "") for text in words) < width


def test_where_points_are_merged_a_band_shows_their_range() -> None:
    values = np.random.default_rng(0).normal(size=400)
    charts = {n: chart([Curve("a", Series(np.arange(float(n)), values[:n]))]) for n in (300, 301)}
    assert ["fill-opacity: 0.22" in svg for svg in charts.values()] == [False, True]


@pytest.mark.parametrize(
    ("steps", "shown"),
    [
        ([], []),
        ([7], [7]),
        (range(6), [0, 1, 2, 3, 4, 5]),
        (range(0, 1100, 100), [0, 200, 400, 700, 900, 1000]),
        (range(1000, 1040), [1000, 1010, 1019, 1028, 1038, 1039]),
    ],
)
def test_the_newest_attention_figure_is_shown_and_some_others_are_folded(
    tmp_path: Path, steps: Any, shown: list[int]
) -> None:
    files = {f"attention__step_{step:08d}_dot_png": png() for step in steps}
    others = {
        "attention__attention_step_00000009_dot_png": png(),
        "attention__step_00000003__a_dot_png": png(),
    }
    run = make_run(tmp_path, **files, **others)
    assert attention_figures(run) == [(step, f"attention/step_{step:08d}.png") for step in steps]
    html = build_report(run)
    if shown:
        section = html.split('<section id="attention-maps">')[1].split("</section>")[0]
        newest, _, folded = section.partition("<details>")
        captions = re.findall(r"<figcaption>after (\d+) steps?</figcaption>", newest)
        assert captions == [str(shown[-1])]
        captions = re.findall(r"<figcaption>after (\d+) steps?</figcaption>", folded)
        assert captions == [str(step) for step in shown[:-1]]
        assert ("5 of 39 earlier figures" in folded) is (len(steps) == 40)


def test_large_pictures_are_made_smaller() -> None:
    data = png(400, 400, seed=0)
    html = picture(data, "noise")
    assert "data:image/webp" in html
    assert len(html) < len(data)
    assert "data:image/png" in picture(png(), "small")
    assert picture(None, "none") == picture(b"damaged", "none") == ""


def test_the_text_of_a_sheet_and_its_pictures_are_two_layers_that_make_up_the_sheet() -> None:
    crops = multi_crop(np.full((40, 40, 3), 90, np.uint8), crop_rng(0, 0, "a"), config := CropsConfig())
    sheet = contact_sheet([("a.jpg", np.full((40, 40, 3), 90, np.uint8), crops)], config)
    found = re.findall(r'<img class="(\w+)" src="data:image/\w+;base64,([^"]+)"', picture(sheet, "crops"))
    assert [kind for kind, _ in found] == ["ink", "pictures"]
    ink, pictures = (Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA") for _, data in found)
    assert np.asarray(ink)[..., :3].max() == 24  # one colour alone, so that it can be turned into another
    white = Image.new("RGBA", ink.size, (255, 255, 255, 255))
    whole = Image.alpha_composite(Image.alpha_composite(white, ink), pictures).convert("RGB")
    expected = np.asarray(Image.open(io.BytesIO(sheet)), int)
    assert abs(np.asarray(whole, int) - expected).max() <= 12


def test_a_picture_with_wrong_places_is_shown_as_it_is() -> None:
    for places in ("[[1, 2]]", "x", "{}", "[[0, 0, 1, null]]"):
        about = PngInfo()
        about.add_text("pictures", places)
        file = io.BytesIO()
        Image.new("RGB", (40, 20)).save(file, "PNG", pnginfo=about)
        assert 'class="ink"' not in picture(file.getvalue(), "a")
        assert "<img" in picture(file.getvalue(), "a")


def test_only_a_very_wide_picture_is_scrolled_and_on_a_phone_a_large_one() -> None:
    assert ['class="wide"' in picture(png(width), "a") for width in (1600, 1601)] == [False, True]
    assert ['class="large"' in picture(png(width), "a") for width in (720, 721, 1601)] == [False, True, False]


def test_names_are_dotted_and_values_are_text() -> None:
    assert dict(flatten({"a": {"b": {"c": 1}}, "d": [2], "e": {}})) == {"a.b.c": 1, "d": [2], "e": {}}
    assert escape({"<": "é"}) == "{&quot;&lt;&quot;: &quot;é&quot;}"
