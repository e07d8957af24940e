"""What tests of pages share: each chart is drawn once, however many pages show the same curves."""

import pickle
from collections.abc import Sequence
from typing import Any

import pytest

from dinoray.pipeline.reporting import charts
from dinoray.pipeline.reporting.plots import Curve

_DRAWN: dict[bytes, str] = {}
_draw = charts.chart


@pytest.fixture(autouse=True)
def drawn_charts(monkeypatch: pytest.MonkeyPatch) -> dict[bytes, str]:
    """The charts drawn so far, by what they show; a page takes a second to draw them all."""

    def chart(curves: Sequence[Curve], **how: Any) -> str:
        key = pickle.dumps((curves, how))
        if key not in _DRAWN:
            _DRAWN[key] = _draw(curves, **how)
        return _DRAWN[key]

    monkeypatch.setattr(charts, "chart", chart)
    return _DRAWN
