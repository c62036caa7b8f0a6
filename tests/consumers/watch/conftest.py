"""What several tests of watching begin with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from watched import Writer


@pytest.fixture
def writer() -> Iterator[Writer]:
    """A program that writes what it is told."""
    made = Writer()
    yield made
    made.process.kill()
    made.process.communicate()
