"""What several tests of consumers begin with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from machines import ACCELS
from migrations import WALK

from vmm.client.machine import Machine


@pytest.fixture(params=ACCELS)
def accel(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def address(runtime_dir: Path) -> Iterator[str]:
    """Where nobody listens yet."""
    path = runtime_dir / "migrate"
    yield f"ipc://{path}"
    path.unlink(missing_ok=True)        # of a receiver that was killed


@pytest.fixture
def running() -> Iterator[Machine]:
    """The machine ``source``, which dirties pages for ever."""
    with Machine.launch(WALK) as machine:
        yield machine
