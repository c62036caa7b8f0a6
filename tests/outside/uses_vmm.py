"""A program of somebody else, as type checkers see it: every name of the public API, with the types that its
documentation promises. It is checked, and never run."""

from __future__ import annotations

from pathlib import Path
from typing import assert_type

import vmm
from vmm import AsyncMachine, Machine, MigrationError, Options, VmmError, load_config


def plain(folder: Path) -> None:
    config = load_config("machine.yaml", ["vcpus=2"])
    assert_type(config, vmm.MachineConfig)
    with Machine.launch(config, name="one") as machine:
        assert_type(machine, Machine)
        assert_type(machine.report(), vmm.Report)
        assert_type(machine.report().vcpus[0].dirty_pages, int)
        assert_type(machine.report().exit_code, int | None)
        assert_type(machine.dirty_rate(1.0), vmm.DirtyRate)
        assert_type(machine.dirty_rate(mode="ring").vcpus[0].mib_per_s, float)
        assert_type(machine.working_set(1.0, 0.1), vmm.Recording)
        assert_type(machine.snapshot(folder, compression="zstd"), vmm.Manifest)
        machine.register("me")
        assert_type(machine.sync("me"), vmm.SyncResult)
        assert_type(machine.sync("me").slots, dict[int, list[tuple[int, int]]])
        assert_type(machine.flush("me"), vmm.Flushed)
        assert_type(int(machine.ram(0)[0]), int)
        assert_type(machine.read(0, 8), bytes)
        machine.dirty_limit(1000, vcpu=1)
        with machine.paused("looking"), machine.limits("mine") as limits:
            limits.set(100)
        for event in machine.events(1.0):
            print(event["event"])
        try:
            report = machine.migrate("ipc:///tmp/there", Options(bandwidth=1e9, compression="zstd"))
        except MigrationError as exc:
            assert_type(exc.exit_code, vmm.ExitCode)
        else:
            assert_type(report, vmm.MigrationReport)
            assert_type(report.ram.transferred, int)
    other = Machine.launch("machine.yaml", overrides=["vcpus=4"], detach=True)
    other.detach()
    assert_type(Machine.restore(folder, name="again", lazy=True), Machine)
    assert_type(Machine.receive("ipc:///tmp/here", timeout=1.0), Machine)
    assert_type(Machine.attach("one"), Machine)


async def asynchronous(folder: Path) -> None:
    async with await AsyncMachine.launch("machine.yaml") as machine:
        assert_type(machine, AsyncMachine)
        assert_type(await machine.report(), vmm.Report)
        assert_type(await machine.dirty_rate(0.5), vmm.DirtyRate)
        assert_type(await machine.working_set(1.0), vmm.Recording)
        assert_type(await machine.snapshot(folder), vmm.Manifest)
        assert_type(await machine.sync("me"), vmm.SyncResult)
        assert_type(await machine.migrate("ipc:///tmp/there"), vmm.MigrationReport)
        await machine.dirty_limit(1000)
        async for event in machine.events():
            if event["event"] == "ended":
                break
        await machine.stop()
    assert_type(await AsyncMachine.restore(folder), AsyncMachine)
    try:
        await AsyncMachine.attach("nobody")
    except VmmError as exc:
        print(exc.exit_code.name, vmm.__version__)
