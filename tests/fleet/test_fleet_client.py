"""What a command makes of a fleet that answers, does not, or is lost, without Ray."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vmm.errors import VmmError
from vmm.fleet.client import FleetClient
from vmm.fleet.events import Event


class RayError(Exception):
    pass


class ActorUnavailableError(RayError):
    pass


class GetTimeoutError(RayError, TimeoutError):
    pass


class RayTaskError(RayError):
    cause = VmmError("it is not so")


class FakeRay:
    """An answer is what it was asked; ``answers`` says what becomes of it."""

    exceptions = SimpleNamespace(RayError=RayError, ActorUnavailableError=ActorUnavailableError,
                                 RayTaskError=RayTaskError, GetTimeoutError=GetTimeoutError)

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers, self.asked, self.killed = answers, list[str](), False

    def __getattr__(self, method: str) -> Any:
        def remote(*arguments: Any) -> str:
            self.asked.append(method)
            return method

        return SimpleNamespace(remote=remote)

    def wait(self, asked: list[str], timeout: float) -> tuple[list[str], list[str]]:
        return asked, []

    def get(self, asked: str, timeout: float | None = None) -> Any:
        found = self.answers[asked]
        if isinstance(found, Exception):
            if isinstance(found, GetTimeoutError):
                assert timeout is not None      # else it would hang
            raise found
        return found

    def kill(self, actor: Any) -> None:
        self.killed = True


def told(ray: FakeRay) -> list[str]:
    said: list[str] = []
    FleetClient(ray, ray).add([], restored=False, said=said.append)
    return said


@pytest.mark.parametrize("where", ["next_event", "add", "events"])
@pytest.mark.parametrize(("error", "text"), [
    (GetTimeoutError(), "the fleet does not answer (GetTimeoutError)"),
    (RayError(), "the fleet does not answer (RayError)"),
    (ActorUnavailableError(), "the fleet's process was lost, and another takes its place"),
    (RayTaskError(), "it is not so")])
def test_errors_of_ray_are_said_for_users(where: str, error: Exception, text: str) -> None:
    if where == "add" and isinstance(error, GetTimeoutError):
        return      # it may take as long as it does
    with pytest.raises(VmmError) as caught:
        told(FakeRay({"next_event": 5, "events": [], "add": {}, where: error}))
    assert str(caught.value).startswith(text)


def test_what_happens_first_is_told_too() -> None:
    """The number of the next event is asked for before anything begins."""
    ray = FakeRay({"next_event": 5, "events": [Event(5, "now", "it begins")], "add": {}})
    assert told(ray) == ["it begins"]
    assert ray.asked.index("next_event") < ray.asked.index("add") < ray.asked.index("events")


@pytest.mark.parametrize("empty", [True, False])
def test_a_fleet_says_itself_whether_it_ends(empty: bool) -> None:
    ray = FakeRay({"stop": ["web"], "end_if_empty": empty})
    assert FleetClient(ray, ray).stop([]) == ["web"]
    assert ray.killed == empty
    assert "overview" not in ray.asked
