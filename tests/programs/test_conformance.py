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


@pytest.mark.parametrize("name", ["threads", "signals", "memory"])
def test_as_natively(root: Path, tmp_path: Path, name: str) -> None:
    program = compiled(root, name)
    native, ran = natively(root, program), inside(root, tmp_path, program)
    assert ran.output.decode() == native.output.decode()
    assert ran.code == native.code
    assert ran.verification["ok"]
    assert not ran.verification["lost_pages"]
    assert ran.report["program"]["missing_calls"] == {}
