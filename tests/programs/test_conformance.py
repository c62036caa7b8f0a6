"""Programs that try one part of the system each, against the same natively: equal output, equal end, no page lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from inside import compiled, inside, natively

pytestmark = pytest.mark.root       # natively they run in a root of their own

#: What a software CPU does in another way than KVM; the rest of the system is the same.
SOFTWARE = ("threads", "signals", "code", "unmapped")
NAMES = (*SOFTWARE, "memory", "identity", "trees", "timers", "children", "owners", "settings", "gates", "wakes")


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    for name in ("bin", "dev", "proc", "tmp", "root"):
        (folder / name).mkdir()
    return folder


@pytest.mark.parametrize(("name", "accel"), [
    *(pytest.param(name, "kvm", marks=pytest.mark.kvm) for name in NAMES),
    *(pytest.param(name, "unicorn", marks=[] if name in SOFTWARE else pytest.mark.long) for name in NAMES)])
def test_as_natively(root: Path, tmp_path: Path, name: str, accel: str) -> None:
    program = compiled(root, name)
    native, ran = natively(root, program), inside(root, tmp_path, program, options=("--verify", "--accel", accel))
    assert ran.output.decode() == native.output.decode()
    assert ran.code == native.code
    assert ran.verification["ok"]
    assert not ran.verification["lost_pages"]
    assert ran.report["program"]["missing_calls"] == {}


@pytest.mark.kvm
def test_memory_is_cleared_while_it_is_verified(root: Path, tmp_path: Path) -> None:
    """In the middle of a call, whose writes do not fit into the system's ring, the machine is paused all the time."""
    program = compiled(root, "clearing")
    ran = inside(root, tmp_path, program, options=("--verify", "--ring", "1024", "--memory", "96MiB"))
    assert ran.output == b"".join(b"%d 0\n" % i for i in range(1, 7))
    assert ran.verification["ok"]
    assert ran.verification["rounds"] > 3
    system = next(each for each in ran.report["vcpus"] if each["accelerator"] == "system")
    assert system["dirty_pages"] > 6 * 10240 - 1024
