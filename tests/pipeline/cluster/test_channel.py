"""What the channel remembers: one line about an outage for those of many processes, and the first fatal error."""

import asyncio
import pickle

import pytest

from dinoray.models.errors import DataError, DinorayError
from dinoray.pipeline.cluster import channel


class Clock:
    """A clock that the test sets."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(channel, "time", clock)
    return clock


def sent(actor: "channel._RunChannelActor", *lines: tuple[str, bool]) -> list[str]:
    """What the driver gets of these lines."""

    async def send() -> list[str]:
        for text, is_over in lines:
            await actor.note_outage(text, is_over)
        found = []
        while not actor._queue.empty():
            found.append(actor._queue.get_nowait().facts["text"])
        return found

    return asyncio.run(send())


def test_one_line_stands_for_those_of_all_processes(clock: Clock) -> None:
    actor = channel._RunChannelActor()
    assert sent(actor, ("a waits", False), ("b waits", False), ("c waits", False)) == ["a waits"]
    assert sent(actor, ("b is back", True), ("a is back", True), ("c is back", True)) == ["b is back"]


def test_outages_that_follow_at_once_are_one(clock: Clock) -> None:
    actor = channel._RunChannelActor()
    assert sent(actor, ("a waits", False), ("a is back", True)) == ["a waits", "a is back"]
    clock.now += 59
    assert sent(actor, ("a waits", False), ("a is back", True)) == []
    clock.now += 2
    assert sent(actor, ("a waits", False), ("a is back", True)) == ["a waits", "a is back"]


def test_unchecked_reads_are_counted_and_said_once() -> None:
    async def send() -> tuple[int, list[str]]:
        actor = channel._RunChannelActor()
        for number, line in ((2, "a is unchecked"), (3, "b is unchecked")):
            await actor.note_unchecked(number, line)
        found = [actor._queue.get_nowait().facts["text"] for _ in range(actor._queue.qsize())]
        return await actor.get(channel.UNCHECKED_READS), found

    assert asyncio.run(send()) == (5, ["a is unchecked"])


def test_the_first_fatal_error_is_kept_for_workers_that_learn_only_its_text() -> None:
    def fatal(error: DinorayError) -> channel.Event:
        return channel.Event("fatal", {"error": pickle.dumps(error)})

    async def send() -> list[channel.Event | None]:
        actor = channel._RunChannelActor()
        kept = [await actor.fatal()]
        for error in (DataError("the cause"), DataError("what came of it")):
            await actor.post(fatal(error))
            kept.append(await actor.fatal())
        assert actor._queue.qsize() == 2
        return kept

    none, *kept = asyncio.run(send())
    assert none is None
    assert [str(channel.fatal_error(event)) for event in kept if event] == ["the cause", "the cause"]


def ask(*requests: "channel.EndRequest | channel.Event") -> list["channel.EndRequest | None"]:
    """What workers that ask after each of these are told; None: nothing, they wait."""

    async def send() -> list["channel.EndRequest | None"]:
        actor, told = channel._RunChannelActor(), []
        for request in requests:
            if isinstance(request, channel.Event):
                await actor.post(request)
            else:
                await actor.request_end(request)
            try:
                told.append(await asyncio.wait_for(actor.end_request(), 0.01))
            except asyncio.TimeoutError:
                told.append(None)
        return told

    return asyncio.run(send())


STOP, GROW, LEAVE = (channel.EndRequest(restart=why) for why in (None, "grow", "leave"))
LOST = channel.Event("lost", {"text": "node 10.0.0.7 lost"})


def test_a_request_to_start_again_ends_with_the_workers_and_a_stop_does_not() -> None:
    assert ask(GROW, LOST) == [GROW, None]
    assert ask(GROW, LOST, LEAVE) == [GROW, None, LEAVE]
    assert ask(STOP, LOST) == [STOP, STOP]


def test_a_stop_takes_the_place_of_a_request_to_start_again() -> None:
    assert ask(GROW, STOP, LEAVE) == [GROW, STOP, STOP]
    assert ask(LOST, STOP) == [None, STOP]


def test_workers_that_wait_for_a_request_get_it() -> None:
    async def wait() -> channel.EndRequest:
        actor = channel._RunChannelActor()
        waiting = asyncio.ensure_future(actor.end_request())
        await actor.request_end(GROW)
        await actor.post(LOST)
        await asyncio.sleep(0)
        await actor.request_end(STOP)
        return await waiting

    assert asyncio.run(wait()) == STOP
