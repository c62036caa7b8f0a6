"""``vmm.AsyncMachine`` and ``vmm.Machine``: the same machine, from asyncio and without; several things at once, and
what is left when a task is cancelled."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from machines import nothing_left, spec, until
from migrations import Receiver, goes_on

import vmm
from vmm import AsyncMachine, Machine, Options, VmmError
from vmm.consumers.migration.status import load_status

TIMEOUT = 60.0
WALK = spec("sequential", accel="unicorn", name="source", mib=8, passes=0, spin=1000, timeout=None)

_T = TypeVar("_T")


def run(main: Coroutine[Any, Any, _T]) -> _T:
    """With a deadline."""
    async def bounded() -> _T:
        return await asyncio.wait_for(main, 2 * TIMEOUT)

    return asyncio.run(bounded())


@pytest.fixture
def address(runtime_dir: Path) -> str:
    return f"ipc://{runtime_dir / 'migrate'}"


def test_one_machine_does_several_things_at_once() -> None:
    """A wait, its events and two measurements, while short calls are answered."""
    async def main() -> None:
        async with await AsyncMachine.launch(WALK) as machine:
            async def kinds() -> list[str]:
                return [event["event"] async for event in machine.events()]

            wait, events = asyncio.ensure_future(machine.wait()), asyncio.ensure_future(kinds())
            rate, recording = await asyncio.gather(machine.dirty_rate(0.5), machine.working_set(0.6, 0.1))
            assert rate.pages > 0
            assert recording.intervals >= 2
            with pytest.raises(TimeoutError):
                await machine.wait(0.3)
            await machine.pause()
            assert (await machine.report()).state == "paused"
            assert await machine.resume() == []
            await machine.register("me")
            await machine.write(4096, b"hello")
            await machine.dirty_limit(1 << 20)
            assert (await machine.sync("me")).pages > 0
            assert len(await machine.read(4096, 5)) == 5
            await machine.stop()
            assert (await wait)["exit_code"] == 8
            assert (await events)[-1] == "ended"

    run(main())
    assert nothing_left("source")


def test_errors_are_those_of_the_machine() -> None:
    async def main() -> None:
        with pytest.raises(VmmError, match="no machine named 'nobody'"):
            await AsyncMachine.attach("nobody")
        async with await AsyncMachine.launch(WALK) as machine:
            with pytest.raises(VmmError, match="not within a single memory slot"):
                await machine.read(1 << 40, 8)
            with pytest.raises(VmmError, match="must be from 50 ms"):
                await machine.dirty_rate(1000.0)

    run(main())


def test_a_cancelled_launch_leaves_no_machine() -> None:
    async def main() -> None:
        task = asyncio.ensure_future(AsyncMachine.launch(WALK))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main())
    until(lambda: not [each for each in threading.enumerate() if each.name.startswith("machine-")], "it ends", TIMEOUT)
    assert nothing_left("source")


def test_a_cancelled_migration_is_cancelled(address: str) -> None:
    async def main() -> None:
        async with await AsyncMachine.launch(WALK) as machine:
            await machine.write(4 << 20, bytes(range(1, 256)) * (2 << 12))
            receiver = await asyncio.to_thread(Receiver, address, accel="unicorn")
            under_way = asyncio.Event()
            task = asyncio.ensure_future(machine.migrate(
                address, Options(bandwidth=100_000), progress=lambda report: under_way.set()))
            await under_way.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.to_thread(receiver.failure)
            assert load_status("source")["status"] in ("cancelled", "failed")
            await asyncio.to_thread(goes_on, machine.machine)

    run(main())


def test_snapshot_restore_and_migration_by_methods(tmp_path: Path, address: str) -> None:
    """The oracle is the memory of a machine that stands still."""
    with Machine.launch(WALK) as machine:
        with machine.paused("test"):
            manifest = machine.snapshot(tmp_path / "snapshots", compression="zstd")
            before = np.array(machine.ram(0))
        assert machine.snapshot(tmp_path / "snapshots", incremental=True).parent == manifest.id
        with Machine.restore(tmp_path / "snapshots", manifest.id, name="again", accel="unicorn", start=False) as again:
            assert type(again) is Machine
            assert np.array_equal(again.ram(0), before)
            again.start()
            assert again.report().state == "running"
        assert nothing_left("again")
        receiver = Receiver(address, accel="unicorn")
        report = machine.migrate(address, Options(paused=True, keep_source=True))
        assert report.status == "completed"
        with Machine.taken_over(receiver.result()) as moved:
            assert isinstance(moved, vmm.Machine)
            assert np.array_equal(moved.ram(0), machine.ram(0))
            moved.resume()
            goes_on(moved)
    assert nothing_left("target")


def test_received_by_asyncio(address: str) -> None:
    async def main() -> None:
        async with await AsyncMachine.launch(WALK) as machine:
            waiting = asyncio.Event()
            target = asyncio.ensure_future(AsyncMachine.receive(
                address, name="target", accel="unicorn", timeout=TIMEOUT, waiting=lambda at: waiting.set()))
            await waiting.wait()
            seen: list[str] = []
            report = await machine.migrate(address, progress=lambda each: seen.append(each.status))
            assert report.status == seen[-1] == "completed"
            async with await target as moved:
                assert (await moved.status())["state"] == "running"

    run(main())
    assert nothing_left("target")


def test_a_file_is_launched_with_overrides(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text("memory: [{size: 4MiB}]\naccel: unicorn\nguest: {workload: hello}\n")
    with Machine.launch(tmp_path / "small.yaml", overrides=["vcpus=2"]) as machine:
        report = machine.wait(TIMEOUT)
        assert (machine.name, len(report["vcpus"]), report["exit_code"]) == ("small", 2, 0)
    with pytest.raises(VmmError, match="overrides are for a configuration file"):
        Machine.launch(WALK, overrides=["vcpus=2"])


def test_one_that_is_let_go_is_left_running() -> None:
    Machine.launch(WALK, detach=True).detach()
    with Machine.attach("source") as machine:
        assert machine.report().state == "running"
        machine.stop()
    until(lambda: Machine("source").status()["state"] == "ended", "it has ended")
    with Machine.attach("source") as machine:
        machine.release()
    until(lambda: nothing_left("source"), "nothing is left", TIMEOUT)
