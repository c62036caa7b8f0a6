"""More and more vCPU processes over one RAM, with the verifier on: the proof that it scales without loss."""

from __future__ import annotations

import pytest
from machines import ACCELS, exact, spec

from vmm.machine import Machine


@pytest.mark.stress
@pytest.mark.timeout(180)
@pytest.mark.parametrize("vcpus", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("accel", ACCELS)
def test_no_page_is_lost_however_many_vcpus(accel: str, vcpus: int) -> None:
    """Rings of 1,024 entries overflow often, pages belong to every vCPU in turn, rounds stop everybody."""
    writes = 160_000 // vcpus
    machine_spec = spec("stamp", accel=accel, vcpus=vcpus, ring=1024, mib=32, verify=exact(0.1), timeout=120.0,
                        writes=writes, spin=50)
    with Machine.launch(machine_spec) as machine:
        report = machine.wait(150.0)
    result = report["verification"]
    assert result["lost_pages"] == 0, result
    assert result["surplus_pages"] == 0, result
    assert result["rounds"] >= 2
    assert report["exit_code"] == 0
    assert len(report["vcpus"]) == vcpus
    assert len({v["pid"] for v in report["vcpus"]}) == vcpus
    assert all(0 < v["dirty_pages"] <= writes for v in report["vcpus"])
    assert all(v["ring_rebuilds"] == 0 and v["bad_entries"] == 0 for v in report["vcpus"])
