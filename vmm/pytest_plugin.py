"""A pytest plugin for those who test with machines: installed with this package, it needs no import (entry point
``pytest11``).

    def test_pages_are_dirtied(vmm_machine):
        assert vmm_machine.dirty_rate(0.2).pages > 0

    @pytest.mark.vmm("configs/hello.yaml", vcpus=4)
    def test_it_ends_well(vmm_machine):
        assert vmm_machine.wait(60)["exit_code"] == 0

Machines of a test have a runtime directory of its own, so tests may run at once and never meet the user's machines.
At the end of the test they are stopped. It fails if their own verification found a lost page, or if anything of
them is left; and a test that failed shows what its machines have logged.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import pytest

if TYPE_CHECKING:
    import os

    from .api import Machine
    from .client.config import MachineConfig
    from .machine.spec import MachineSpec

__all__ = ["LaunchMachine", "pytest_configure", "vmm_launch", "vmm_machine", "vmm_runtime_dir"]

_PATIENCE = 30.0        # seconds for a machine to stop
_LOG_LINES = 200
#: What ``vmm_machine`` runs where the marker says nothing else.
_SMALL: dict[str, Any] = {"memory": [{"size": "16MiB"}], "guest": {"workload": "random", "params": {"writes": 0}}}


#: A file, what one would say, or one that has been read.
Config: TypeAlias = "MachineConfig | MachineSpec | Mapping[str, Any] | str | os.PathLike[str]"


class LaunchMachine(Protocol):
    """What ``vmm_launch`` is."""

    def __call__(self, config: Config | None = None, *, name: str | None = None, start: bool = True,
                 **keys: Any) -> Machine:
        """A machine that runs until the test's end. ``config``: None: a small machine, whose guest writes to random
        pages for ever. ``keys``: those at its top level that are to be otherwise. Raises VmmError."""


def pytest_configure(config: pytest.Config) -> None:
    """The marker."""
    config.addinivalue_line("markers", "vmm(config=None, **keys): what the fixture vmm_machine launches")


@pytest.fixture
def vmm_runtime_dir(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The test's own runtime directory; what machines leave on purpose is elsewhere."""
    path = Path(tempfile.mkdtemp(prefix="vmm-"))        # short: it is part of sockets' names
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("vmm-state")))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def vmm_launch(request: pytest.FixtureRequest, vmm_runtime_dir: Path, tmp_path: Path) -> Iterator[LaunchMachine]:
    """Launches machines that end with the test."""
    from .api import Machine

    machines: list[Machine] = []

    def launch(config: Config | None = None, *, name: str | None = None, start: bool = True,
               **keys: Any) -> Machine:
        if config is None or isinstance(config, Mapping):
            number = f"-{len(machines)}" if machines else ""
            said = {"name": f"test{number}", **(_SMALL if config is None else config)}
            config = tmp_path / f"vmm-{len(machines)}.yaml"
            config.write_text(json.dumps(said))         # which is YAML too
        overrides = [f"{key}={json.dumps(value)}" for key, value in keys.items()]
        machine = Machine.launch(config, name=name, overrides=overrides, start=start)
        machines.append(machine)
        return machine

    yield launch
    wrong = [text for machine in machines for text in _end(machine)]
    for machine in machines:
        request.node.add_report_section("teardown", f"log of machine {machine.name}", _log(machine.name))
    if wrong:
        pytest.fail("; ".join(wrong), pytrace=False)


@pytest.fixture
def vmm_machine(request: pytest.FixtureRequest, vmm_launch: LaunchMachine) -> Machine:
    """A machine that runs, as the marker ``vmm`` says: ``@pytest.mark.vmm(FILE or mapping, **keys)``."""
    marker = request.node.get_closest_marker("vmm")
    return vmm_launch() if marker is None else vmm_launch(*marker.args, **marker.kwargs)


def _end(machine: Machine) -> Iterator[str]:
    """Stop it; what is wrong."""
    from .errors import VmmError
    from .machine.names import belongings

    report: dict[str, Any] = {}
    with contextlib.suppress(VmmError, TimeoutError):       # it may have been migrated, or ended
        machine.stop("the test has ended")
        report = machine.wait(_PATIENCE)
    ended = machine.close()
    found = report.get("verification")
    if found is not None and not found["ok"]:
        yield f"machine '{machine.name}': {report['cause']}"
    if not ended or (left := belongings(machine.name).left()):
        yield f"machine '{machine.name}' has left something behind" + (f": {', '.join(left)}" if ended else "")


def _log(name: str) -> str:
    from .machine.log import read_log
    from .machine.records import log_path

    try:
        lines = [f"{line.time} {line.source} {line.level} {line.text}" for line in read_log(log_path(name))]
    except OSError as exc:
        return f"(none: {exc.strerror})"
    return "\n".join(lines[-_LOG_LINES:])
