"""Images that could not be used: how many, of what kinds, and how near they bring the run to its limit. No Ray here."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dinoray.pipeline.data.reading.bad_kinds import FIRST_CHECK, kind_of
from dinoray.pipeline.reporting.page import Html, details, section, table
from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.tracking.records import Records, read_head

_MAX_ROWS = 50_000
"""Rows that are looked into: some tenths of a second. What lies behind them is only counted."""
_SHOWN = 20
_MAX_KINDS = 12
_NEAR = 0.5
"""Share of what is allowed from which on a person should know."""


class Share(NamedTuple):
    """Bad images against all that the run has seen."""

    bad: float
    seen: int
    limit: float
    """data.max_bad_fraction."""

    @property
    def of_limit(self) -> float:
        """1 is where the run ends."""
        allowed = self.limit * self.seen
        return self.bad / allowed if allowed else math.inf if self.bad else 0.0


def share(records: Records, values: Mapping[str, Any]) -> Share | None:
    """Over the whole run; None where batch or limit are not known, or nothing was seen."""
    batch, limit = values.get("train.global_batch_size"), values.get("data.max_bad_fraction")
    bad, step = records.series("bad_images").last, records.last_step
    if not (isinstance(batch, int) and isinstance(limit, int | float) and bad >= 0 and step):
        return None
    trained = records.series("trained_images").last
    return Share(bad, int(trained + bad) if trained >= 0 else step * batch, float(limit))


def near_limit_warning(found: Share | None) -> str | None:
    """A line where the run is near the limit."""
    if found is None or found.seen < FIRST_CHECK or found.of_limit < _NEAR:
        return None
    return (
        f"Bad images: {_percent(found.bad / found.seen)} of the images seen; the run fails above "
        f"data.max_bad_fraction={found.limit:g}."
    )


def bad_images(run: Directory, found: Share | None) -> Html:
    """The section: kinds with an example each, and the first rows of quarantine.jsonl folded away."""
    rows, total = read_head(run, run_dir.QUARANTINE, _MAX_ROWS)
    shown = f"first {_SHOWN} of {total:,}" if total > _SHOWN else f"{total}"
    part = f" Only the first {len(rows):,} are grouped by kind." if len(rows) < total else ""
    near = ""
    if found:
        limit = f", {found.of_limit:.0%} of the limit data.max_bad_fraction={found.limit:g}"
        times = f"{found.bad:,.0f} times ({_percent(found.bad / found.seen)} of {found.seen:,} images seen"
        near = f" {times}{limit if found.limit else ''})"
    return section(
        "Bad images",
        table(kinds(rows, found)),
        details(f"Rows of quarantine.jsonl: {shown}", table(list(map(_row, rows[:_SHOWN]))))
        if rows
        else Html(""),
        note=f"Images that could not be used: {total:,}. They were replaced by other images{near}.{part}",
    )


def kinds(rows: Sequence[Mapping[str, Any]], found: Share | None = None) -> list[dict[str, Any]]:
    """A row a kind, the commonest first; the rarest together where there are many."""
    by_kind: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_kind.setdefault(kind_of(row.get("status"), row.get("reason")), []).append(row)
    ordered = sorted(by_kind, key=lambda kind: -len(by_kind[kind]))
    shown = {kind: by_kind[kind] for kind in ordered[:_MAX_KINDS]}
    rest = [row for kind in ordered[_MAX_KINDS:] for row in by_kind[kind]]
    return [
        {
            "kind": kind,
            "images": len(alike),
            **({"share of images seen": _percent(sum(map(_times, alike)) / found.seen)} if found else {}),
            "example": alike[0].get("key", ""),
            "reason": alike[0].get("reason", ""),
        }
        for kind, alike in [*shown.items(), *([("other kinds", rest)] if rest else [])]
    ]


def _times(row: Mapping[str, Any]) -> int:
    """How often the image was replaced; files of earlier versions have a row each time."""
    epochs = row.get("epochs")
    return len(epochs) if isinstance(epochs, list) else 1


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    """What is worth a look: how often in place of the list, and no positions."""
    return {
        **{k: v for k, v in row.items() if k not in ("epochs", "positions", "position")},
        "replaced": _times(row),
    }


def _percent(part: float) -> str:
    """Enough digits that rare is not never."""
    return f"{100 * part:.0f} %" if part >= 0.1 else f"{100 * part:.2g} %"
