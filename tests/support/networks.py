"""A second network on this machine, whose one link to the first can be cut: a namespace, which only root may make."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Network:
    """A network, the addresses of this one and of that one at their link, and the link's name in both."""

    name: str
    here: str
    there: str
    link: str

    @property
    def enter(self) -> list[str]:
        """What comes before a command that is to run there."""
        return ["ip", "netns", "exec", self.name]

    def cut(self) -> None:
        """From now on nothing arrives."""
        _ip("link", "set", self.link, "down")

    def heal(self) -> None:
        """From now on all arrives again."""
        _ip("link", "set", self.link, "up")


@contextlib.contextmanager
def second_network() -> Iterator[Network]:
    """A network for as long as the block lasts; skips the test where none can be made."""
    number, name = os.getpid() % 250, f"dr{os.getpid()}"
    network = Network(name, f"10.213.{number}.1", f"10.213.{number}.2", name)
    with contextlib.ExitStack() as stack:
        try:
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "del", name)
            _ip("link", "add", network.link, "type", "veth", "peer", "name", network.link, "netns", name)
            stack.callback(_ip, "link", "del", network.link)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("no network namespace can be made here")
        _ip("addr", "add", f"{network.here}/24", "dev", network.link)
        network.heal()
        _ip("-n", name, "addr", "add", f"{network.there}/24", "dev", network.link)
        for link in (network.link, "lo"):
            _ip("-n", name, "link", "set", link, "up")
        yield network


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
