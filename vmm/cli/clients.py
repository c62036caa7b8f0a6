"""``vmm client``: the clients of a machine's dirty log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .common import json_option, on_machine, print_json
from .completion import complete_clients

if TYPE_CHECKING:
    from ..client.machine import Machine

__all__ = ["client"]


@click.group()
def client() -> None:
    """Manage the clients of a machine's dirty log. Each sync of a client returns the pages dirtied since its
    previous one.

    A client registered by vmm sync stays until it is dropped or the machine ends; so does the one that vmm snapshot
    create registers for the next incremental snapshot. Clients of measurements and migrations end with their
    process.
    """


@client.command("list")
@on_machine
@json_option
def list_(machine: Machine, as_json: bool) -> None:
    """List the clients and the processes that own them."""
    clients = _clients(machine.status())
    if as_json:
        print_json(clients)
    elif not clients:
        click.echo(f"{machine.name} has no dirty-log clients")
    for each in [] if as_json else clients:
        click.echo(f"{each['client']}" + (f" (process {each['pid']})" if each["pid"] else ""))


@client.command()
@on_machine
@click.argument("name_of_client", metavar="CLIENT", shell_complete=complete_clients)
@json_option
def drop(machine: Machine, name_of_client: str, as_json: bool) -> None:
    """Drop CLIENT and the pages collected for it. A client owned by a running process cannot be dropped."""
    from ..errors import VmmError
    from ..machine.names import check_client_name

    check_client_name(name_of_client)
    there = machine.status()["clients"]
    if name_of_client not in there:
        raise VmmError(f"machine '{machine.name}' has no dirty-log client '{name_of_client}' (clients: "
                       f"{', '.join(there) or 'none'})")
    machine.unregister(name_of_client)
    if as_json:
        print_json({"name": machine.name, "client": name_of_client, "done": "drop"})
    else:
        click.echo(f"{machine.name}: client {name_of_client} dropped")


def _clients(report: dict[str, Any]) -> list[dict[str, Any]]:
    """``pid``: the process that owns it; None: no process does, and it stays."""
    return [{"client": h["why"], "pid": h["pid"] or None} for h in report["holders"] if h["what"] == "client"]
