"""What several tests of watching begin with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from watched import Writer

from vmm.consumers.watch import watcher


@pytest.fixture
def writer() -> Iterator[Writer]:
    """A program that writes what it is told."""
    made = Writer()
    yield made
    made.process.kill()
    made.process.communicate()


@pytest.fixture(autouse=True)
def looks_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A watcher looks at what is mapped at each turn, not at most every 50 ms."""
    for name in ("_LOOK", "_LOOK_SHARE", "_COUNT"):
        monkeypatch.setattr(watcher, name, 0)
