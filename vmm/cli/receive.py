"""``vmm receive``, and ``vmm keys``, which both ends of a migration need."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from workers.accel import registry

from ..errors import VmmError
from .common import Duration, Size, json_option, print_json
from .migrating import key_options
from .program import run_arrived, trees_options
from .signals import raise_on

if TYPE_CHECKING:
    from ..client.machine import Machine

__all__ = ["keys", "receive"]


@click.command()
@click.argument("address")
@click.option("--name", help="Name of the machine here (default: its name at the source).")
@click.option("--accel", type=click.Choice(["auto", *registry.names("guest")]), default="auto", show_default=True,
              help="Accelerator to use here.")
@click.option("--detach", is_flag=True, help="Leave the machine running in the background once it has arrived.")
@click.option("--timeout", type=Duration(), default=None, help="How long to wait for a source.")
@click.option("--loop", is_flag=True, help="Receive one machine after the other, under their own names, and leave each "
                                           "running in the background.")
@click.option("--max-memory", type=Size(), default=0, help="Refuse machines with more memory.")
@click.option("--max-vcpus", type=click.IntRange(1), default=None, help="Refuse machines with more vCPUs.")
@trees_options
@key_options
@json_option
def receive(address: str, name: str | None, detach: bool, loop: bool, max_memory: int, max_vcpus: int | None,
            as_json: bool, **options: Any) -> int:
    """Wait at ADDRESS for one incoming machine and run it."""
    from .. import receive as reception

    if loop and name is not None:
        raise VmmError("--name cannot be had with --loop: each machine keeps its own name")
    raise_on(signal.SIGTERM, lambda number: KeyboardInterrupt())
    options["limits"] = reception.Limits(max_memory, max_vcpus or 0)
    options["waiting"] = lambda at: click.echo(f"waiting at {at}", err=True)
    options["refused"] = lambda why: click.echo(f"refused an offer: {why}", err=True)
    if loop:
        reception.receive_all(address, arrived=lambda machine: _arrived(machine, as_json),
                              failed=lambda why: click.echo(f"vmm: error: {why}", err=True), **options)
    return run_arrived(reception.receive(address, name=name, detach=detach, **options), detach, as_json)


def _arrived(machine: Machine, as_json: bool) -> None:
    """It lives on by itself."""
    if as_json:
        machine.detach()
        click.echo(json.dumps({"name": machine.name}))
    else:
        run_arrived(machine, True, False)
    sys.stdout.flush()


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("name")
@click.option("--force", is_flag=True, help="Replace an existing pair of that name.")
@json_option
def keys(directory: Path, name: str, force: bool, as_json: bool) -> None:
    """Create a pair of CURVE keys. DIRECTORY/NAME.key is to be shared, DIRECTORY/NAME.key_secret to be kept
    private."""
    from ..consumers.migration.keys import make_keys

    public, secret = make_keys(directory, name, force=force)
    if as_json:
        print_json({"public": str(public), "secret": str(secret)})
    else:
        click.echo(f"{public}\n{secret}")
