"""``vmm fleet``: machines on the hosts of a Ray cluster."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import click

from ..errors import ExitCode, VmmError
from .common import Duration, json_option, print_json

__all__ = ["fleet"]

_EVENTS_SHOWN = 10
_AGAIN = 2.0                # seconds

_cluster_option = click.option("--cluster", metavar="ADDRESS", default="auto", show_default=True,
                               help="The Ray cluster: auto (the one that this host is a node of), or HOST:PORT.")


class _Fleet(click.Group):
    """``vmm fleet FILE`` is ``vmm fleet start FILE``."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            args = ["start", *args]
        return super().resolve_command(ctx, args)


@click.group(cls=_Fleet)
def fleet() -> None:
    """Run many machines on the hosts of a Ray cluster. Usage: vmm fleet FILE starts those that FILE asks for."""


@fleet.command()
@click.argument("file", type=click.Path(path_type=Path))
@_cluster_option
@click.option("--restore", "restored", is_flag=True, help="Start them from their last snapshots.")
@json_option
def start(file: Path, cluster: str, restored: bool, as_json: bool) -> None:
    """Start the machines that FILE asks for, spread over the cluster's hosts, or none of them. They run until they end,
    or vmm fleet stop."""
    from ..fleet.client import fleet_of
    from ..fleet.config import load_fleet

    machines = load_fleet(file)
    if restored and any(each.snapshots is None for each in machines):
        raise VmmError(f"--restore: {file} asks for no snapshots")
    with fleet_of(cluster, made=True) as client:
        try:
            warnings = client.add(machines, restored=restored, said=_say)
        except VmmError:
            client.end_if_empty()
            raise
        found = client.overview()
    for name, texts in warnings.items():
        for text in texts:
            click.echo(f"vmm: warning: {name}: {text}", err=True)
    if as_json:
        print_json(found)
    else:
        _print(found)


@fleet.command("list")
@_cluster_option
@click.option("--rate", "seconds", type=Duration(least=0.05), metavar="DURATION",
              help="Measure for so long what each machine dirties.")
@click.option("--watch", is_flag=True, help="Repeat until interrupted, every 2 s; with --json a document a line.")
@json_option
def list_(cluster: str, seconds: float | None, watch: bool, as_json: bool) -> None:
    """Show the cluster's nodes, the machines of its fleet, and what became of them. With --json also each machine's
    whole report, as vmm status has it."""
    from ..fleet.client import fleet_of

    out = sys.stdout        # while it is connected to Ray, which prints, that is standard error
    with fleet_of(cluster) as client:
        while True:
            found = client.overview(seconds or 0.0)
            with contextlib.redirect_stdout(out):
                _show(found, watch, as_json)
            if not watch:
                return
            time.sleep(_AGAIN)


def _show(found: dict[str, Any], watch: bool, as_json: bool) -> None:
    if as_json and watch:
        click.echo(json.dumps(found))
    elif as_json:
        print_json(found)
    else:
        if watch:
            click.clear()       # nothing, where it is no terminal
        _print(found)
        for event in found["events"][-_EVENTS_SHOWN:]:
            click.echo(f"{event['at']} {event['text']}")
    sys.stdout.flush()


@fleet.command()
@click.argument("node")
@_cluster_option
@click.option("--at-most", type=click.IntRange(1, 64), default=2, show_default=True, metavar="N",
              help="Number of machines that move at a time.")
@json_option
def drain(node: str, cluster: str, at_most: int, as_json: bool) -> int:
    """Migrate every machine of NODE live to others: each to one that has room for it, where least memory is dirtied.
    NODE is a node's name, its host's, an address, or the beginning of an id (see vmm fleet list); it gets no machines
    any more, until its Ray is started again. Exit status 9: one of them could not be moved, and runs there still."""
    from ..fleet.client import fleet_of

    with fleet_of(cluster) as client:
        moved = client.drain(node, at_most, _say)
    failed = [each for each in moved if "error" in each]
    if as_json:
        print_json(moved)
    else:
        click.echo(f"{len(moved) - len(failed)} of {len(moved)} machines have moved")
    return ExitCode.MIGRATION_FAILED if failed else ExitCode.OK


@fleet.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@_cluster_option
@json_option
def stop(names: tuple[str, ...], cluster: str, as_json: bool) -> None:
    """End the machines NAME of the fleet, or all of them and the fleet. Their snapshots stay."""
    from ..fleet.client import fleet_of

    with fleet_of(cluster) as client:
        ended = client.stop(list(names))
    if as_json:
        print_json({"stopped": ended})
    else:
        click.echo(f"stopped: {', '.join(ended) or 'none'}")


def _say(text: str) -> None:
    click.echo(text, err=True)


def _print(found: dict[str, Any]) -> None:
    from ..tables import print_table, screen, table

    nodes = table("node", "address", "state", numbers=("machines", "CPUs free", "of", "MiB free"), texts=("KVM",))
    for node in found["nodes"]:
        nodes.add_row(node["name"], node["address"], node["state"], str(node["machines"]), _number(node["cpus_free"]),
                      f"{node['cpus']:g}", _number(node["memory_free"], 1 << 20),
                      "" if node["kvm"] is None else "yes" if node["kvm"] else "no")
    print_table(nodes, screen())
    machines = table("machine", "state", "node", "accelerator", numbers=("vCPUs", "RAM MiB", "dirty pages/s"),
                     texts=("last snapshot", "note"))
    for each in found["machines"]:
        report, snapshot = each["report"] or {}, each["snapshot"] or {}
        vcpus = report.get("vcpus", [])
        state = report.get("state", each["state"]) if each["state"] == "running" else each["state"]
        machines.add_row(each["name"], state, each["node_name"], report.get("accelerator", ""), str(len(vcpus)),
                         _number(sum(slot["size"] for slot in report.get("slots", [])), 1 << 20),
                         _number(each["pages_per_s"]), snapshot.get("created") or "",
                         snapshot.get("error") or each["detail"])
    print_table(machines, screen())


def _number(value: float | None, unit: int = 1) -> str:
    return "" if value is None else f"{value / unit:,.0f}"
