"""``vmm qmp``, and ``vmm launch --qmp``, which starts it."""

from __future__ import annotations

import os
import subprocess
import tempfile
from typing import Any

import click

from ipc.run import python_module

from ..errors import ExitCode, VmmError
from .common import json_option
from .completion import complete_machines
from .migrating import key_options

__all__ = ["check_qmp", "qmp", "start_qmp"]


@click.command()
@click.argument("name", shell_complete=complete_machines)
@click.argument("socket", type=click.Path(dir_okay=False))
@key_options
@json_option
def qmp(name: str, socket: str, as_json: bool, **addressing: Any) -> int:
    """Serve QMP, QEMU's machine protocol, for machine NAME at the Unix socket SOCKET. It goes on until the machine has
    ended; after a migration, until the last client has gone. The keys are for migrations over tcp."""
    import json

    from ..consumers.migration.addresses import parse_address
    from ..consumers.migration.keys import load_keys
    from ..consumers.qmp import QmpServer
    from ..consumers.qmp.migration import Addressing

    if addressing["key"] or addressing["peer"]:
        load_keys(addressing["key"], addressing["peer"], parse_address("tcp://localhost:1"), insecure=False)
    server = QmpServer(name, os.path.abspath(socket), Addressing(**addressing))

    def ready() -> None:
        if as_json:
            click.echo(json.dumps({"name": name, "socket": socket}))
        else:
            click.echo(f"{name} speaks QMP at {socket}", err=True)

    return server.run(ready)


def check_qmp(socket: str) -> None:
    """Somebody can listen there, now. Raises VmmError."""
    from ..consumers.migration.addresses import parse_address
    from ..consumers.migration.door import listening_at

    with listening_at(parse_address(f"ipc://{os.path.abspath(socket)}", listen=True)):
        pass


def start_qmp(name: str, socket: str) -> None:
    """``vmm qmp`` in a process of its own, which ends with the machine; clients may come when this returns. Raises
    VmmError with what it has said when it did not begin."""
    with tempfile.TemporaryFile() as errors:    # a pipe would break when this process has gone
        process = subprocess.Popen(python_module("vmm", "qmp", name, os.path.abspath(socket), "--json"),
                                   stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
                                   start_new_session=True)
        assert process.stdout is not None
        with process.stdout as said:
            if said.readline():
                return
        code = process.wait()
        errors.seek(0)
        text = errors.read().decode(errors="replace").strip().removeprefix("vmm: error: ")
        raise VmmError(text or "QMP could not be started", ExitCode(code) if code in list(ExitCode) else ExitCode.BUG)
