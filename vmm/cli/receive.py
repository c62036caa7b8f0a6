"""``vmm receive``, and ``vmm keys``, which both ends of a migration need."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

from workers.accel import registry

from .common import Duration, json_option, print_json
from .migrating import key_options
from .program import run_arrived, trees_options

if TYPE_CHECKING:
    from ..machine.rules import Trees

__all__ = ["keys", "receive"]


def _end(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@click.command()
@click.argument("address")
@click.option("--name", help="Name of the machine here (default: its name at the source).")
@click.option("--accel", type=click.Choice(["auto", *registry.names("guest")]), default="auto", show_default=True,
              help="Accelerator to use here.")
@click.option("--detach", is_flag=True, help="Leave the machine running in the background once it has arrived.")
@click.option("--timeout", type=Duration(), default=None, help="How long to wait for a source.")
@trees_options
@key_options
@json_option
def receive(address: str, name: str | None, accel: str, detach: bool, timeout: float | None, trees: Trees, key: str,
            peer: str, insecure: bool, as_json: bool) -> int:
    """Wait at ADDRESS for one incoming machine and run it."""
    from ..receive import receive as run

    signal.signal(signal.SIGTERM, _end)
    machine = run(address, name=name, accel=accel, detach=detach, key=key, peer=peer, insecure=insecure,
                  timeout=timeout, trees=trees, waiting=lambda at: click.echo(f"waiting at {at}", err=True),
                  refused=lambda why: click.echo(f"refused an offer: {why}", err=True))
    return run_arrived(machine, detach, as_json)


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
