"""Listing by several requests at once: what one request after the other gives, for any keys and any store."""

import random
import threading
import time
from collections.abc import Callable, Sequence

import pytest
from faults import FaultProxy
from hypothesis import given
from hypothesis import strategies as st
from samples import put_all, small_pages
from servers import S3Server

from dinoray.models.errors import DataError
from dinoray.pipeline.data.listing.listing import list_entries
from dinoray.pipeline.storage import waiting
from dinoray.pipeline.storage.key_ranges import list_ranges
from dinoray.pipeline.storage.key_space import pages_left, split_point
from dinoray.pipeline.storage.pages import Objects, Page
from dinoray.pipeline.storage.progress import Count
from dinoray.pipeline.storage.retry import DeniedObject, Retry, Unreachable, retrying
from dinoray.pipeline.storage.s3 import list_pages

PAGE = 3
Begin = Callable[[Sequence[str], str], int]


def after(keys: Sequence[str], name: str) -> int:
    """Where a store begins that orders keys by their bytes."""
    return sum(key.encode() <= name.encode() for key in keys)


class Store:
    """Pages of a few keys each, in the order of `keys`."""

    def __init__(self, keys: Sequence[str], begin: Begin = after) -> None:
        self.keys, self.begin = keys, begin
        self.starts: list[str] = []
        self.chance = random.Random(len(keys))
        self.lock = threading.Lock()

    def __call__(self, *, start_after: str | None, token: str | None, retry: Retry) -> Page:
        time.sleep(self.chance.random() * 1e-3)  # a store is far away: else one thread would read all
        place = int(token) if token else 0
        if start_after is not None:
            with self.lock:
                self.starts.append(start_after)
            place = retry(lambda: self.begin(self.keys, start_after), what="store")
        keys = list(self.keys[place : place + PAGE])
        more = str(place + PAGE) if place + PAGE < len(self.keys) else None
        return Page(
            Objects(keys, [len(key) for key in keys], [f"tag {key}" for key in keys], [None] * len(keys)),
            [],
            more,
        )

    def folders(self, folder: str, *, retry: Retry) -> list[str]:
        """What a listing with a delimiter folds the keys below `folder` to."""
        below = [key[len(folder) :] for key in self.keys if key.startswith(folder)]
        return sorted({f"{folder}{name.partition('/')[0]}/" for name in below if "/" in name})


def listed(store: Store, prefix: str = "", threads: int = 4) -> list[str]:
    keys: list[str] = []
    count = Count("listing", "keys")
    for batch in list_ranges(
        store, store.folders, prefix, retry=retrying, retry_later=retrying, threads=threads, count=count
    ):
        assert batch["size"].to_pylist() == [len(key) for key in batch["key"].to_pylist()]
        assert batch["etag"].to_pylist() == [f"tag {key}" for key in batch["key"].to_pylist()]
        keys += batch["key"].to_pylist()
    assert count.done == len(keys)
    return keys


letters = st.sampled_from("/-.019azAé\U0001f600\t")
key_lists = st.lists(
    st.one_of(st.text(st.characters(codec="utf-8"), min_size=1), st.text(letters, min_size=1, max_size=6)),
    unique=True,
    max_size=80,
)


@given(key_lists, st.sampled_from(["", "a/", "train/é-"]))
def test_all_keys_come_once_and_in_order(names: list[str], prefix: str) -> None:
    keys = sorted((prefix + name for name in names), key=str.encode)
    assert listed(Store(keys), prefix) == keys


@pytest.mark.parametrize("count", [0, 1, PAGE - 1, PAGE, 5 * PAGE, 20 * PAGE])
def test_an_object_whose_key_is_the_prefix_itself_is_one_of_the_keys(count: int) -> None:
    """As the folders are that S3's console makes."""
    keys = ["photos/", *(f"photos/{number:04}.jpg" for number in range(count))]
    assert listed(Store(keys), "photos/") == keys


@given(st.integers(0, 300), st.integers(1, 10**9), st.sampled_from(["{:012}.jpg", "train/{:x}/x.jpg"]))
def test_numbered_keys_come_once_and_in_order(count: int, step: int, form: str) -> None:
    keys = sorted(form.format(number * step) for number in range(count))
    assert listed(Store(keys)) == keys


@given(key_lists, st.randoms())
def test_a_store_with_an_order_of_its_own_loses_no_key(keys: list[str], rng: random.Random) -> None:
    """As stores do that list folder by folder; here any order, and StartAfter by the first key that is greater."""
    rng.shuffle(keys)
    begin = lambda keys, name: next((i for i, key in enumerate(keys) if key > name), len(keys))  # noqa: E731
    assert listed(Store(keys, begin)) == keys


@given(key_lists)
def test_a_store_that_ignores_start_after_loses_and_doubles_no_key(names: list[str]) -> None:
    keys = sorted(names, key=str.encode)
    assert listed(Store(keys, lambda keys, name: 0)) == keys


@given(key_lists, st.randoms())
def test_a_store_that_begins_anywhere_loses_and_doubles_no_key(names: list[str], rng: random.Random) -> None:
    keys = sorted(names, key=str.encode)
    assert listed(Store(keys, lambda keys, name: rng.randint(0, len(keys)))) == keys


@given(key_lists)
def test_a_name_that_the_store_refuses_is_no_error(names: list[str]) -> None:
    def refuse(keys: Sequence[str], name: str) -> int:
        raise DeniedObject("400")

    keys = sorted(names, key=str.encode)
    assert listed(Store(keys, refuse)) == keys


def test_an_error_of_a_later_request_ends_the_listing() -> None:
    keys = [f"{number:04}" for number in range(100)]
    store = Store(keys)

    def read(*, start_after: str | None, token: str | None, retry: Retry) -> Page:
        if token == "30":
            raise DataError("no more")
        return store(start_after=None, token=token, retry=retry)

    ranges = list_ranges(read, store.folders, "", retry=retrying, retry_later=retrying)
    with pytest.raises(DataError, match="no more"):
        list(ranges)


def test_a_listing_that_is_left_ends_its_threads() -> None:
    store = Store([f"{number:06}" for number in range(3000)])
    ranges = list_ranges(store, store.folders, "", retry=retrying, retry_later=retrying)
    for _ in range(5):
        next(ranges)
    ranges.close()
    for thread in threading.enumerate():
        if thread.name == "list-keys":
            thread.join(timeout=120)
            assert not thread.is_alive()


def test_two_pages_take_two_requests() -> None:
    store = Store([f"{number:04}" for number in range(2 * PAGE)])
    listed(store)
    assert store.starts == []


keys_in_pairs = st.tuples(st.text(letters, max_size=8), st.text(letters, max_size=8))


@given(keys_in_pairs, st.sampled_from(["", "09", "0123456789abc", "Aaé"]), st.booleans())
def test_a_split_point_lies_between_its_keys(pair: tuple[str, str], of: str, has_end: bool) -> None:
    low, high = sorted(pair)
    name = split_point(low, high if has_end else None, prefix="", letters=of)
    if name is not None:
        assert low < name
        assert not has_end or name < high


def test_a_split_point_is_about_in_the_middle() -> None:
    digits = "0123456789"
    assert split_point("0000", "9999", prefix="", letters=digits) in ("4", "5")
    assert split_point("a/1000", "a/3000", prefix="", letters=digits) == "a/2"
    assert split_point("a/0", None, prefix="a/", letters=digits) in ("a/4", "a/5")
    assert split_point("a/99", "a/990", prefix="", letters=digits) is None
    assert pages_left("1000", "1999", "4999", prefix="", letters=digits) == pytest.approx(3, rel=0.3)
    assert pages_left("1000", "1999", None, prefix="", letters=digits) > 7


@pytest.mark.s3
def test_a_real_store_gives_what_one_request_after_the_other_gives(
    proxy: FaultProxy, s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With keys that are folders too, and names that SeaweedFS does not list in the order of their bytes."""
    small_pages(monkeypatch, 100)
    names = [f"all/c{n % 9}/{n:05}.jpg" for n in range(130)] + [f"all/{n:05}.jpg" for n in range(130)]
    names += [f"all/{c}{n}/é \U0001f600+%41&.jpg" for n in range(20) for c in ("a", "a-", "a.", "a/")]
    names += ["all/c1", "all/c1-x/y.jpg", "all/..two/..x", "all2/x.jpg", "all.jpg"]
    put_all(s3, bucket, dict.fromkeys(names, b"1"))
    expected = [key for page in list_pages(bucket, "all/") for key in page.objects.keys]
    assert sorted(expected) == sorted(name for name in names if name.startswith("all/"))
    proxy.delay_seconds = 0.02
    proxy.slow_seconds = 1.0
    proxy.fail("slow", pattern="continuation-token", times=2)  # few pages: folders must come before the third
    listing = list_entries(f"s3://{bucket}/all")
    assert [entry.key for entry in listing.entries] == expected
    assert proxy.count("start-after") > 0
    proxy.fail("slow_down", pattern="start-after", times=5)
    assert [entry.key for entry in list_entries(f"s3://{bucket}/all").entries] == expected


@pytest.mark.s3
def test_an_outage_amid_a_listing_ends_it_with_the_remedy(
    proxy: FaultProxy, s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_pages(monkeypatch, 100)
    put_all(s3, bucket, {f"{n:05}.jpg": b"1" for n in range(220)})
    proxy.fail("slow_down", pattern="continuation-token|start-after", times=1_000_000)
    later = waiting.Patient(0.2)
    with pytest.raises(
        Unreachable, match=rf"^s3://{bucket}/: no answer .* raise storage.give_up_after_seconds"
    ):
        list(list_entries(f"s3://{bucket}", retry_later=later).entries)
