"""The HTML of a report: one page that asks nothing of the network, readable in light and dark.

Pieces go in as text and come out escaped; only `Html` passes as it is. Knows nothing of runs or files.
"""

import base64
import html
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from PIL import Image, features

from dinoray.pipeline.figures.drawing import png_bytes, split_sheet
from dinoray.pipeline.figures.palette import css_variables
from dinoray.pipeline.reporting.style import STYLE

_LARGE_BYTES = 300_000
_LARGE, _WIDE = 720, 1600
_MAX_TEXT = 300
_MAX_WHOLE = 20
_MAX_TILES = 8
"""In one row."""


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
        f"<title>{escape(title)}</title>\n<style>\n{css_variables()}{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        "</body>\n</html>\n"
    )


def section(title: str, *parts: Html, note: str = "") -> Html:
    """A heading, a line of explanation, and what follows; nothing at all without parts."""
    content = "\n".join(part for part in parts if part)
    if not content:
        return Html("")
    explanation = f'<p class="note">{escape(note)}</p>' if note else ""
    return Html(
        f'<section id="{_anchor(title)}">\n<h2>{escape(title)}</h2>\n{explanation}\n{content}\n</section>'
    )


def contents(parts: Iterable[Html]) -> Html:
    """Links to the sections among `parts`."""
    found = re.findall(r'<section id="([^"]*)">\n<h2>(.*?)</h2>', "\n".join(parts))
    links = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title in found)
    return Html(f'<nav aria-label="Contents">{links}</nav>') if len(found) > 1 else Html("")


def pair(left: Html, *right: Html) -> Html:
    """A section, and others in a narrower column beside it where there is room; either side may be empty."""
    columns = "".join(f"<div>{column}</div>" for column in (left, "".join(right)) if column)
    return Html(f'<div class="pair">{columns}</div>' if columns else "")


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def tiles(values: Sequence[tuple[str, str, str]]) -> Html:
    """Small facts: (name, value, remark). Rows are of nearly equal length and fill the width."""
    num_rows = math.ceil(len(values) / _MAX_TILES)
    columns = math.ceil(len(values) / max(1, num_rows))
    cells = (
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b><small>{escape(remark)}</small></div>'
        for name, value, remark in values
    )
    return Html(f'<div class="tiles" style="--columns: {max(1, columns)}">{"".join(cells)}</div>')


def charts(drawings: Iterable[tuple[str, str]]) -> Html:
    """(title, SVG) side by side, three in a row or two; each row fills the width."""
    drawn = list(drawings)
    figures = "".join(
        f'<figure style="--span: {span}"><figcaption>{escape(title)}</figcaption>{svg}</figure>'
        for span, (title, svg) in zip(_spans(len(drawn)), drawn, strict=True)
    )
    return Html(f'<div class="charts">{figures}</div>') if figures else Html("")


def _spans(number: int) -> list[int]:
    """Widths, of 6, of so many charts: one or two rows of two, which are larger, before rows of three."""
    if number == 1:
        return [6]
    in_pairs = {0: 0, 1: 4, 2: 2}[number % 3]
    return [3] * in_pairs + [2] * (number - in_pairs)


def drawing(svg: str, *, width: int) -> Html:
    """One SVG that fills the width, scrolled where it would be smaller than five sixths of `width` pixels."""
    if not svg:
        return Html("")
    return Html(f'<div class="scroll card"><div style="min-width: {width * 5 // 6}px">{svg}</div></div>')


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


def explained(lines: Sequence[str]) -> Html:
    """What the charts above mean, a paragraph each."""
    return Html("".join(f'<p class="explained">{escape(line)}</p>' for line in lines))


def commands(values: Mapping[str, str]) -> Html:
    """Purpose -> a command line to copy."""
    lines = "".join(
        f"<dt>{escape(purpose)}</dt><dd><code>{escape(line)}</code></dd>" for purpose, line in values.items()
    )
    return Html(f'<dl class="commands">{lines}</dl>') if lines else Html("")


def picture(data: bytes | None, caption: str) -> Html:
    """An image file within the page, scrolled where it would be too small to read; nothing where there is none.

    Of a sheet whose file has the places of its pictures, text takes the colours of the page.
    """
    try:
        image = Image.open(io.BytesIO(data or b""), formats=["PNG"])
        image.load()
    except Exception:  # a damaged file may raise anything
        return Html("")
    kind = "wide" if image.width > _WIDE else "large" if image.width > _LARGE else ""
    layers = split_sheet(image)
    if layers is None:
        name = f' class="{kind}"' if kind else ""
        content = f'<img{name} src="{_data_uri(image, data or b"")}" alt="{escape(caption)}">'
    else:
        ink, pictures = (_data_uri(layer, png_bytes(layer)) for layer in layers)
        content = (
            f'<div class="sheet {kind}" style="width: {1600 if kind == "wide" else image.width}px">'
            f'<img class="ink" src="{ink}" alt="{escape(caption)}"><img class="pictures" src="{pictures}" alt=""></div>'
        )
    return Html(
        f'<figure class="picture"><figcaption>{escape(caption)}</figcaption>'
        f'<div class="scroll">{content}</div></figure>'
    )


def _data_uri(image: Image.Image, png: bytes) -> str:
    """The file as it is, or where it is large, a WebP of it."""
    kind, data = "png", png
    if len(png) > _LARGE_BYTES and features.check("webp"):
        file = io.BytesIO()
        image.convert("RGBA" if image.has_transparency_data else "RGB").save(
            file, "WEBP", quality=86, method=4
        )
        kind, data = "webp", file.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _short(value: Any) -> Html:
    text = f"{value:.6g}" if isinstance(value, float) else value
    if isinstance(text, str) and len(text) > _MAX_TEXT:
        text = f"{text[:_MAX_TEXT]}..."
    return escape(text)
