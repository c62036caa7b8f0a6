"""A Linux program is not logged for nobody, neither its threads nor its system, which has a log in software; and all of
it from the first who asks, in the middle of its calls."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from inside import compiled
from machines import changed_pages, until

from vmm.client.machine import Machine
from vmm.client.programs import program_machine, program_spec

pytestmark = pytest.mark.kvm


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("bin", "dev", "proc", "tmp"):
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.mark.parametrize("mode", ["ring", "bitmap"])
def test_a_program_is_logged_from_the_first_who_asks(root: Path, mode: str) -> None:
    asked = program_spec(compiled(root, "reader"), [], root=str(root))
    made = program_machine("t", asked, memory=32 << 20, threads=2)
    with Machine.launch(msgspec.structs.replace(made, tracking=mode)) as machine:
        memory = machine.ram(0)

        def writes() -> None:
            before = memory.copy()
            until(lambda: len(changed_pages(before, memory)) > 300, "the program reads and writes")

        def counts() -> list[int]:
            return [vcpu["dirty_pages"] for vcpu in machine.status()["vcpus"]]

        for _ in range(3):
            assert not machine.status()["logging"]
            counted = counts()
            writes()
            machine.pause()
            machine.register("first")
            assert counts() == counted      # nothing had been logged
            told, before = set[int](), memory.copy()
            machine.resume()
            for _ in range(3):
                writes()
                told |= {p for first, n in machine.sync("first").slots[0] for p in range(first, first + n)}
            machine.pause()
            told |= {p for first, n in machine.sync("first").slots[0] for p in range(first, first + n)}
            changed = changed_pages(before, memory)
            assert len(changed) > 300
            assert changed <= told
            *threads, system = (now - then for now, then in zip(counts(), counted, strict=True))
            assert sum(threads) > 200
            assert system > 200
            machine.unregister("first")
            machine.resume()
            machine.set_tracking(mode)
            until(lambda: not machine.status()["logging"], "logging is off")
        machine.stop()
