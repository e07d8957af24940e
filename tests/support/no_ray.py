"""A guard for tests of what a job does before Ray starts."""

import pytest


class RayStarted(BaseException):
    """Ray would start now. No code that handles errors takes it for one."""


def forbid_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `ray.init` raise RayStarted."""

    def init(*_: object, **__: object) -> None:
        raise RayStarted

    monkeypatch.setattr("ray.init", init)
