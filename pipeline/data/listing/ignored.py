"""What a listing leaves out, counted by kind, and the line about it that all commands print.

The counts are part of the manifest, so that a run that resumes prints them too. Lists nothing; no Ray here.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import pyarrow as pa

from dinoray.pipeline.data.listing.names import (
    ARRAY_SUFFIX,
    BARE,
    CAMERA_RAW,
    FOLDER_MARKER,
    HEIF_SUFFIXES,
    UNREAD_IMAGES,
    kinds_of,
    most_frequent,
)

NOT_UTF8, BROKEN_LINK, LOOP = "not UTF-8", "broken link", "loop"
OFTEN_LINKED, SPECIAL_FILE = "often linked", "special file"
HIDDEN_FILE, CLOSED_FOLDER = "hidden file", "closed folder"
EXCLUDED, UNNAMED, UNADDRESSED, OTHER_KINDS = "excluded", "unnamed", "unaddressed", "other kinds"
_NOUNS = {
    BARE: ("file without a suffix", "files without a suffix"),
    FOLDER_MARKER: ("folder marker", "folder markers"),
    NOT_UTF8: ("name that is not UTF-8", "names that are not UTF-8"),
    BROKEN_LINK: ("broken link", "broken links"),
    LOOP: ("link to a folder that it lies in", "links to folders that they lie in"),
    OFTEN_LINKED: ("link to a folder with too many links", "links to folders with too many links"),
    SPECIAL_FILE: ("pipe, socket or device", "pipes, sockets and devices"),
    HIDDEN_FILE: ("file in a hidden folder", "files in hidden folders"),
    CLOSED_FOLDER: ("folder that cannot be read", "folders that cannot be read"),
    EXCLUDED: ("left out by data.include and data.exclude",) * 2,
    UNNAMED: ("not in data.image_list",) * 2,
    UNADDRESSED: ("not in data.uri_column",) * 2,
    OTHER_KINDS: ("of other kinds",) * 2,
    "run": ("run directory", "run directories"),
    "study": ("study", "studies"),
    "embeddings": ("table of embeddings", "tables of embeddings"),
    "packed": ("packed set", "packed sets"),
}
OUTPUT = ("run", "study", "embeddings", "packed")
"""Kinds of folders that this program writes."""
_MOST_COUNTED = 200
_MOST_SUFFIXES, _MOST_REMEDIES, _MOST_NAMES = 6, 2, 5
_COMPRESSED_TAR = r"\.(tar\.(gz|zst|xz|bz2)|tgz|txz|tbz2?)"
_REMEDIES = {
    "|".join(
        map(re.escape, sorted(HEIF_SUFFIXES))
    ): "pip install 'dinoray[heic]' on all nodes, and {0} is read",
    r"\.tar": "data.include='*.tar' reads {0}",
    _COMPRESSED_TAR: "decompress {0} with gunzip, unzstd, unxz or bunzip2: .tar is read as it is",
    r"\.zip": "unpack {0}: python -m zipfile -e FILE FOLDER",
    r"\.(rar|7z)": "unpack {0}: bsdtar -xf FILE -C FOLDER",
    "|".join(map(re.escape, sorted(CAMERA_RAW | UNREAD_IMAGES))): "convert {0} to .tif or .jpg",
    re.escape(
        ARRAY_SUFFIX
    ): "{0} is read where it holds numbers [H,W] or [H,W,C], C at most 16; beside other images, "
    "set data.include=*.npy (in tar files data.image_column=npy)",
    re.escape(NOT_UTF8): "rename them: convmv -r -f latin1 -t utf8 --notest FOLDER",
    r"\.mds(\..+)?": "copy the images of {0} (MDS): mkdir OUT && python -c \"import streaming; [r['image'].save("
    "f'OUT/{{i}}.png') if hasattr(r['image'], 'save') else open(f'OUT/{{i}}', 'wb').write(r['image']) "
    "for i, r in enumerate(streaming.StreamingDataset(local='FOLDER', batch_size=1))]\"",
    r"\.l?mdb": "copy the images of {0} (LMDB): mkdir OUT && python -c \"import lmdb, os; [open(f'OUT/{{i}}', 'wb')"
    ".write(v) for i, (k, v) in enumerate(lmdb.open('FOLDER', subdir=os.path.isdir('FOLDER'), readonly=True, "
    'lock=False).begin().cursor())]"',
    r"\.tfrec(ords?)?": 'copy the images of {0} (TFRecord): mkdir OUT && python -c "import glob, tensorflow as t; '
    "[open(f'OUT/{{i}}', 'wb').write(next(f[k].bytes_list.value[0] for k in ('image/encoded', 'image', 'jpg') "
    "if k in f)) for i, r in enumerate(t.data.TFRecordDataset(sorted(glob.glob('FOLDER/*tfrec*')))) "
    'for f in [t.train.Example.FromString(r.numpy()).features.feature]]"',
    r"\.lance": 'write {0} as Parquet: python -c "import lance, pyarrow.dataset as d; '
    "d.write_dataset(lance.dataset('FOLDER').scanner().to_reader(), 'OUT', format='parquet')\"",
    r"\.arrow": 'write {0} as Parquet: mkdir OUT && python -c "import datasets, glob; [datasets.Dataset.from_file(f)'
    ".to_parquet(f'OUT/{{f.split(chr(47))[-2]}}-{{i}}.parquet') for i, f in "
    "enumerate(sorted(glob.glob('FOLDER/**/*.arrow', recursive=True)))]\"",
}
"""Pattern of kinds -> how their images can be used. What is written into OUT is read as any folder.

FOLDER is the folder of the set: that with MDS's index.json, LMDB's data.mdb (or the file), `x.lance`.
"""


class Ignored(NamedTuple):
    """How many objects of one kind are left out: a suffix, a key of the table of nouns, or a phrase.

    `names` are a few of these objects, where that helps.
    """

    kind: str
    number: int
    names: tuple[str, ...] = ()


def ignored_line(ignored: Sequence[Ignored], otherwise: str | None = None) -> str | None:
    """Return what is left out, and how it can be used, or `otherwise` if there is no way.

    Returns `ignored: 24 .heic, 3 .tar.gz, 12 names that are not UTF-8, 1 run directory (runs/a); REMEDY`.

    None if nothing is left out. Suffixes come first, the most frequent ones.
    """
    suffixes = sorted(
        (one for one in ignored if one.kind.startswith(".")), key=lambda one: (-one.number, one.kind)
    )
    others = [one for one in ignored if not one.kind.startswith(".") and one.kind != OTHER_KINDS]
    rare = [*suffixes[_MOST_SUFFIXES:], *(one for one in ignored if one.kind == OTHER_KINDS)]
    suffixes = suffixes[:_MOST_SUFFIXES]
    shown = [_phrase(one) for one in (*suffixes, *others)]
    if rare:
        shown.append(_phrase(Ignored(OTHER_KINDS, sum(one.number for one in rare))))
    if not shown:
        return None
    remedies = _remedies([*suffixes, *others]) or ([] if otherwise is None else [otherwise])
    return "; ".join([f"ignored: {', '.join(shown)}", *remedies])


def some_names(names: Sequence[str], more: int = 0) -> str:
    """Return the first few names as text, and how many more there are, besides `more` that are not given."""
    more += len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def count_keys(keys: pa.ChunkedArray) -> tuple[Ignored, ...]:
    """Return objects that are left out, by suffix; beyond a number of suffixes they are counted together."""
    kinds = kinds_of(keys)
    counts = most_frequent(kinds, _MOST_COUNTED)
    rest = len(kinds) - sum(number for _, number in counts)
    return (*(Ignored(kind, number) for kind, number in counts), *from_counts({OTHER_KINDS: rest}))


def from_counts(counts: Mapping[str, int]) -> Iterable[Ignored]:
    """Yield what was counted, without zeros."""
    return (Ignored(kind, number) for kind, number in counts.items() if number)


def _phrase(one: Ignored) -> str:
    singular, plural = _NOUNS.get(one.kind, (one.kind, one.kind))
    names = f" ({some_names(one.names, one.number - len(one.names))})" if one.names else ""
    return f"{one.number} {singular if one.number == 1 else plural}{names}"


def _remedies(ignored: Iterable[Ignored]) -> list[str]:
    found: dict[str, list[str]] = {}
    for one in ignored:
        for pattern, text in _REMEDIES.items():
            if re.fullmatch(pattern, one.kind):
                found.setdefault(text, []).append(one.kind)
    return [text.format(" and ".join(kinds)) for text, kinds in found.items()][:_MOST_REMEDIES]
