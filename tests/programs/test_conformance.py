"""Programs that try one part of the system each, against the same natively: equal output, equal end, no page lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from inside import compiled, inside, natively

pytestmark = pytest.mark.kvm


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    for name in ("bin", "dev", "proc", "tmp", "root"):
        (folder / name).mkdir()
    return folder


@pytest.mark.parametrize("name", ["threads", "signals", "memory", "identity", "trees", "timers", "children", "owners",
                                  "settings", "gates", "wakes"])
def test_as_natively(root: Path, tmp_path: Path, name: str) -> None:
    program = compiled(root, name)
    native, ran = natively(root, program), inside(root, tmp_path, program)
    assert ran.output.decode() == native.output.decode()
    assert ran.code == native.code
    assert ran.verification["ok"]
    assert not ran.verification["lost_pages"]
    assert ran.report["program"]["missing_calls"] == {}


def test_memory_is_cleared_while_it_is_verified(root: Path, tmp_path: Path) -> None:
    """In the middle of a call, whose writes do not fit into the system's ring, the machine is paused all the time."""
    program = compiled(root, "clearing")
    ran = inside(root, tmp_path, program, options=("--verify", "--ring", "1024", "--memory", "96MiB"))
    assert ran.output == b"".join(b"%d 0\n" % i for i in range(1, 7))
    assert ran.verification["ok"]
    assert ran.verification["rounds"] > 3
    system = next(each for each in ran.report["vcpus"] if each["accelerator"] == "system")
    assert system["dirty_pages"] > 6 * 10240 - 1024
