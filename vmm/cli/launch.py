"""``vmm launch``."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from workers.accel import registry

from ..errors import ExitCode, VmmError, one_line
from .common import json_option, print_json
from .completion import complete_configs, complete_machines_of_file, complete_settings
from .forward import forwarding, note_forward
from .run import run_or_leave

if TYPE_CHECKING:
    from ..client.config import MachineConfig
    from ..client.machine import Machine

__all__ = ["launch"]

#: {option: the key that it is short for}
_KEYS = {"accel": "accel", "vcpus": "vcpus", "memory": "memory.0.size", "name": "name"}


@click.command()
@click.argument("config", type=click.Path(allow_dash=True), shell_complete=complete_configs)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", shell_complete=complete_settings,
              help="Override a key of CONFIG, for example reaper.mode=fixed or memory.0.size=1GiB (see vmm config "
                   "explain).")
@click.option("--accel", type=click.Choice(["auto", *registry.names()]), help="Accelerator to use.")
@click.option("--vcpus", type=int, help="Number of vCPUs.")
@click.option("--memory", metavar="SIZE", help="Size of the first memory slot.")
@click.option("--name", help="Name of the machine (default: the name in CONFIG, else its file name).")
@click.option("--machine", shell_complete=complete_machines_of_file,
              help="Of a CONFIG with several machines, launch only this one.")
@click.option("--detach", is_flag=True, help="Leave the machine running in the background.")
@click.option("--trace", "trace", multiple=True, metavar="PATTERN",
              help="Enable the trace events that match, for example 'kvm_dirty_ring_*'. (For dirty traces, see vmm "
                   "trace.)")
@click.option("--trace-file", type=click.Path(dir_okay=False), default="",
              help="Write trace events to this file instead of standard error.")
@click.option("--metrics", metavar="ADDRESS",
              help="Serve metrics for Prometheus until the machine ends, at PORT (of 127.0.0.1), HOST:PORT, :PORT or "
                   "unix:PATH.")
@click.option("--dirty-rate", "dirty_rate", is_flag=True,
              help="With --metrics: also measure the dirty rate. The machine logs for it, and each scrape flushes.")
@click.option("--qmp", "qmp_socket", type=click.Path(dir_okay=False),
              help="Serve QMP at this Unix socket, as vmm qmp does.")
@json_option
def launch(config: str, overrides: tuple[str, ...], name: str | None, machine: str | None, detach: bool,
           trace: tuple[str, ...], trace_file: str, metrics: str | None, dirty_rate: bool, qmp_socket: str | None,
           as_json: bool, **short: Any) -> int:
    """Launch a machine and run it until it ends. CONFIG is a YAML file, or the name of an example (quickstart, for
    one); - reads standard input. A CONFIG with several machines is launched in the background, all of them or none."""
    from ..client.config import load_configs

    if trace and detach and not trace_file:
        raise VmmError("--trace with --detach needs --trace-file: a detached machine has no terminal to write to")
    if dirty_rate and metrics is None:
        raise VmmError("--dirty-rate is measured for metrics: give --metrics ADDRESS, too")
    options = [(f"--{key} {one_line(str(value), 80)}", _KEYS[key], value)
               for key, value in {**short, "name": name}.items() if value is not None]
    configs = load_configs(config, overrides, machine=machine, options=options)
    served = Served(metrics, dirty_rate, qmp_socket)
    traced = {"trace": list(trace), "trace_file": os.path.abspath(trace_file) if trace_file else ""}
    if len(configs) == 1:
        return _launch_one(configs[0], traced, served, detach, as_json)
    names = ", ".join(each.name for each in configs)
    if name is not None:
        raise VmmError(f"--name: {config} has several machines ({names}): it goes with --machine")
    if not detach:
        raise VmmError(f"{config} has several machines ({names}): launch all of them with --detach, or one with "
                       "--machine")
    for option, given in (("--trace-file", trace_file), ("--metrics", metrics), ("--qmp", qmp_socket)):
        if given:
            raise VmmError(f"{option}: is for one machine: use --machine")
    return _launch_all(configs, as_json)


class Served(NamedTuple):
    """What is offered to other programs: metrics at an address, with the dirty rate; QMP at a socket."""

    metrics: str | None
    dirty_rate: bool
    qmp: str | None


def _launch_one(config: MachineConfig, traced: dict[str, Any], served: Served, detach: bool, as_json: bool) -> int:
    from ..client.forwarding import HostPorts
    from ..client.machine import Machine
    from .exporter import MetricsPort

    if served.qmp is not None:
        from .qmp import check_qmp, start_qmp

        check_qmp(served.qmp)       # before anything is started
    wanted = [] if config.guest is None else config.guest.forward
    with (HostPorts([] if detach else wanted) as ports,
          MetricsPort(served.metrics, dirty_rate=served.dirty_rate) as port):
        machine = Machine.launch(config, **traced, detach=detach, start=False)
        try:
            _warn(config, machine)
            if served.qmp is not None:
                start_qmp(machine.name, served.qmp)
            if detach:
                machine.start()
        except BaseException:
            machine.close()
            raise
        if not detach:
            with machine, forwarding(machine.name, ports), port.serving(machine.name):
                return run_or_leave(machine, False, as_json)
        port.leave(machine.name)
        status = run_or_leave(machine, True, as_json)
        note_forward(machine.name, wanted)
        return status


def _launch_all(configs: list[MachineConfig], as_json: bool) -> int:
    """All of them, or none."""
    from ..client.machine import Machine

    with contextlib.ExitStack() as stack:
        machines = []
        for config in configs:
            machines.append(machine := Machine.launch(config, detach=True, start=False))
            stack.callback(machine.close)
            _warn(config, machine)
        for machine in machines:
            machine.start()
        stack.pop_all()
    for config, machine in zip(configs, machines, strict=True):
        if as_json:
            machine.detach()
        else:
            run_or_leave(machine, True, False)
            note_forward(machine.name, [] if config.guest is None else config.guest.forward)
    if as_json:
        print_json({"names": [machine.name for machine in machines]})
    return ExitCode.OK


def _warn(config: MachineConfig, machine: Machine) -> None:
    from ..client.advice import advice

    assert machine.spec is not None
    for each in advice(config, machine.spec, sharing=False):
        click.echo(f"vmm: warning: {each.text}", err=True)
