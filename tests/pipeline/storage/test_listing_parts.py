"""A listing that is interrupted: what is kept of it is not asked for again, and the result is that of one attempt."""

import random
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoray.models.errors import ConfigError, DataError, DinorayError
from dinoray.pipeline.storage import key_ranges, listing_parts
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.key_range import Stretch
from dinoray.pipeline.storage.key_ranges import list_ranges
from dinoray.pipeline.storage.listing_parts import (
    MAX_AGE_SECONDS,
    PART,
    ListingParts,
    OutdatedPartsError,
    Part,
    resumable,
)
from dinoray.pipeline.storage.pages import LISTED, Objects, Page
from dinoray.pipeline.storage.progress import Count
from dinoray.pipeline.storage.retry import DeniedObject, Retry, Unreachable, retrying

PAGE = 3
NOW = 1_800_000_000.0


class Store:
    """Pages of a few sorted keys each; fails for good after some of them. `served` are the keys given so far.

    With `directory` it does not fail before a part has been written there, whichever thread comes first.
    """

    def __init__(
        self, keys: Sequence[str], num_pages: int = 10**9, directory: Directory | None = None
    ) -> None:
        self.keys, self.num_left, self.directory = sorted(keys), num_pages, directory
        self.served: list[str] = []
        self.lock = threading.Lock()

    def __call__(self, *, start_after: str | None, token: str | None, retry: Retry) -> Page:
        with self.lock:
            self.num_left -= 1
            is_over = self.num_left < 0
        if is_over:
            if self.directory is not None:
                self.wait_for_a_part(self.directory)
            raise DataError("the power is off")
        with self.lock:
            after = token or start_after or ""
            rest = [key for key in self.keys if key > after]
            keys = rest[:PAGE]
            self.served += keys
        return Page(
            Objects(keys, [1] * len(keys), keys, [None] * len(keys)),
            [],
            keys[-1] if len(rest) > PAGE else None,
        )

    def folders(self, folder: str, *, retry: Retry) -> list[str]:
        return []

    @staticmethod
    def wait_for_a_part(directory: Directory) -> None:
        deadline = time.monotonic() + 120
        while not files(directory) and time.monotonic() < deadline:
            time.sleep(0.01)


@contextmanager
def short_parts(pages: int = 2) -> Iterator[Directory]:
    """A folder for parts of few pages that are written at once."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(key_ranges, "PAGES_PER_PART", pages)
        patch.setattr(listing_parts, "AFTER_SECONDS", 0.0)
        yield Directory(folder)


def opened(directory: Directory, now: float = NOW) -> ListingParts:
    parts = ListingParts(directory, lambda: now)
    parts.open("store bucket prefix")
    return parts


def listed(store: Store, parts: ListingParts, threads: int = 3) -> list[str]:
    count = Count("listing", "keys")
    batches = list_ranges(
        store,
        store.folders,
        "",
        retry=retrying,
        retry_later=retrying,
        count=count,
        parts=parts,
        threads=threads,
    )
    try:
        keys = [key for batch in batches for key in batch["key"].to_pylist()]
    finally:
        for thread in threading.enumerate():  # those of a process that is killed write nothing more
            if thread.name == "list-keys":
                thread.join(60)
    assert count.done == len(keys)
    return keys


def interrupted(store: Store, parts: ListingParts, threads: int = 3) -> None:
    with pytest.raises(DataError, match="the power is off"):
        listed(store, parts, threads)


def kept(parts: ListingParts) -> list[str]:
    return [key for stretch in parts.stretches for key in stretch.batch["key"].to_pylist()]


def files(directory: Directory) -> list[Path]:
    return sorted(Path(directory.uri).glob(f"*/{PART}*"))


NUMBERED = [f"{number:04}" for number in range(200)]
names = st.text(st.sampled_from("/-.019azAé\U0001f600\t"), min_size=1, max_size=6)


@settings(max_examples=40)
@given(
    st.lists(names, unique=True, min_size=25, max_size=80),
    st.integers(3, 12),
    st.integers(1, 8),
    st.integers(1, 4),
)
def test_after_two_interruptions_all_keys_come_once(
    keys: list[str], first: int, second: int, threads: int
) -> None:
    with short_parts() as directory:
        for num_pages in (first, second, 10**9):
            store, parts = Store(keys, num_pages), opened(directory)
            before = kept(parts)
            try:
                assert listed(store, parts, threads) == sorted(keys)
                break
            except DataError:
                assert num_pages < 10**9
        # A page may reach from a gap into what is kept, but none begins there.
        assert len(set(before) & set(store.served)) <= PAGE * (len(parts.stretches) + 1)
        parts.forget()
        assert list(Path(directory.uri).iterdir()) == []


def test_what_is_kept_is_not_asked_for_again() -> None:
    with short_parts() as directory:
        interrupted(Store(NUMBERED, 50, directory), opened(directory))
        store, parts = Store(NUMBERED), opened(directory)
        assert len(kept(parts)) > 50
        assert listed(store, parts) == NUMBERED
        inner = {key for stretch in parts.stretches for key in stretch.batch["key"].to_pylist()[PAGE:]}
        assert inner
        assert not inner & set(store.served)


def test_a_listing_that_was_read_to_its_end_takes_no_page() -> None:
    with short_parts() as directory:
        assert listed(Store(NUMBERED), opened(directory), threads=1) == NUMBERED
        store = Store(NUMBERED, 0)
        assert listed(store, opened(directory)) == NUMBERED


def test_other_listings_in_the_directory_are_left_alone() -> None:
    with short_parts() as directory:
        interrupted(Store(NUMBERED, 50, directory), opened(directory))
        other = ListingParts(directory, lambda: NOW)
        other.open("store bucket another")
        assert other.stretches == []
        other.forget()
        assert files(directory)


@given(st.lists(names, unique=True, min_size=1), st.randoms())
def test_a_part_is_read_as_written_or_not_at_all(keys: list[str], rng: random.Random) -> None:
    keys.sort()
    batch = Objects(keys, list(range(len(keys))), keys, [None] * len(keys)).to_arrow()
    part = Part(Stretch("", rng.choice([None, keys[-1]]), rng.choice([None, "z"]), batch), NOW)
    data = part.to_bytes()
    assert Part.from_bytes(data) == part
    assert part.stretch.batch.schema == LISTED
    place = rng.randrange(len(data))
    flipped = data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]
    assert Part.from_bytes(flipped) is None
    assert Part.from_bytes(data[:place]) is None


def test_a_torn_part_is_dropped_and_its_keys_are_listed_again() -> None:
    with short_parts() as directory:
        interrupted(Store(NUMBERED, 50, directory), opened(directory))
        whole = kept(opened(directory))
        torn = files(directory)[0]
        torn.write_bytes(torn.read_bytes()[:-1])
        parts = opened(directory)
        assert 0 < len(kept(parts)) < len(whole)
        assert listed(Store(NUMBERED), parts) == NUMBERED


def test_two_attempts_at_a_time_do_no_harm() -> None:
    with short_parts() as directory:
        one, other = opened(directory), opened(directory)
        interrupted(Store(NUMBERED, 40), one)
        interrupted(Store(NUMBERED, 50), other)
        store, parts = Store(NUMBERED), opened(directory)
        assert listed(store, parts) == NUMBERED


@pytest.mark.parametrize(
    ("age", "is_kept"), [(0, True), (MAX_AGE_SECONDS - 1, True), (MAX_AGE_SECONDS, False), (-1, False)]
)
def test_a_listing_that_began_too_long_ago_is_begun_again(age: float, is_kept: bool) -> None:
    with short_parts() as directory:
        interrupted(Store(NUMBERED, 50, directory), opened(directory))
        assert bool(opened(directory, NOW + age).stretches) is is_kept


def test_the_age_is_that_of_the_first_attempt() -> None:
    with short_parts() as directory:
        interrupted(Store(NUMBERED, 30), opened(directory))
        interrupted(Store(NUMBERED, 20), opened(directory, NOW + MAX_AGE_SECONDS - 1))
        assert opened(directory, NOW + MAX_AGE_SECONDS + 1).stretches == []


@pytest.mark.parametrize("change", ["inserted", "deleted"])
def test_a_store_that_has_changed_where_a_part_ends_is_noticed(change: str) -> None:
    with short_parts() as directory:
        interrupted(Store(NUMBERED, 50, directory), opened(directory))
        parts = opened(directory)
        ends = [one for one in parts.stretches if one.next is not None]
        gap = next(a for a, b in zip(ends, [*ends[1:], None], strict=True) if b is None or a.end != b.start)
        keys = (
            [*NUMBERED, f"{gap.end}x"]
            if change == "inserted"
            else [key for key in NUMBERED if key != gap.next]
        )
        with pytest.raises(OutdatedPartsError):
            listed(Store(keys), parts)
        parts.forget()
        assert files(directory) == []


def test_a_short_listing_writes_nothing(tmp_path: Path) -> None:
    parts = opened(Directory(str(tmp_path)))
    assert listed(Store(NUMBERED), parts) == NUMBERED
    parts.forget()
    assert list(tmp_path.iterdir()) == []


def test_parts_wait_until_the_listing_has_taken_some_time(tmp_path: Path) -> None:
    times = iter([0.0, 1.0, 4.9, 5.0, 6.0])
    parts = ListingParts(Directory(str(tmp_path)), lambda: next(times))
    parts.open("store")
    batches = [pa.record_batch([[key], [1], [key], [None]], LISTED) for key in "abcd"]
    numbers = []
    for batch, start, end in zip(batches, ["", "a", "b", "c"], "abcd", strict=True):
        parts.keep(Stretch(start, end, f"{end}x", batch))
        numbers.append(len(files(Directory(str(tmp_path)))))
    assert numbers == [0, 0, 3, 4]


def test_parts_that_cannot_be_deleted_are_not_taken_for_those_of_an_interrupted_listing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(directory: Directory, name: str) -> None:
        raise DeniedObject("deleting is not allowed")

    with short_parts() as directory:
        parts = opened(directory)
        with monkeypatch.context() as patch:
            patch.setattr(Directory, "delete", refuse)
            listed(Store(NUMBERED), parts)
            parts.forget()
            assert "can be deleted" in caplog.text
            assert len(files(directory)) > 1
            parts.open("store bucket prefix")  # after a change of the store
            assert parts.stretches == []
            assert opened(directory).stretches == []
        assert opened(directory).stretches == []
        assert files(directory) == []  # by who may


@pytest.mark.parametrize("error", [Unreachable("away"), ConfigError("a wrong setting")])
def test_what_storage_does_leaves_the_parts_of_a_listing_that_was_complete(error: DinorayError) -> None:
    def fail(directory: Directory) -> None:
        with resumable(directory) as parts:
            parts.open("store bucket prefix")
            listed(Store(NUMBERED), parts)
            parts.is_complete = True
            raise error

    with short_parts() as directory:
        with pytest.raises(type(error)):
            fail(directory)
        assert bool(files(directory)) == isinstance(error, Unreachable)


def test_a_directory_that_takes_no_parts_does_not_end_the_listing(caplog: pytest.LogCaptureFixture) -> None:
    with short_parts() as directory:
        parts = opened(directory)
        shutil.rmtree(directory.uri)
        Path(directory.uri).write_bytes(b"not a folder")
        try:
            assert listed(Store(NUMBERED), parts) == NUMBERED
        finally:
            Path(directory.uri).unlink()
            Path(directory.uri).mkdir()
        warnings = [record for record in caplog.records if "cannot be resumed" in record.message]
        assert warnings
        parts.forget()


def test_keys_in_another_order_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing_parts, "AFTER_SECONDS", 0.0)
    parts = opened(Directory(str(tmp_path)))
    fine: Any = Objects(["a", "b"], [1, 1], ["", ""], [None, "GLACIER"]).to_arrow()
    odd: Any = Objects(["d", "c"], [1, 1], ["", ""], [None, None]).to_arrow()
    parts.keep(Stretch("", "b", "d", fine))
    assert len(files(Directory(str(tmp_path)))) == 1
    parts.keep(Stretch("b", "c", "e", odd))
    parts.keep(Stretch("e", "f", "g", Objects(["f"], [1], [""], [None]).to_arrow()))
    assert len(files(Directory(str(tmp_path)))) == 1
