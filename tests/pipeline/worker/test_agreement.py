"""All train workers end their streams at the same step, with the error that a person should read."""

from collections.abc import Iterator
from typing import Any

import pytest
from ranks import on_two_ranks

from dinoray.models.errors import ConfigError, DataError, DinorayError
from dinoray.pipeline.cluster.channel import known_error
from dinoray.pipeline.worker.agreement import Agreement, StreamFailedError

ENDS: dict[str, tuple[int, Exception | None]] = {
    "done": (6, None),
    "early": (4, None),
    "outage": (4, DataError("s3://b/k has not answered for 900 s")),
    "later outage": (5, DataError("s3://b/k: another text")),
    "bug": (4, KeyError("x")),
}
"""How many batches a rank's stream has, and what it ends with."""


def stream(end: str) -> Iterator[int]:
    number, error = ENDS[end]
    yield from range(number)
    if error:
        raise error


def consume(rank: int, ends: tuple[str, str]) -> tuple[list[int], str, str, Any]:
    """The batches that a rank trained on; kind, text and mark of the error that it ends with."""
    taken = []
    try:
        for batch in Agreement(patience_seconds=60, known=known_error).batches(stream(ends[rank])):
            taken.append(batch)  # what came before an error counts too
    except StreamFailedError as ended:
        error = ended.error
        return taken, type(error).__name__, str(error), getattr(error, "raised_by_all_ranks", None)
    return taken, "", "", None


def consume_all(rank: int, cases: list[tuple[str, str]]) -> list[Any]:
    return [consume(rank, ends) for ends in cases]


def test_both_ranks_end_at_the_same_step_with_the_same_error() -> None:
    lost = ("RuntimeError", "the stream of another train worker has failed", None)
    outage = ("DataError", "s3://b/k has not answered for 900 s", True)
    later = ("DataError", "s3://b/k: another text", True)
    bug = ("KeyError", "'x'", None)
    cases: dict[tuple[str, str], tuple[int, tuple[Any, ...], tuple[Any, ...]]] = {
        ("done", "done"): (6, ("", "", None), ("", "", None)),
        ("done", "early"): (4, ("", "", None), ("", "", None)),
        ("done", "outage"): (4, outage, outage),
        ("outage", "done"): (4, outage, outage),
        ("bug", "done"): (4, bug, lost),
        ("bug", "outage"): (4, outage, outage),
        ("later outage", "done"): (5, later, later),
    }
    for found, rank in zip(on_two_ranks(consume_all, list(cases)), (0, 1), strict=True):
        for (ends, (steps, *errors)), (taken, *error) in zip(cases.items(), found, strict=True):
            assert taken == list(range(steps)), ends
            assert tuple(error) == errors[rank], ends


@pytest.mark.parametrize("error", [DataError("gone"), ConfigError("wrong"), KeyError("a bug")])
def test_one_worker_alone_ends_with_its_own_error(error: Exception) -> None:
    def mine() -> Iterator[int]:
        yield 1
        raise error

    with pytest.raises(StreamFailedError) as ended:
        list(Agreement(patience_seconds=1, known=known_error).batches(mine()))
    assert type(ended.value.error) is type(error)
    assert str(ended.value.error) == str(error)
    if isinstance(ended.value.error, DinorayError):
        assert ended.value.error.raised_by_all_ranks


ASKED = {(None, None): None, (2, None): 2, (None, 0): 0, (3, 1): 1}
"""Before which batch each rank is asked to end, and the batch that is then the last of both."""


def consume_until_asked(
    rank: int, cases: list[tuple[int | None, int | None]]
) -> list[tuple[list[int], bool]]:
    """In each case, the batches up to the last one, and whether the ranks end with it."""
    return [_consume_until_asked(asked_at[rank]) for asked_at in cases]


def _consume_until_asked(asked_at: int | None) -> tuple[list[int], bool]:
    agreement, taken = Agreement(patience_seconds=60, known=known_error), []  # type: Agreement, list[int]
    for batch in agreement.batches(range(5), lambda: len(taken) == asked_at):
        taken.append(batch)
        if agreement.ends:
            break
    return taken, agreement.ends


def test_who_is_asked_to_end_ends_all_with_the_same_batch() -> None:
    expected = [(list(range(5 if last is None else last + 1)), last is not None) for last in ASKED.values()]
    for found in on_two_ranks(consume_until_asked, list(ASKED)):
        assert dict(zip(ASKED, found, strict=True)) == dict(zip(ASKED, expected, strict=True))
