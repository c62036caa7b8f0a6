"""The commands, by name: what each takes, and what it answers. A command that does not do what was asked for raises
QmpError, or the machine's own VmmError."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from ipc.messages import UNREADABLE

from ...client.machine import Machine
from ...errors import ExitCode, VmmError, one_line
from ...version import VERSION
from . import dirty, migration
from .arguments import Arguments, Nothing
from .story import Story
from .wire import QmpError, shown

__all__ = ["TABLE", "VERSION_INFO", "Commands", "check_negotiation", "run_state"]

#: That of QEMU whose schema the commands and answers keep to.
VERSION_INFO = {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": f"shardvmm-{VERSION}"}

Handler = Callable[["Commands", Any], Any]


@dataclass(frozen=True)
class _Command:
    takes: type[Arguments]
    run: Handler


class Commands:
    """Of one machine, for all sessions; one at a time, in one thread."""

    def __init__(self, machine: Machine, story: Story, addressing: migration.Addressing) -> None:
        self.machine = machine
        self.story = story
        #: The machine has left this host; nothing is asked of it any more.
        self.left = False
        self.rates = dirty.Rates(machine)
        self.migration = migration.Migrations(machine.name, addressing)

    def run(self, name: str, arguments: dict[str, Any]) -> Any:
        """The answer. Raises QmpError."""
        command = TABLE.get(name)
        if command is None:
            raise QmpError(f"there is no command '{shown(name)}' here (query-commands lists them)", "CommandNotFound")
        try:
            given = msgspec.convert(arguments, command.takes)
        except UNREADABLE as exc:
            raise QmpError(f"{name}: {one_line(str(exc))}") from None
        try:
            return command.run(self, given)
        except VmmError as exc:
            raise QmpError(str(exc)) from None
        except QmpError:
            raise
        except Exception as exc:
            raise QmpError(f"{name}: {type(exc).__name__}: {one_line(str(exc))} (this is a bug)") from None

    def require_here(self) -> Machine:
        """Raises QmpError when it has left."""
        if self.left:
            raise QmpError(f"machine '{self.machine.name}' has been migrated: it does not run here any more")
        return self.machine


# --- what it is ---------------------------------------------------------------------------------------------------


def _query_status(all_: Commands, _: Nothing) -> dict[str, Any]:
    status = "postmigrate" if all_.left else run_state(all_.machine.status())
    return {"running": status == "running", "singlestep": False, "status": status}


def run_state(report: dict[str, Any]) -> str:
    """One of QEMU's RunState, of a machine's report."""
    if report["handed_over"]:
        return "postmigrate"
    state = report["state"]
    if state != "paused":
        return {"ready": "prelaunch", "running": "running", "ended": "shutdown"}[state]
    holders = [(each["why"], each["pid"]) for each in report["holders"] if each["what"] == "pause"]
    if ("user", 0) in holders:
        return "paused"
    whys = {why.partition(" ")[0] for why, _ in holders}
    return "finish-migrate" if "migration" in whys else "save-vm" if "snapshot" in whys else "paused"


def _query_cpus(all_: Commands, _: Nothing) -> list[dict[str, Any]]:
    return [{"cpu-index": vcpu["index"], "qom-path": f"/machine/vcpu[{vcpu['index']}]", "thread-id": vcpu["pid"],
             "target": "x86_64"}
            for vcpu in all_.require_here().status()["vcpus"] if vcpu["accelerator"] != "system"]


def _query_kvm(all_: Commands, _: Nothing) -> dict[str, Any]:
    here = os.access("/dev/kvm", os.R_OK | os.W_OK)
    return {"present": here, "enabled": all_.require_here().status()["accelerator"] == "kvm"}


def _query_memory(all_: Commands, _: Nothing) -> dict[str, Any]:
    return {"base-memory": sum(slot["size"] for slot in all_.require_here().status()["slots"]), "plugged-memory": 0}


# --- what it does -------------------------------------------------------------------------------------------------


def _stop(all_: Commands, _: Nothing) -> dict[str, Any]:
    all_.require_here().pause()
    return {}


def _cont(all_: Commands, _: Nothing) -> dict[str, Any]:
    machine = all_.require_here()
    begun = machine.status()["state"] != "ready"
    machine.resume()        # also before the start: it may have been stopped
    if not begun:
        machine.start()
    return {}


def _quit(all_: Commands, _: Nothing) -> dict[str, Any]:
    all_.story.quit = True      # before it ends: that is told by another thread
    try:
        if not all_.left:
            all_.machine.stop()
    except VmmError as exc:
        if exc.exit_code is not ExitCode.NO_MACHINE:
            all_.story.quit = False
            raise
    return {}


def _migrate(all_: Commands, asked: migration.Migrate) -> dict[str, Any]:
    all_.require_here()
    return all_.migration.begin(asked)


class _Capabilities(Arguments):
    enable: list[Literal["oob"]] = msgspec.field(default_factory=list)


def _negotiated(all_: Commands, _: _Capabilities) -> dict[str, Any]:
    raise QmpError("the capabilities of this session have been negotiated already", "CommandNotFound")


def check_negotiation(arguments: dict[str, Any]) -> None:
    """The arguments of a session's first command, qmp_capabilities. Raises QmpError."""
    try:
        wanted = msgspec.convert(arguments, _Capabilities).enable
    except UNREADABLE as exc:
        raise QmpError(f"qmp_capabilities: {one_line(str(exc))}") from None
    if wanted:
        raise QmpError(f"qmp_capabilities: {', '.join(wanted)} is not offered here")


#: Every command by its name.
TABLE: dict[str, _Command] = {
    "qmp_capabilities": _Command(_Capabilities, _negotiated),
    "query-commands": _Command(Nothing, lambda all_, _: [{"name": name} for name in sorted(TABLE)]),
    "query-version": _Command(Nothing, lambda all_, _: VERSION_INFO),
    "query-name": _Command(Nothing, lambda all_, _: {"name": all_.machine.name}),
    "query-target": _Command(Nothing, lambda all_, _: {"arch": "x86_64"}),
    "query-kvm": _Command(Nothing, _query_kvm),
    "query-status": _Command(Nothing, _query_status),
    "query-cpus-fast": _Command(Nothing, _query_cpus),
    "query-memory-size-summary": _Command(Nothing, _query_memory),
    "stop": _Command(Nothing, _stop),
    "cont": _Command(Nothing, _cont),
    "quit": _Command(Nothing, _quit),
    "calc-dirty-rate": _Command(dirty.Calc, lambda all_, given: all_.rates.calc(all_.require_here(), given)),
    "query-dirty-rate": _Command(Nothing, lambda all_, _: all_.rates.query()),
    "set-vcpu-dirty-limit": _Command(dirty.Limit, lambda all_, given: dirty.limit(all_.require_here(), given)),
    "cancel-vcpu-dirty-limit": _Command(dirty.Unlimit, lambda all_, given: dirty.unlimit(all_.require_here(), given)),
    "query-vcpu-dirty-limit": _Command(Nothing, lambda all_, _: dirty.limits(all_.require_here())),
    "migrate": _Command(migration.Migrate, _migrate),
    "migrate_cancel": _Command(Nothing, lambda all_, _: all_.migration.cancel()),
    "migrate-start-postcopy": _Command(Nothing, lambda all_, _: all_.migration.postcopy()),
    "migrate-set-parameters": _Command(migration.Parameters, lambda all_, given: all_.migration.set(given)),
    "migrate-set-capabilities": _Command(migration.Capabilities, lambda all_, given: all_.migration.switch(given)),
    "query-migrate": _Command(Nothing, lambda all_, _: all_.migration.query()),
    "query-migrate-parameters": _Command(Nothing, lambda all_, _: all_.migration.parameters()),
    "query-migrate-capabilities": _Command(Nothing, lambda all_, _: all_.migration.capabilities()),
}
#: As the documentation of some clients has it.
TABLE["migrate-cancel"] = TABLE["migrate_cancel"]
