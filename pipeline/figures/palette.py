"""The colours of pages and pictures, by name, for light and dark mode.

A drawing inside a page uses unique placeholder colours, the tokens, which are then replaced by the page's
variables. A standalone picture uses the light colours.
"""

import re
from collections.abc import Mapping

Palette = Mapping[str, str]
"""Colours by name."""

LIGHT: Palette = {
    "paper": "#ffffff",
    "card": "#f7f7f8",
    "ink": "#18181b",
    "faint": "#71717a",
    "rule": "#e0e0e4",
    "warn": "#9a3412",
    "warn-paper": "#fff3e8",
    "series-1": "#3457d5",
    "series-2": "#d9622b",
    "series-3": "#16876b",
    "series-4": "#a33ea1",
    # From bad to good: with growing contrast to the paper.
    "scale-1": "#d7efb3",
    "scale-2": "#b0e0b7",
    "scale-3": "#7dcdbb",
    "scale-4": "#50bcc2",
    "scale-5": "#2ea4c2",
    "scale-6": "#1d82b9",
    "scale-7": "#225ea8",
    "scale-8": "#253a97",
    "scale-9": "#12246c",
}
DARK: Palette = {
    "paper": "#141416",
    "card": "#1d1d20",
    "ink": "#ececef",
    "faint": "#9c9ca6",
    "rule": "#34343a",
    "warn": "#fdba74",
    "warn-paper": "#33210f",
    "series-1": "#8aa6ff",
    "series-2": "#ff9a66",
    "series-3": "#4fd1ab",
    "series-4": "#e18ade",
    "scale-1": "#24479d",
    "scale-2": "#2166ac",
    "scale-3": "#1e87bb",
    "scale-4": "#31a5c2",
    "scale-5": "#54bec1",
    "scale-6": "#85cfba",
    "scale-7": "#bbe4b5",
    "scale-8": "#e2f4b2",
    "scale-9": "#f9fdcc",
}
TOKENS: Palette = {name: f"#0101{i:02x}" for i, name in enumerate(LIGHT, 1)}
NUM_SCALE = 9


def scale(palette: Palette) -> list[str]:
    """Return the colours from bad to good."""
    return [palette[f"scale-{i + 1}"] for i in range(NUM_SCALE)]


def css_variables() -> str:
    """Return the CSS that defines the variables, `--ink` and so on, for light and dark mode."""
    light, dark = (
        " ".join(f"--{name}: {colour};" for name, colour in palette.items()) for palette in (LIGHT, DARK)
    )
    in_dark = f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"
    return f":root {{ color-scheme: light dark; {light} }}\n{in_dark}"


def themed(svg: str) -> str:
    """Return the <svg> element alone, without date, in the page's colours, as wide as its container."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg [^>]*?)width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?)height="[^"]*"', r"\1", svg, count=1)
    for name, token in TOKENS.items():
        svg = svg.replace(token, f"var(--{name})")
    return svg.strip()
