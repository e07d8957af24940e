"""The report's charts and pictures: which points of a series are drawn, and how large a picture is shown."""

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
from report_runs import jsonl, make_run, png, step_record

from dinoray.pipeline.augment.config import CropsConfig
from dinoray.pipeline.augment.multicrop import crop_rng, multi_crop
from dinoray.pipeline.figures.contact_sheet import contact_sheet
from dinoray.pipeline.reporting.page import picture
from dinoray.pipeline.reporting.plots import Curve, Level, chart, downsample
from dinoray.pipeline.reporting.run_report import build_report
from dinoray.pipeline.tracking.records import Records, Series, attention_figures

# Series


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


# Charts


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


# Pictures


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
        captions = re.findall(r"<figcaption>after ([\d,]+) steps?</figcaption>", newest)
        assert captions == [f"{shown[-1]:,}"]
        captions = re.findall(r"<figcaption>after ([\d,]+) steps?</figcaption>", folded)
        assert captions == [f"{step:,}" for step in shown[:-1]]
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
