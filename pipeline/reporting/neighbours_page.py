"""The page about neighbours: query images, and the images nearest to them before and after training.

One self-contained HTML file, made of pictures and numbers that others have gathered. No files and no Ray here.
"""

import base64
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dinoray.pipeline.reporting.page import Html, contents, escape, page, section, sentences, tiles, warnings

SIDE = 128
"""Pixels of a picture's side in the file."""
_STYLE = """
.query { display: grid; grid-template-columns: 132px minmax(0, 1fr); gap: 8px 24px; padding: 18px 0;
  border-top: 1px solid var(--rule); align-items: center; }
.query figcaption { margin: 6px 0 0; font-weight: 400; line-height: 1.3; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }
.query figcaption b { display: block; overflow: hidden; text-overflow: ellipsis; }
.query figcaption span { color: var(--faint); font-size: 12px; }
.query img, .none { width: 100%; aspect-ratio: 1; border-radius: 6px; margin: 0; background: var(--card); }
.strip { display: grid; grid-template-columns: 84px repeat(8, minmax(0, 96px)); gap: 0 10px; align-items: start; }
.strip + .strip { margin-top: 14px; }
.strip h3 { margin: 0; padding-top: 2px; font-size: 13.5px; line-height: 1.3; }
.strip h3 small { display: block; white-space: nowrap; color: var(--faint); font-weight: 400; font-size: 12.5px; }
.near { position: relative; }
.near figcaption { margin-top: 3px; font-size: 12px; color: var(--faint); font-variant-numeric: tabular-nums; }
.near figcaption b { display: block; color: var(--ink); font-weight: 400; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }
.near i { font-style: normal; font-weight: 600; color: var(--series-1); }
.right img, .right .none { outline: 3px solid var(--series-3); outline-offset: -1px; }
.wrong img, .wrong .none { outline: 1px solid var(--warn); outline-offset: 0; }
.sign { position: absolute; top: -6px; right: -6px; width: 20px; height: 20px; border-radius: 50%; color: var(--paper);
  font-size: 12px; font-weight: 700; line-height: 20px; text-align: center; }
.right .sign { background: var(--series-3); } .wrong .sign { background: var(--warn); }
.key { display: flex; flex-wrap: wrap; gap: 6px 22px; margin: 14px 0 0; font-size: 13.5px; color: var(--faint); }
.key span { display: inline-flex; align-items: center; gap: 7px; }
.key .sign { position: static; display: inline-block; }
.key i { font-style: normal; font-weight: 600; color: var(--series-1); }
@media (max-width: 900px) { .query { grid-template-columns: minmax(0, 1fr); }
  .query > figure { width: 112px; }
  .strip { grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 10px; } .strip h3 { grid-column: 1 / -1; } }
"""


class Picture(NamedTuple):
    """An image: its key, its label ("" if it has none), and a JPEG of it, empty if it could not be read again."""

    key: str
    label: str
    jpeg: bytes


class Neighbour(NamedTuple):
    """An image near a query; `is_new`: not among the neighbours before."""

    picture: Picture
    cosine: float
    is_new: bool


class Query(NamedTuple):
    """A query, and its neighbours, the nearest first; `before` is empty where the start is not known."""

    picture: Picture
    before: Sequence[Neighbour]
    after: Sequence[Neighbour]


class Counts(NamedTuple):
    """Numbers over all queries, not only those that are shown; shares are in [0, 1], None where not known."""

    num_queries: int
    num_bank: int
    new_share: float | None
    """Of the neighbours, those that were none before."""
    right_before: float | None
    """Of the neighbours before, those with the label of their query."""
    right_after: float | None
    num_better: int
    """Queries with more neighbours of their label than before."""
    num_worse: int


class NeighboursPage(NamedTuple):
    """What a page shows."""

    title: str
    address: str
    about: Sequence[str]
    """Lines on the networks and the images."""
    warnings: Sequence[str]
    counts: Counts
    sample: Sequence[Query]
    changed: Sequence[Query]


def build_neighbours_page(data: NeighboursPage) -> str:
    """Return the page as HTML: the same for the same data."""
    sections = [
        section("A random sample", *map(_query, data.sample), note="The same queries at every evaluation."),
        section(
            "The most changed",
            *map(_query, data.changed),
            note="Queries with the most new neighbours, of these the ones whose neighbours were farthest before. "
            "A change may be for better or worse.",
        ),
    ]
    head = Html(f'<h1>{escape(data.title)}</h1>\n<p class="address">{escape(data.address)}</p>')
    finding = Html(f'<p class="finding">{escape(_finding(data.counts))}</p>')
    shown = [*data.sample, *data.changed]
    parts = [
        head,
        finding,
        warnings(data.warnings),
        sentences(data.about),
        tiles(_tiles(data.counts)),
        _key(shown),
    ]
    return page(data.title, [Html(f"<style>{_STYLE}</style>"), *parts, contents(sections), *sections])


def _finding(counts: Counts) -> str:
    if counts.right_after is None:
        if counts.new_share is None:
            return "The neighbours of the images under the network's features."
        return f"{counts.new_share:.0%} of the neighbours are new."
    if counts.right_before is None:
        return f"{counts.right_after:.0%} of the neighbours have the label of their query."
    return (
        f"{counts.right_after:.0%} of the neighbours have the label of their query, "
        f"{counts.right_before:.0%} had it before."
    )


def _tiles(counts: Counts) -> list[tuple[str, str, str]]:
    shares = {"same label before": counts.right_before, "same label after": counts.right_after}
    shares |= {"new neighbours": counts.new_share}
    values = [("queries", f"{counts.num_queries:,}", ""), ("images to find", f"{counts.num_bank:,}", "")]
    values += [
        (name, f"{share:.1%}", "of the neighbours") for name, share in shares.items() if share is not None
    ]
    if counts.right_before is not None:
        values += [
            ("better", f"{counts.num_better:,}", "queries"),
            ("worse", f"{counts.num_worse:,}", "queries"),
        ]
    return values


def _key(queries: Sequence[Query]) -> Html:
    """What the marks mean, as far as they are used."""
    lines = []
    if any(_is_right(query, near) is not None for query in queries for near in query.after):
        lines += [
            '<span class="right"><b class="sign">✓</b>the label of the query</span>',
            '<span class="wrong"><b class="sign">✗</b>another label</span>',
        ]
    if any(near.is_new for query in queries for near in query.after):
        lines.append("<span><i>new</i>not among the nearest before</span>")
    lines.append("<span>0.832: cosine of the two features, 1 if they point the same way</span>")
    return Html(f'<p class="key">{"".join(lines)}</p>')


def _query(query: Query) -> Html:
    strips = "".join(_strips(query))
    return Html(f'<div class="query"><figure>{_shown(query.picture)}</figure><div>{strips}</div></div>')


def _strips(query: Query) -> Iterator[str]:
    for name, nearest in (("before", query.before), ("after", query.after)):
        if not nearest:
            continue
        rights = [right for near in nearest if (right := _is_right(query, near)) is not None]
        count = f"<small>{sum(rights)} of {len(rights)} right</small>" if rights else ""
        yield f'<div class="strip"><h3>{name}{count}</h3>{"".join(_near(query, one) for one in nearest)}</div>'


def _near(query: Query, near: Neighbour) -> str:
    right = _is_right(query, near)
    kind, sign = {True: ("right", "✓"), False: ("wrong", "✗"), None: ("", "")}[right]
    mark = f'<b class="sign" aria-hidden="true">{sign}</b>' if sign else ""
    word = {True: ", the same label", False: ", another label", None: ""}[right]
    label = f"<b>{escape(near.picture.label)}</b>" if near.picture.label else ""
    new = " <i>new</i>" if near.is_new else ""
    return (
        f'<figure class="near {kind}">{_image(near.picture, word)}{mark}'
        f"<figcaption>{label}{near.cosine:.3f}{new}</figcaption></figure>"
    )


def _shown(picture: Picture) -> str:
    label = f"<b>{escape(picture.label)}</b>" if picture.label else ""
    name = escape(picture.key.rpartition("/")[2])
    return f'{_image(picture, "")}<figcaption title="{escape(picture.key)}">{label}<span>{name}</span></figcaption>'


def _image(picture: Picture, word: str) -> str:
    text = escape(f"{picture.key}{word}")
    if not picture.jpeg:
        return f'<div class="none" role="img" aria-label="{text}"></div>'
    data = base64.b64encode(picture.jpeg).decode()
    return f'<img src="data:image/jpeg;base64,{data}" alt="{text}" title="{text}" width="{SIDE}" height="{SIDE}">'


def _is_right(query: Query, near: Neighbour) -> bool | None:
    """Return whether the two have the same label; None if either has none."""
    labels = query.picture.label, near.picture.label
    return None if "" in labels else labels[0] == labels[1]
