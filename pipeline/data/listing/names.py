"""Tell by its name what an object may be: an image, a Parquet or tar file, something else, or not to be told so.

Stands between the listing and the contents. The content decides where a name does not: see sniffing.py. Reads nothing;
no Ray here.
"""

import posixpath
import re
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from dinoray.pipeline.data.decoding.heif import HEIF_IS_READ

Role = Literal["image", "unknown", "parquet", "tar", "other"]

HEIF_SUFFIXES = frozenset({".heic", ".heif", ".heics", ".hif"})
IMAGE_SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif"),
        *(".tif", ".tiff", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".avif"),
        *(".ppm", ".pgm", ".pbm", ".pnm", ".pam"),
        *(HEIF_SUFFIXES if HEIF_IS_READ else ()),
    }
)
ARRAY_SUFFIX = ".npy"
"""Of arrays of numpy, which are images or features of images: the content decides, see sniffing.py."""
_PARQUET = re.compile(r"\.(parquet|parq|pq)(\.(gz|gzip|snappy|zstd|zst|lz4|br|brotli|lzo))?$")
"""Some writers add the codec of the pages."""
ARCHIVE_SUFFIXES = frozenset({".zip", ".rar", ".7z", ".tgz", ".tbz", ".tbz2", ".txz"})
CAMERA_RAW = frozenset(
    {".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".dng", ".raf", ".orf", ".rw2", ".pef"}
)
"""Most begin as a TIFF, which holds a thumbnail."""
UNREAD_IMAGES = frozenset(
    {
        *(
            ".jxl",
            ".jxr",
            ".tga",
            ".pcx",
            ".psd",
            ".psb",
            ".xcf",
            ".exr",
            ".hdr",
            ".pfm",
            ".dds",
            ".qoi",
        ),
        *(".ico", ".icns", ".cur", ".sgi", ".bpg", ".dcm", ".fits"),
    }
)
OTHER_SUFFIXES = frozenset(
    {
        *(".json", ".jsonl", ".ndjson", ".txt", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".toml", ".ini"),
        *(".md", ".rst", ".html", ".htm", ".pdf", ".doc", ".docx", ".xls", ".xlsx", ".log", ".lock", ".url"),
        *(".py", ".ipynb", ".sh", ".js", ".css", ".c", ".cpp", ".h", ".m", ".r", ".cfg", ".lst", ".names"),
        *(".md5", ".sha1", ".sha256", ".sha512", ".crc", ".sum", ".sig", ".asc", ".db", ".sqlite", ".xmp"),
        *(".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".mp3", ".wav", ".flac", ".svg"),
        *(".npz", ".mat", ".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".safetensors", ".onnx"),
        # Copies, thumbnails, and downloads that have not ended: images by content, and none that anybody wants.
        *(
            ".bak",
            ".old",
            ".orig",
            ".dinoray-tmp",
            ".jpg_original",
            ".tmp",
            ".temp",
            ".swp",
            ".part",
            ".partial",
        ),
        *(".crdownload", ".download", ".filepart", ".aria2", ".thm", ".thumb", ".aae", ".trashed"),
        # Whole slides in TIFF, whose first page has more pixels than an image may have.
        *(".svs", ".ndpi", ".scn", ".mrxs", ".vsi", ".czi"),
        # Other containers.
        *(".mds", ".mdb", ".lmdb", ".tfrecord", ".tfrecords", ".tfrec", ".lance", ".arrow", ".feather"),
        *(".h5", ".hdf5", ".beton", ".rec", ".idx", ".zarr", ".ffcv"),
    }
    | ARCHIVE_SUFFIXES
    | CAMERA_RAW
    | UNREAD_IMAGES
    | (HEIF_SUFFIXES - IMAGE_SUFFIXES)
)
"""Of objects that are no images, or not read; others are looked into."""
_TEXT_NAMES = re.compile(
    r"(readme|licen[cs]e|copying|notice|authors|contributors|changelog|changes|todo|install|makefile|dockerfile"
    r"|version|metadata|labels?|classes|index|md5|md5sums?|sha\d*sums?|sums|checksums?|b2sums|.*_\$folder\$"
    r"|.*~|.*:zone\.identifier)",
    re.DOTALL,
)
"""Of texts, folders and backups, and what Windows notes of downloads."""
_RUNS_ON = re.compile(r"[. ]+$")
"""Dots and spaces at the end of a name, which other systems add or drop."""
_STYLES = "?!@#:;&%"
"""What servers of images begin a query, a style or a size with, which they append to a name."""


def _any_of(suffixes: frozenset[str]) -> str:
    """Return a pattern in upper and lower case. To ignore case would let in letters such as a long s."""
    letters = (re.escape(suffix) for suffix in sorted(suffixes))
    return "|".join(re.sub("[a-z]", lambda one: f"[{one[0]}{one[0].upper()}]", text) for text in letters)


_STYLED = re.compile(rf"(?s).*(?:{_any_of(IMAGE_SUFFIXES)})(?!:zone\.identifier)[{_STYLES}]")
PLAIN_IMAGE = rf"(?s)(?:^|/)[^./][^/]*(?:{_any_of(IMAGE_SUFFIXES)})(?:[?!][^/]*)?$"
"""Matches only keys that `role_of` takes for images, and most of these."""
PLAIN_OTHER = rf"(?s)(?:^|/)[^./][^/{_STYLES}]*(?:{_any_of(OTHER_SUFFIXES)})$"
"""Matches only keys that `role_of` takes for none, and most of these."""

HIDDEN = r"(?:^|/)(?:\.[^./][^/]*|__MACOSX|@eaDir|\$RECYCLE\.BIN|System Volume Information|lost\+found)/"
"""Matches keys in folders of thumbnails, copies and deleted files that programs make beside images, or of git."""

_KIND = r"(?P<kind>(?:\.(?:tar|mds|parquet|tfrecords?|jpe?g|png))?\.[A-Za-z0-9_+-]{1,16})$"
_NUMBER = r"^\.\d+$"
_PART_OF = r"-\d+-of-\d+$"
FOLDER_MARKER, NUMBERED, BARE = "folder marker", ".1, .2, ...", ""


def role_of(key: str) -> Role:
    """Return the role of a key by its name: "image", "parquet", "tar", "unknown", or "other", which is ignored.

    An "unknown" key has no suffix, or one that says nothing. Suffixes match in upper and lower case, with trailing
    dots and spaces, and with what servers append (`a.jpg?w=640`, `a.jpg!large`). An image name may start with a dot or
    an underscore. But macOS's `._x.jpg`, system files, Spark's `_SUCCESS`, checksums and folder markers (`x/`,
    `x_$folder$`) are "other".
    """
    name = _RUNS_ON.sub("", key.rsplit("/", 1)[-1]).lower()
    suffix = posixpath.splitext(name)[1]
    if not name or name.startswith("._"):
        return "other"
    if suffix in IMAGE_SUFFIXES or _STYLED.match(name):
        return "image"
    if name.startswith((".", "_")) or _TEXT_NAMES.fullmatch(name):
        return "other"
    if _PARQUET.search(name):
        return "parquet"
    if suffix == ".tar":
        return "tar"
    return "other" if suffix in OTHER_SUFFIXES else "unknown"


def kinds_of(keys: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return what to count each key as: its suffix in lower case, BARE without any, FOLDER_MARKER or NUMBERED.

    An archive's suffix is whole (`.tar.gz`), and that of a shard is without its number.
    """
    names = pc.replace_substring_regex(pc.utf8_rtrim(keys, " ."), _PART_OF, "")
    kinds = pc.struct_field(pc.extract_regex(names, _KIND), "kind")
    kinds = pc.fill_null(pc.utf8_lower(kinds), BARE)
    kinds = pc.if_else(pc.match_substring_regex(kinds, _NUMBER), NUMBERED, kinds)
    return pc.if_else(pc.match_substring_regex(keys, r"(?:/|_\$folder\$)$"), FOLDER_MARKER, kinds)


def most_frequent(kinds: pa.ChunkedArray, most: int) -> list[tuple[str, int]]:
    """Return the `most` most frequent kinds and the number of each, in that order."""
    counts = pc.value_counts(kinds)
    table = pa.table({"kind": counts.field("values"), "number": counts.field("counts")})
    order = pc.sort_indices(table, [("number", "descending"), ("kind", "ascending")])[:most]
    return [(row["kind"], row["number"]) for row in table.take(order).to_pylist()]
