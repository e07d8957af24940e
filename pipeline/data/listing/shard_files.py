"""Files of Parquet tables that are no rows of them: logs and changes of Delta Lake, Hudi and Spark. No Ray here."""

import pyarrow as pa
import pyarrow.compute as pc

from dinoray.pipeline.data.listing.contents import Contents

_OF_TABLES = r"(?:^|/)(?:_delta_log|_change_data|_temporary|_spark_metadata|\.hoodie)/"
"""Folders of logs, of changes, and of files that were never committed."""
_FORMATS = {
    "Delta": r"(?:^|/)_delta_log/",
    "Hudi": r"(?:^|/)\.hoodie/",
    "Iceberg": r"(?:^|/)metadata/(?:[^/]*\.metadata\.json|snap-[^/]*\.avro|version-hint\.text)$",
}


def without_logs(contents: Contents) -> Contents:
    """Return the contents with Parquet in the folders of logs among the others."""
    shards, others = contents.shards, contents.others
    is_log = pc.match_substring_regex(shards["key"], _OF_TABLES)
    others = pa.concat_tables([others, shards.filter(is_log)])
    return contents._replace(shards=shards.filter(pc.invert(is_log)), others=others)


def note_on_logs(contents: Contents) -> list[str]:
    """Return a phrase on each format of tables whose log says which of the shards count."""
    if not contents.shards.num_rows:
        return []
    keys = contents.others["key"]
    found = [
        name for name, pattern in _FORMATS.items() if pc.any(pc.match_substring_regex(keys, pattern)).as_py()
    ]
    return [
        f"the log of the {name} table is not read: rows that it has deleted or replaced are read too; write the table "
        "anew as plain Parquet to leave them out"
        for name in found
    ]
