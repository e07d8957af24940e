"""The facts about packed images, read from the files beside the parts."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dinoray.pipeline.data.decoding.image_facts import SMALL_BYTES, ImageFacts
from dinoray.pipeline.data.reading.fetched import Fetched
from dinoray.pipeline.data.reading.source import Status
from dinoray.pipeline.export.packing_facts import EXACT, PartFacts, TableFacts
from dinoray.pipeline.export.parquet_parts import facts_name
from dinoray.pipeline.storage.files import Directory


def facts(digest: int, num_bytes: int) -> ImageFacts:
    hashed = np.random.default_rng(digest).integers(1 << 63)  # far from others in its bits
    small = bytes([digest]) * SMALL_BYTES
    return ImageFacts(
        "JPEG", "RGB, 8 bits", 9, 8, num_bytes, 0, 255, 100, bytes([digest]) * 16, int(hashed), small
    )


def test_each_file_is_read_once_for_duplicates_and_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Directory(str(tmp_path))
    for part, rows in enumerate([(4, 0), (3, 1), (2,)]):
        written = PartFacts()
        for row in rows:  # rows 3 and 4 have the bytes of rows 1 and 0
            written.add(
                row, Fetched(f"{row}.jpg", b"", "a", Status.OK, ""), facts(min(row, 4 - row), 10 + row)
            )
        written.write(out, part)
    reads, read = Counter[str](), Directory.read

    def counted(self: Directory, name: str) -> bytes:
        reads[name] += 1
        return read(self, name)

    monkeypatch.setattr(Directory, "read", counted)
    table = TableFacts(out, 3)
    repeats = table.repeats()
    keys = table.take(repeats.left_out(EXACT), ["key"])["key"].to_pylist()
    assert sorted(keys) == ["3.jpg", "4.jpg"]
    assert (table.statistics.num_images, table.statistics.num_bytes) == (5, 60)
    assert [reads[facts_name(part)] for part in range(3)] == [2, 2, 1]  # again for the keys alone
