"""The lines about outages that many processes send: one for all of them."""

import asyncio

import pytest

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
