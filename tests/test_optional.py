"""Packages that only some need: without one, what needs it says so in one line, and all else works."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command import vmm
from machines import ACCELS, spec

from vmm import optional
from vmm.client.accelerators import choose_accelerator
from vmm.client.doctor import examine
from vmm.client.machine import Machine
from vmm.consumers.migration.pages import Packer
from vmm.consumers.migration.tls import Certificate
from vmm.errors import VmmError


@pytest.mark.parametrize(("module", "use", "extra"), [
    ("matplotlib.figure", optional.figure, "plots"), ("lz4.block", optional.lz4_block, "lz4"),
    ("lz4.block", lambda: Packer("lz4", sums=False), "lz4"), ("cryptography.x509", Certificate, "tls"),
    ("prometheus_client.core", optional.prometheus, "metrics"), ("textual.app", optional.textual, "top")])
def test_what_is_missing_is_said_with_the_extra_that_has_it(monkeypatch: pytest.MonkeyPatch, module: str,
                                                            use: Callable[[], object], extra: str) -> None:
    use()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(VmmError, match=rf"pip install 'shardvmm\[{extra}\]'"):
        use()


def test_without_unicorn_the_software_cpu_is_absent_and_kvm_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise __import__("importlib.metadata").metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", version)
    found = {f.name: f for f in examine()}
    assert found["unicorn"].status == "absent"
    assert "shardvmm[software]" in found["unicorn"].advice
    with pytest.raises(VmmError, match="unicorn is not available here: not installed"):
        choose_accelerator("unicorn")


@pytest.mark.parametrize("accel", ACCELS)
def test_no_picture_is_said_before_the_recording(accel: str, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """``matplotlib`` is a file of the test's that cannot be imported."""
    (tmp_path / "matplotlib").mkdir()
    (tmp_path / "matplotlib" / "__init__.py").write_text("raise ImportError('not here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Machine.launch(spec("random", accel=accel, writes=0, timeout=None)):
        done = vmm("working-set", "t", "--time", "1h", "--output", str(tmp_path / "w.npz"), "--png",
                   str(tmp_path / "w.png"))
        assert done.returncode != 0
        assert done.stderr.count("\n") == 1
        assert "plotting needs matplotlib" in done.stderr
        assert not (tmp_path / "w.npz").exists()
