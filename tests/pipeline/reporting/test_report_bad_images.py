"""Bad images in the report: by which words they are grouped, how many are looked into, and when it warns."""

from pathlib import Path
from typing import Any

import pytest
from report_runs import Page, jsonl, make_run, png

from dinoray.pipeline.data.decoding.bad_image import BadImage
from dinoray.pipeline.data.decoding.decode import decode
from dinoray.pipeline.data.reading.bad_kinds import kind_of
from dinoray.pipeline.reporting.bad_images import Share, near_limit_warning
from dinoray.pipeline.reporting.run_report import build_report
from dinoray.pipeline.tracking.records import read_head


def test_the_commonest_kind_comes_first(tmp_path: Path) -> None:
    bad = [
        {"position": i, "status": s, "key": f"{i}.jpg"} for i, s in enumerate(["missing", *["too_large"] * 2])
    ]
    text = Page(build_report(make_run(tmp_path, quarantine_dot_jsonl=jsonl(*bad)))).text
    assert text.index("too many bytes2") < text.index("missing1")


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "empty"),
        (b"hello, world", "not an image"),
        (png(8, 8)[:-24], "damaged or cut off PNG"),
        (png(60, 60), "too large"),
        (png(2, 60), "too small"),
    ],
)
def test_what_the_decoder_says_is_grouped_by_its_words(data: bytes, kind: str) -> None:
    with pytest.raises(BadImage) as error:
        decode(data, max_pixels=3000, min_side=4)
    assert kind_of("corrupt", error.value.reason) == kind


@pytest.mark.parametrize(
    ("status", "reason", "kind"),
    [
        ("corrupt", "null", "empty"),
        ("corrupt", "shards/a-3.parquet changed after it was listed", "changed file or damaged shard"),
        ("corrupt", "s3://b/k has 5 bytes, not 7 as listed: list again", "changed file or damaged shard"),
        ("missing", "/images/a.jpg: No such file or directory", "missing"),
        ("unreachable", "s3://b/k: gave up after 5 attempts", "unreachable"),
        ("denied", "s3://b/k: AccessDenied (HTTP 403)", "refused"),
        ("archived", "s3://b/k: InvalidObjectState (HTTP 403)", "archived"),
        ("of another version", "x", "of another version"),
        (None, None, "None"),
        (["x"], {"y": 1}, "['x']"),
    ],
)
def test_what_storage_says_is_grouped_by_status(status: Any, reason: Any, kind: str) -> None:
    assert kind_of(status, reason) == kind


def test_many_kinds_are_shown_as_others(tmp_path: Path) -> None:
    bad = [{"position": i, "status": f"kind {i:02d}", "key": f"{i}.jpg", "reason": ""} for i in range(30)]
    text = Page(build_report(make_run(tmp_path, quarantine_dot_jsonl=jsonl(*bad)))).text
    assert "kind 1111" in text.replace(".jpg", "")
    assert "other kinds1812.jpg" in text


@pytest.mark.parametrize(
    ("bad", "seen", "limit", "told"),
    [(4, 1000, 0.01, False), (5, 1000, 0.01, True), (50, 999, 0.01, False), (0, 1000, 0.0, False)],
)
def test_a_run_near_its_limit_is_told_of(bad: int, seen: int, limit: float, told: bool) -> None:
    line = near_limit_warning(Share(bad, seen, limit))
    assert (line is not None) is told
    assert not told or "0.5 % of the images seen; the run fails above data.max_bad_fraction=0.01." in str(
        line
    )


@pytest.mark.parametrize("number", [0, 1, 4, 5, 6, 40])
@pytest.mark.parametrize("end", [b"", b'{"position": 9', b'{"position": 9}'])
def test_only_the_head_of_a_long_file_is_looked_into(tmp_path: Path, number: int, end: bytes) -> None:
    lines = b"".join(b'{"position": %d}\n' % i for i in range(number))
    rows, total = read_head(make_run(tmp_path, a_dot_jsonl=lines + end), "a.jsonl", 5)
    assert total == number + (end[-1:] == b"}" and number <= 5)
    assert [row["position"] for row in rows[:5]] == [*range(number), *([9] if end[-1:] == b"}" else [])][:5]
    assert len(rows) <= 6
