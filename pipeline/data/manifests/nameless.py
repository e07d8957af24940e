"""Take objects whose names say nothing for images, Parquet or tar files, by what a few of them begin as.

Stands between the contents of a data set and its manifest. No Ray here.
"""

import pyarrow as pa
import pyarrow.compute as pc

from dinoray.pipeline.data.config import DataConfig
from dinoray.pipeline.data.listing.contents import Contents
from dinoray.pipeline.data.listing.folder_labels import AUTO, has_label_pair
from dinoray.pipeline.data.listing.names import kinds_of, most_frequent
from dinoray.pipeline.data.listing.sniffing import contents_of
from dinoray.pipeline.data.parquet.first_shard import hold_images
from dinoray.pipeline.data.parquet.shards import ShardFiles
from dinoray.pipeline.storage.config import StorageConfig

_MOST_NAMED = 5


def look_into(contents: Contents, config: DataConfig, storage: StorageConfig) -> Contents:
    """Return the contents with the objects whose names say nothing as what a few of them begin as.

    Of images, Parquet and tar files of that sort the most frequent ones are taken; beside tar files or Parquet of
    images that have names, and no images that have, more of the same.
    """
    unknown = contents.unknown
    if not unknown.num_rows:
        return contents
    found = contents_of(unknown, contents.root, storage, beside_images=contents.images.num_rows > 0)
    most = _most_frequent_content(found, contents, storage)
    found = pc.if_else(pc.equal(found, most), found, pa.scalar(None, pa.string()))
    images, shards, tars = (
        unknown.filter(pc.fill_null(pc.equal(found, what), False)) for what in ("image", "parquet", "tar")
    )
    if config.from_folders == AUTO:  # a shard's own labels come first, before folders that are none by name
        is_pair = [
            has_label_pair(key[len(contents.prefix) :].split("/")[:-1]) for key in shards["key"].to_pylist()
        ]
        labels = pc.if_else(pa.array(is_pair, pa.bool_()), shards["label"], pa.scalar(None, pa.string()))
        shards = shards.set_column(shards.schema.get_field_index("label"), "label", labels)
    counts = most_frequent(kinds_of(images["key"]), _MOST_NAMED) if images.num_rows else []
    taken = ", ".join(f"{number} {kind or 'without a suffix'}" for kind, number in counts)
    notes = [f"images by their content: {taken}"] if taken else []
    return contents._replace(
        images=pa.concat_tables([contents.images, images]),
        shards=pa.concat_tables([contents.shards, shards]),
        tars=pa.concat_tables([contents.tars, tars]),
        unknown=unknown.filter(found.is_null()),
        notes=(*contents.notes, *notes),
    )


def _most_frequent_content(found: pa.Array, contents: Contents, storage: StorageConfig) -> str:
    if not contents.images.num_rows:
        if contents.tars.num_rows:
            return "tar"
        if contents.shards.num_rows and hold_images(ShardFiles(contents.shards, contents.root, storage)):
            return "parquet"
    counts = {what: pc.sum(pc.equal(found, what)).as_py() or 0 for what in ("image", "parquet", "tar")}
    most = max(counts, key=counts.__getitem__)
    are_archives = contents.images.num_rows > contents.tars.num_rows + counts["tar"]
    return "" if most == "tar" and are_archives else most
