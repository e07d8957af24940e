"""The HTML of a report: one page that asks nothing of the network, readable in light and dark.

Pieces go in as text and come out escaped; only `Html` passes as it is. Knows nothing of runs or files.
"""

import base64
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from PIL import Image, features

from pipeline.palette import css_variables

_LARGE_BYTES = 300_000
_LARGE, _WIDE = 720, 1600
_MAX_TEXT = 300
_MAX_WHOLE = 20


class Html(str):
    """Text that is already HTML."""


def escape(value: Any) -> Html:
    """Any value as HTML text; what is `Html` already stays."""
    if isinstance(value, Html):
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    # Names of files may hold halves of surrogate pairs, which no page can.
    return Html(html.escape(text.encode("utf-8", "replace").decode()))


def page(title: str, parts: Iterable[Html]) -> str:
    """The whole document."""
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{css_variables()}{_STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        "</body>\n</html>\n"
    )


def section(title: str, *parts: Html, note: str = "") -> Html:
    """A heading, a line of explanation, and what follows; nothing at all without parts."""
    content = "\n".join(part for part in parts if part)
    if not content:
        return Html("")
    explanation = f'<p class="note">{escape(note)}</p>' if note else ""
    return Html(f"<section>\n<h2>{escape(title)}</h2>\n{explanation}\n{content}\n</section>")


def tiles(values: Sequence[tuple[str, str, str]]) -> Html:
    """Small facts: (name, value, remark)."""
    cells = (
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b><small>{escape(remark)}</small></div>'
        for name, value, remark in values
    )
    return Html(f'<div class="tiles">{"".join(cells)}</div>')


def charts(drawings: Iterable[tuple[str, str]]) -> Html:
    """(title, SVG) side by side as far as there is room."""
    figures = "".join(
        f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>" for title, svg in drawings
    )
    return Html(f'<div class="charts">{figures}</div>') if figures else Html("")


def drawing(svg: str, *, width: int) -> Html:
    """One SVG at `width` pixels at most, scrolled where it would become too small to read."""
    if not svg:
        return Html("")
    inner = f'<div style="min-width: {width * 5 // 6}px">{svg}</div>'
    return Html(f'<div class="scroll card" style="max-width: {width + 24}px">{inner}</div>')


def sentences(lines: Sequence[str]) -> Html:
    """One paragraph each."""
    return Html("".join(f'<p class="sentence">{escape(line)}</p>' for line in lines))


def warnings(lines: Sequence[str]) -> Html:
    """What a person should look at first."""
    return Html("".join(f'<p class="warning">{escape(line)}</p>' for line in lines))


def table(rows: Sequence[Mapping[str, Any]]) -> Html:
    """Objects as rows; columns are all their keys, in the order in which they come up."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if not columns:
        return Html("")
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    lines = (
        "<tr>" + "".join(_cell(_short(row[c])) if c in row else "<td></td>" for c in columns) + "</tr>"
        for row in rows
    )
    return Html(
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def _cell(text: Html) -> str:
    """Numbers and words stay whole where the table is narrow; addresses may break."""
    return f'<td class="short">{text}</td>' if len(text) <= _MAX_WHOLE else f'<td class="long">{text}</td>'


def facts(values: Mapping[str, Any]) -> Html:
    """Names and values, one line each."""
    lines = "".join(f"<dt>{escape(name)}</dt><dd>{_short(value)}</dd>" for name, value in values.items())
    return Html(f"<dl>{lines}</dl>") if lines else Html("")


def details(title: str, content: str) -> Html:
    """Text as it is, or what is HTML already, folded away."""
    inner = content if isinstance(content, Html) else f"<pre>{escape(content)}</pre>"
    return Html(f"<details><summary>{escape(title)}</summary>{inner}</details>")


def picture(data: bytes | None, caption: str) -> Html:
    """An image file within the page, scrolled where it would be too small to read; nothing where there is none."""
    try:
        image = Image.open(io.BytesIO(data or b""), formats=["PNG"])
        image.load()
    except Exception:  # a damaged file may raise anything
        return Html("")
    kind = ' class="wide"' if image.width > _WIDE else ' class="large"' if image.width > _LARGE else ""
    return Html(
        f'<figure class="picture"><figcaption>{escape(caption)}</figcaption>'
        f'<div class="scroll"><img{kind} src="{_data_uri(image, data or b"")}" alt="{escape(caption)}"></div></figure>'
    )


def _data_uri(image: Image.Image, png: bytes) -> str:
    """The file as it is, or where it is large, a WebP of it."""
    kind, data = "png", png
    if len(png) > _LARGE_BYTES and features.check("webp"):
        file = io.BytesIO()
        image.convert("RGB").save(file, "WEBP", quality=86, method=4)
        kind, data = "webp", file.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _short(value: Any) -> Html:
    text = f"{value:.6g}" if isinstance(value, float) else value
    if isinstance(text, str) and len(text) > _MAX_TEXT:
        text = f"{text[:_MAX_TEXT]}..."
    return escape(text)


_STYLE = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 36px 24px 64px; }
h1 { margin: 0; font-size: 28px; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 44px 0 10px; font-size: 18px; }
.address { margin: 4px 0 0; color: var(--faint); overflow-wrap: anywhere; }
.state { margin: 2px 0 20px; }
.note { margin: -4px 0 12px; color: var(--faint); font-size: 13.5px; max-width: 80ch; }
.warning { margin: 8px 0; padding: 10px 14px; border-left: 4px solid var(--warn); border-radius: 4px;
  background: var(--warn-paper); color: var(--warn); overflow-wrap: anywhere; }
.sentence { margin: 6px 0; max-width: 90ch; overflow-wrap: anywhere; }
h2 + .sentence { font-weight: 600; }
.card { padding: 12px; border-radius: 8px; background: var(--card); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 10px; margin: 18px 0; }
.tile { padding: 12px 14px; border-radius: 8px; background: var(--card); }
.tile span, .tile small { display: block; color: var(--faint); font-size: 12.5px; }
.tile b { display: block; font-size: 21px; font-weight: 600; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr)); gap: 12px; }
.charts + .scroll { margin-top: 12px; }
figure { margin: 0; }
.charts figure { padding: 10px 12px 6px; border-radius: 8px; background: var(--card); }
figcaption { font-size: 13px; font-weight: 600; margin-bottom: 4px; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif !important; }
.picture { margin: 0 0 20px; }
.picture .scroll { border: 1px solid var(--rule); border-radius: 8px; background: #ffffff; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
.wide { max-width: none; width: 1600px; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: 13.5px; }
th, td { padding: 5px 12px 5px 0; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top;
  overflow-wrap: anywhere; }
th { color: var(--faint); font-weight: 600; white-space: nowrap; }
.short { white-space: nowrap; }
.long { min-width: 16ch; }
dl { display: grid; grid-template-columns: fit-content(45%) 1fr; gap: 3px 20px; margin: 0 0 14px; font-size: 13.5px; }
dt { color: var(--faint); overflow-wrap: anywhere; }
dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
details { margin: 8px 0; }
summary { cursor: pointer; color: var(--faint); font-size: 13.5px; }
@media (max-width: 600px) { main { padding: 24px 16px 48px; }
  .large { max-width: none; width: 720px; } }
pre { padding: 12px 14px; border-radius: 8px; background: var(--card); font-size: 12.5px; line-height: 1.45;
  overflow-x: auto; }
"""
