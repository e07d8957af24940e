"""Reports as people see them: in a real browser, on a phone and on a desk, in light and in dark."""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser, View, open_browser
from PIL import Image
from report_runs import fed_run
from studies import write_whole_study

from dinoray.pipeline.augment.config import CropsConfig
from dinoray.pipeline.augment.multicrop import crop_rng, multi_crop
from dinoray.pipeline.figures.contact_sheet import contact_sheet
from dinoray.pipeline.figures.palette import DARK, LIGHT, Palette
from dinoray.pipeline.reporting.page import Html, charts, page, picture, tiles
from dinoray.pipeline.reporting.run_report import write_report
from dinoray.pipeline.study.page.study_report import write_study_report

pytestmark = pytest.mark.nightly  # beside tests/pipeline/reporting/test_report.py

PHONE, DESK = (390, 844), (1280, 900)
_MEASURES = """(() => {
  const clear = "rgba(0, 0, 0, 0)";
  const ground = (e) => { while (e && getComputedStyle(e).backgroundColor === clear) e = e.parentElement;
    return e ? getComputedStyle(e).backgroundColor : null; };
  const size = (e) => parseFloat(getComputedStyle(e).fontSize);
  const enlarged = (e) => { const m = e.getScreenCTM(); return size(e) * Math.hypot(m.a, m.b); };
  const own = (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  const texts = [...document.body.querySelectorAll("*")]
    .filter((e) => own(e) && e.tagName !== "STYLE" && e.getClientRects().length)
    .map((e) => ({ words: e.textContent.trim().slice(0, 40), ground: ground(e),
      colour: e.closest("svg") ? getComputedStyle(e).fill : getComputedStyle(e).color,
      pixels: e.closest("svg") ? enlarged(e) : size(e) }));
  const box = (e) => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
  const drawings = [...document.querySelectorAll("svg")].filter((e) => e.getClientRects().length)
    .map((e) => ({ box: box(e), marks: e.querySelectorAll("path, use").length,
      texts: [...e.querySelectorAll("text")].map((t) => [t.textContent, ...box(t)]) }));
  const rows = (e) => { const ends = {}; for (const c of e.children) { const [, top, right] = box(c);
    ends[top] = Math.max(ends[top] || 0, right); } return Object.values(ends); };
  const content = box(document.querySelector("main") ? document.querySelector("h1") : document.body);
  const grids = [...document.querySelectorAll(".tiles, .charts, .pair")].map(rows);
  return { width: innerWidth, scrolls: document.documentElement.scrollWidth, height: document.body.scrollHeight,
    ground: getComputedStyle(document.body).backgroundColor, texts, drawings, right: content[2], grids };
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("browser") / "profile") as running:
        yield running


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    run, study = fed_run(folder / "run"), write_whole_study(folder / "study")
    write_report(run)
    write_study_report(study)
    return {"run": folder / "run" / "report.html", "study": folder / "study" / "study.html"}


def brightness(colour: str) -> float:
    """Relative luminance, 0 to 1, of `rgb(r, g, b)`, as WCAG 2 defines it."""
    channels = [int(number) / 255 for number in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((brightness(one), brightness(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_what_the_standard_says() -> None:
    assert contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)") == pytest.approx(21)
    assert contrast("rgb(119, 119, 119)", "rgb(255, 255, 255)") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize(
    ("text", "ground"),
    [(t, g) for t in ("ink", "faint", "warn") for g in ("paper", "card")] + [("warn", "warn-paper")],
)
def test_text_stands_out(palette: Palette, text: str, ground: str) -> None:
    colours = ("rgb({}, {}, {})".format(*bytes.fromhex(palette[name][1:])) for name in (text, ground))
    assert contrast(*colours) >= 4.5


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
@pytest.mark.parametrize("name", ["run", "study"])
def test_a_report_is_readable(
    browser: Browser, pages: dict[str, Path], name: str, size: tuple[int, int], dark: bool, tmp_path: Path
) -> None:
    view = View(browser, pages[name], width=size[0], height=size[1], dark=dark)
    seen = view.evaluate(_MEASURES)
    (tmp_path / "page.png").write_bytes(view.screenshot())
    assert view.requests[0] == pages[name].as_uri()
    assert [address for address in view.requests[1:] if not address.startswith("data:")] == []
    assert view.complaints == []
    assert seen["width"] == size[0]
    assert seen["scrolls"] <= size[0]
    _check_colours(seen, tmp_path / "page.png", dark=dark)
    assert [text for text in seen["texts"] if contrast(text["colour"], text["ground"]) < 4.5] == []
    assert [text for text in seen["texts"] if text["pixels"] < 8.5] == []
    _check_drawings(seen)
    assert len(seen["grids"]) >= 3
    assert [ends for ends in seen["grids"] if any(abs(end - seen["right"]) > 2 for end in ends)] == []


def _check_colours(seen: dict[str, Any], file: Path, *, dark: bool) -> None:
    pixels = np.asarray(Image.open(io.BytesIO(file.read_bytes())).convert("L"), np.float64)
    edge = pixels[:, :4].mean()  # beside all that stands on the page
    assert (edge < 40) if dark else (edge > 215)
    assert (np.median(pixels) < 60) if dark else (np.median(pixels) > 200)
    assert pixels.std() > 5


def _check_drawings(seen: dict[str, Any]) -> None:
    """Each has marks in it and no label that is cut off."""
    assert len(seen["drawings"]) >= 6
    for drawing in seen["drawings"]:
        left, top, right, bottom = drawing["box"]
        assert right - left > 200
        assert bottom - top > 60
        assert drawing["marks"] > 3
        cut = [
            text
            for text, *box in drawing["texts"]
            if box[0] < left - 1 or box[1] < top - 1 or box[2] > right + 1 or box[3] > bottom + 1
        ]
        assert cut == []


@pytest.mark.parametrize("number", range(1, 12))
def test_any_number_of_tiles_and_charts_fills_the_width(
    browser: Browser, tmp_path: Path, number: int
) -> None:
    svg = '<svg viewBox="0 0 36 21"><path d="M 0 0 L 36 21"/></svg>'
    drawn = [tiles([("loss", "1.0", "")] * number), charts([("loss", svg)] * number)]
    file = tmp_path / "page.html"
    file.write_text(page("page", [Html("<h1>page</h1>"), *drawn]))
    for width in (PHONE[0], 760, DESK[0]):
        view = View(browser, file, width=width, height=900, dark=False)
        seen = view.evaluate(_MEASURES)
        assert len(seen["grids"]) == 2
        assert [ends for ends in seen["grids"] if any(abs(end - seen["right"]) > 2 for end in ends)] == []
        heights = [bottom - top for _, top, _, bottom in (drawing["box"] for drawing in seen["drawings"])]
        assert max(heights) <= 640


def test_figures_do_not_glare_in_the_dark_and_their_pictures_are_the_same(
    browser: Browser, tmp_path: Path
) -> None:
    image, config = np.full((40, 60, 3), (200, 40, 90), np.uint8), CropsConfig()
    crops = multi_crop(image, crop_rng(0, 0, "a"), config)
    sheet = contact_sheet([(f"{i}.jpg", image, crops) for i in range(3)], config)
    file = tmp_path / "page.html"
    file.write_text(page("page", [picture(sheet, "crops")]))
    shots = []
    for dark in (False, True):
        view = View(browser, file, width=DESK[0], height=900, dark=dark)
        left, top, right, bottom = view.evaluate(
            "(() => { const r = document.querySelector('.picture .scroll').getBoundingClientRect();"
            "return [r.left, r.top, r.right, r.bottom]; })()"
        )
        shot = np.asarray(Image.open(io.BytesIO(view.screenshot())).convert("RGB"), int)
        shots.append(shot[int(top) + 4 : int(bottom) - 4, int(left) + 4 : int(right) - 4])
    light, dark_one = shots
    assert light.shape == dark_one.shape
    assert (light.min(axis=2) > 240).mean() > 0.2  # paper
    assert (dark_one.min(axis=2) > 240).mean() < 0.001
    assert ((dark_one.min(axis=2) > 150) & (np.ptp(dark_one, axis=2) < 20)).mean() > 0.001  # text
    source = (abs(light - (200, 40, 90)).max(axis=2) < 8) & (abs(dark_one - (200, 40, 90)).max(axis=2) < 8)
    assert source.sum() > 3 * 100 * 100  # the pictures


@pytest.mark.parametrize("name", ["run", "study"])
def test_the_narrowest_phone_does_not_scroll_sideways(
    browser: Browser, pages: dict[str, Path], name: str
) -> None:
    view = View(browser, pages[name], width=320, height=600, dark=False)
    view.evaluate("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
    assert view.evaluate("document.documentElement.scrollWidth") <= 320


def test_what_a_page_does_wrong_is_seen(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        "<body style='background: #fff'><p style='color: #999; width: 900px'>pale</p>"
        "<img src='http://127.0.0.1:9/x.png'><script>console.error('no'); nothing.here</script>"
    )
    view = View(browser, page, width=390, height=844, dark=False)
    seen = view.evaluate(_MEASURES)
    assert "http://127.0.0.1:9/x.png" in view.requests
    assert len(view.complaints) >= 2
    assert seen["scrolls"] > 390
    (pale,) = [text for text in seen["texts"] if text["words"] == "pale"]
    assert contrast(pale["colour"], pale["ground"]) < 4.5
