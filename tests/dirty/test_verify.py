"""The verifier: what it holds against the log, and what it must not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from machines import ACCELS, exact, spec, until

from vmm.client.machine import Machine
from vmm.errors import ExitCode

TIMEOUT = 60.0


@pytest.fixture(params=ACCELS)
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A guest that writes all the time; so seldom a round that whatever a test does falls between two."""
    busy = spec("random", accel=str(request.param), writes=0, spin=50, timeout=None, verify=exact(0.5))
    with Machine.launch(busy) as made:
        yield made


def rounds(machine: Machine) -> int:
    return int(machine.status()["verification"]["rounds"])


def verified(machine: Machine) -> dict[str, Any]:
    """The report after two rounds more: nothing lost, nothing too much."""
    before = rounds(machine)
    until(lambda: rounds(machine) > before + 1, "two rounds", TIMEOUT)
    machine.stop()
    report = machine.wait(TIMEOUT)
    assert report["verification"]["lost_pages"] == 0, report["verification"]
    assert report["verification"]["surplus_pages"] == 0, report["verification"]
    assert report["exit_code"] == ExitCode.STOPPED
    return report


def test_logging_switched_off_and_on_within_a_round_is_no_surplus(machine: Machine) -> None:
    """Pages written before are in the log, and have not changed since the verifier looked again."""
    for _ in range(5):
        before = [v["dirty_pages"] for v in machine.status()["vcpus"]]
        until(lambda n=before: [v["dirty_pages"] for v in machine.status()["vcpus"]] != n, "pages written", TIMEOUT)
        machine.log_stop(0)
        machine.log_start(0)
    verified(machine)


def test_pages_that_the_host_marks_are_no_surplus(machine: Machine) -> None:
    """It may have written there what was there."""
    machine.pause()
    size = machine.status()["slots"][0]["size"]
    same = machine.read(size - 8192, 4096)      # nobody uses these any more: vCPU 0's stack
    machine.write(size - 8192, same)
    machine.mark_dirty(0, 0, size // 4096)
    machine.resume()
    verified(machine)
