"""Sort the objects of a large data set by key, in little more memory than they take. No storage and no Ray here."""

from itertools import pairwise

import pyarrow as pa
import pyarrow.compute as pc


def sorted_by_key(columns: dict[str, pa.ChunkedArray]) -> pa.Table:
    """Sort in byte order of the key, as Arrow compares strings, because stores list in different orders.

    Takes the columns out of `columns`, one after the other, so that only one exists twice at a time.
    """
    order = None if is_sorted(columns["key"]) else pc.sort_indices(columns["key"])
    table = pa.table({})
    for name in list(columns):
        column = columns.pop(name)
        one = pa.table({name: column if order is None else column.take(order)}).combine_chunks()
        table = table.append_column(name, one[name]) if table.num_columns else one
        del column, one
        pa.default_memory_pool().release_unused()
    return table


def is_sorted(keys: pa.ChunkedArray) -> bool:
    """Return True if keys are in the order of their bytes."""
    chunks = [chunk for chunk in keys.chunks if len(chunk)]
    pairs = [pa.array([one[-1].as_py(), other[0].as_py()], keys.type) for one, other in pairwise(chunks)]
    return all(
        pc.all(pc.less_equal(chunk[:-1], chunk[1:]), min_count=0).as_py() for chunk in (*pairs, *chunks)
    )
