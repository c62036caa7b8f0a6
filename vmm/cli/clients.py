"""``vmm client``: who gathers dirty pages of a machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .common import json_option, on_machine, print_json

if TYPE_CHECKING:
    from ..client.machine import Machine

__all__ = ["client"]


@click.group()
def client() -> None:
    """Clients of a machine's dirty log: each is told what was dirtied since its own last sync.

    vmm sync registers one, which stays until it is dropped or the machine ends; so does a snapshot, for the next
    incremental one. Measurements and migrations have clients that go with their process.
    """


@client.command("list")
@on_machine
@json_option
def list_(machine: Machine, as_json: bool) -> None:
    """List the clients of machine NAME, and whose they are."""
    clients = _clients(machine.status())
    if as_json:
        print_json(clients)
    elif not clients:
        click.echo(f"nobody uses the dirty log of {machine.name}")
    for each in [] if as_json else clients:
        click.echo(f"{each['client']}" + (f" (of process {each['pid']})" if each["pid"] else ""))


@client.command()
@on_machine
@click.argument("name_of_client", metavar="CLIENT")
@json_option
def drop(machine: Machine, name_of_client: str, as_json: bool) -> None:
    """Drop CLIENT, and what was gathered for it. That of a running process is refused."""
    from ..errors import VmmError
    from ..machine.names import check_client_name

    check_client_name(name_of_client)
    there = machine.status()["clients"]
    if name_of_client not in there:
        raise VmmError(f"there is no client '{name_of_client}' of the dirty log of '{machine.name}' (there are: "
                       f"{', '.join(there) or 'none'})")
    machine.unregister(name_of_client)
    if as_json:
        print_json({"name": machine.name, "client": name_of_client, "done": "drop"})
    else:
        click.echo(f"{machine.name}: client {name_of_client} dropped")


def _clients(report: dict[str, Any]) -> list[dict[str, Any]]:
    """``pid``: whose it is, None when it is nobody's and stays."""
    return [{"client": h["why"], "pid": h["pid"] or None} for h in report["holders"] if h["what"] == "client"]
