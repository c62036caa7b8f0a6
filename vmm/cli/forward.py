"""``vmm forward``: ports of the host that lead into a machine that runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from ..errors import VmmError
from .completion import complete_machines

if TYPE_CHECKING:
    from ..client.forwarding import HostPorts

__all__ = ["forward", "forwarding", "note_forward"]

_LOOK_S = 0.2       # seconds after which it is seen that the machine has ended


@click.command()
@click.argument("name", shell_complete=complete_machines)
@click.argument("ports", nargs=-1, required=True, metavar="[ADDRESS:]PORT[:INSIDE]...")
def forward(name: str, ports: tuple[str, ...]) -> int:
    """Lead ports of this host to a machine's Linux program. What connects to PORT of this host (at ADDRESS, 127.0.0.1
    if it is not given) is connected to port INSIDE (PORT if it is not given) of the loopback network in the machine.
    Until Ctrl-C, or the machine's end."""
    from ..client.forwarding import Forwarder, HostPorts
    from ..client.interrupts import Interrupts
    from ..machine.records import no_machine
    from ..machine.rules import RuleError
    from ..machine.runtime import is_running

    if not is_running(name):
        raise no_machine(name)
    with contextlib.ExitStack() as stack:
        try:
            listening = stack.enter_context(HostPorts(ports))
        except RuleError as exc:
            raise VmmError(exc.text) from None
        forwarder = stack.enter_context(Forwarder(name, listening))
        interrupts = stack.enter_context(Interrupts())
        for _, each in listening.listening:
            click.echo(f"{each.shown} leads to port {each.inside} of {name}", err=True)
        while not forwarder.over.is_set() and not interrupts.wait(_LOOK_S):
            pass
        return 128 + interrupts.came if interrupts.came else 0


@contextlib.contextmanager
def forwarding(name: str, ports: HostPorts) -> Iterator[None]:
    """Within the ``with`` they lead to the machine. Raises VmmError."""
    from ..client.forwarding import Forwarder

    with Forwarder(name, ports) if ports.listening else contextlib.nullcontext():
        yield


def note_forward(name: str, texts: Sequence[str]) -> None:
    """Of a machine whose ports nobody forwards: it was left running in the background, or has come from elsewhere."""
    if texts:
        click.echo(f"vmm: note: no port leads to it now; while this runs, they do: vmm forward {name} "
                   f"{' '.join(texts)}", err=True)
