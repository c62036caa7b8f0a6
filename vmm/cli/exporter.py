"""``vmm exporter``, and metrics of a machine that is launched with them."""

from __future__ import annotations

import contextlib
import subprocess
from types import TracebackType
from typing import TYPE_CHECKING

import click

from ipc.run import python_module

from .. import optional
from .completion import complete_machines
from .stats import dirty_rate_option

if TYPE_CHECKING:
    from ..serve.endpoint import Listening

__all__ = ["MetricsPort", "exporter"]

_LOOK_S = 0.5       # seconds after which it is seen that a machine has ended


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...", shell_complete=complete_machines)
@click.option("--listen", "address", default="9853", show_default=True, metavar="ADDRESS",
              help="PORT (of 127.0.0.1), HOST:PORT, :PORT (of every address), or unix:PATH.")
@dirty_rate_option
@click.option("--dashboard", is_flag=True, help="Print a dashboard for Grafana that shows these metrics, and end.")
@click.option("--socket", "inherited", type=int, default=-1, hidden=True)
def exporter(names: tuple[str, ...], address: str, dirty_rate: bool, dashboard: bool, inherited: int) -> int:
    """Serve metrics for Prometheus. They are of every machine of this user on this host that runs when they are asked
    for, or of those named; until Ctrl-C, or the end of the last one named. docs/metrics.md lists them.

    \b
    vmm exporter --listen 9853
    """
    if dashboard:
        from importlib import resources

        click.echo(resources.files("vmm.serve").joinpath("dashboard.json").read_text(), nl=False)
        return 0
    from ..client.interrupts import Interrupts
    from ..machine.records import no_machine
    from ..machine.runtime import await_upgrade, goes_on

    with MetricsPort(address, dirty_rate=dirty_rate, inherited=inherited) as port:
        for name in names:
            if not await_upgrade(name):
                raise no_machine(name)
        with Interrupts() as interrupts, port.serving(*names):
            if inherited < 0:
                click.echo(f"metrics of {', '.join(names) or 'all machines'} at {port.shown}", err=True)
            while not interrupts.wait(_LOOK_S):
                if names and not any(map(goes_on, names)):
                    return 0
            return 128 + interrupts.came


class MetricsPort:
    """Listens for who asks for metrics, from when it is made, so that what cannot be is said before anything else is
    begun. Within its ``with``, or not at all. ``text``: the address; None: nothing is to be served. ``inherited``: a
    socket that listens there already."""

    def __init__(self, text: str | None, *, dirty_rate: bool, inherited: int = -1) -> None:
        """Raises VmmError, MissingPackage among them."""
        self._dirty_rate = dirty_rate
        self._listening: Listening | None = None
        if text is not None:
            optional.prometheus()
            from ..serve.endpoint import Listening, parse_address

            self._listening = Listening(parse_address(text), inherited=inherited)

    @property
    def shown(self) -> str:
        """Where it is."""
        return "" if self._listening is None else self._listening.address.shown

    def serving(self, *names: str) -> contextlib.AbstractContextManager[object]:
        """Metrics of these machines, or of all, within the ``with``; nothing where nothing is to be served."""
        if self._listening is None:
            return contextlib.nullcontext()
        from ..serve.collector import MachineCollector
        from ..serve.endpoint import Endpoint

        return Endpoint(self._listening, MachineCollector(names or None, dirty_rate=self._dirty_rate))

    def leave(self, name: str) -> None:
        """A process of its own serves them from now on, until the machine has ended."""
        if self._listening is None:
            return
        fd, address = self._listening.socket.fileno(), self._listening.address
        subprocess.Popen(
            python_module("vmm", "exporter", name, "--listen", address.text, "--socket", str(fd),
                          *(["--dirty-rate"] if self._dirty_rate else [])),
            pass_fds=[fd], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True)
        self._listening.leave()

    def __enter__(self) -> MetricsPort:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 tb: TracebackType | None) -> None:
        if self._listening is not None:
            self._listening.close()
