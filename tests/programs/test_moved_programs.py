"""Programs that go on somewhere else: from a snapshot, by a migration, whatever they are doing at the time. What they
say is what they say natively, and no page is lost before or after."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from debian_roots import root_of
from inside import natively
from moving import Followed, begun, migrated, name_of

from ipc.shm import PAGE_SIZE
from vmm.client.machine import Machine
from vmm.consumers import snapshot
from vmm.consumers.missing import MissingPages
from vmm.errors import VmmError
from vmm.machine.rules import arriving

pytestmark = pytest.mark.kvm

# Every kind of waiting, at any time: locks, sleeps, pipes, sockets, epoll, children, signals; and computing.
_BUSY = r"""
import hashlib, os, queue, selectors, signal, socket, subprocess, sys, threading, time, zlib
digest, lock, steps = hashlib.sha256(), threading.Condition(), int(sys.argv[1])
turn = [0]
def player(number):
    for step in range(steps):
        with lock:
            lock.wait_for(lambda: turn[0] == 2 * step + number)
            digest.update(b"%d" % (step * number))
            turn[0] += 1
            lock.notify_all()
players = [threading.Thread(target=player, args=(n,)) for n in (0, 1)]
here, there = socket.socketpair()
def answer():
    with selectors.DefaultSelector() as wait:
        wait.register(there, selectors.EVENT_READ)
        while True:
            wait.select()
            if not (got := there.recv(4096)):
                return
            there.sendall(got[::-1])
echo = threading.Thread(target=answer); echo.start()
caught = []
signal.signal(signal.SIGALRM, lambda *_: caught.append(1))
child = subprocess.Popen(["sh", "-c", "while read line; do echo $line $line; done; echo the end"],
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
for each in players: each.start()
kept = []
with open("/tmp/" + sys.argv[3], "w+") as file:
    for step in range(steps):
        here.sendall(b"%d" % (10**9 + step)); kept.append(here.recv(4096))
        child.stdin.write(f"{step}\n"); kept.append(child.stdout.readline().encode())
        file.write(f"{step} "); file.flush()
        kept.append(zlib.compress(bytes(range(256)) * 50)[:20])
        signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005); signal.pause(); signal.setitimer(signal.ITIMER_REAL, 0)
        if step % 5 == 0: print("step", step, flush=True)
        time.sleep(float(sys.argv[2]))
    file.seek(0); kept.append(file.read().encode())
for each in players: each.join()
here.close(); echo.join(); child.stdin.close(); kept.append(child.stdout.read().encode()); child.wait()
for each in kept: digest.update(each)
print(len(caught) >= steps, turn[0], digest.hexdigest())
sys.exit(3)
"""


def _told(output: bytes, said: str) -> None:
    """What it said, in all, is what it says natively."""
    assert said.splitlines() == output.decode().splitlines()


@pytest.fixture(scope="module")
def python() -> Path:
    return root_of("python", "python3-minimal", "libpython3-stdlib", "coreutils", "dash")


def test_each_snapshot_goes_on_to_the_same_end(python: Path, tmp_path: Path) -> None:
    """Taken while it runs, each built on the one before; every other one is restored while it runs, too."""
    command = ["python3", "-c", _BUSY, "40", "0.01", name_of("busy")]
    native = natively(python, *command)
    assert native.code == 3, native
    before = []
    with begun(python, name_of("taken"), *command) as (program, trees):
        for at in (0, 10, 20, 30):
            program.until(f"step {at}\n")
            with program.machine.paused("test"):
                program.hear(0.2)
                snapshot.create(program.machine, tmp_path / "chain", live=at == 20, incremental=at > 0)
                before.append(program.said)
        assert program.end()["program"]["exit_status"] == 3
        _told(native.output, program.said)
    for number, said in enumerate(before, 1):
        with snapshot.restore(tmp_path / "chain", f"{number:04d}", machine_name=name_of("restored"),
                              lazy=number % 2 == 0, trees=trees) as machine:
            again = Followed(machine, said)
            assert again.end()["program"]["exit_status"] == 3
            _told(native.output, again.said)


@pytest.mark.parametrize("postcopy", [False, True])
def test_to_and_fro(python: Path, tmp_path: Path, postcopy: bool) -> None:
    command = ["python3", "-c", _BUSY, "90", "0.05", name_of("busy")]
    native = natively(python, *command)
    with contextlib.ExitStack() as stack:
        program, trees = stack.enter_context(begun(python, name_of("moved"), *command))
        for at in (10, 30):
            program.until(f"step {at}\n")
            program = stack.enter_context(migrated(program, trees, tmp_path, name_of("moved"), postcopy=postcopy))
        assert program.end()["program"]["exit_status"] == 3
    _told(native.output, program.said)


_CLEARING = r"""
import mmap, sys
size, kind = 40 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
filled = b"x" * size
print("begun", flush=True)
for turn in range(int(sys.argv[1])):
    with mmap.mmap(-1, size, flags=kind) as memory:
        memory[:] = filled
"""


def test_a_state_is_taken_between_two_calls(python: Path) -> None:
    """Also of a system whose calls fill its ring, and wait in the middle: with such a program, every third time."""
    with begun(python, name_of("clear"), "python3", "-c", _CLEARING, "1000", ring_entries=1024) as (program, _):
        program.until("begun\n")
        for _ in range(30):
            with program.machine.paused("test"):
                assert len(program.machine.state()["vcpus"][-1]["system"]) > 1000
            program.hear(0.01)
        assert program.machine.status()["state"] == "running"


_GIVEN_UP = r"""
import mmap, time
size, wrong = 2 << 20, 0
first = mmap.mmap(-1, size)
first[:] = b"\xa5" * size
print("filled", flush=True)
time.sleep(3)
first.close()       # nobody has touched it since
for _ in range(3):
    with mmap.mmap(-1, size) as memory:
        wrong += memory[:] != bytes(size)
        memory[:] = b"\x5a" * size
print("wrong", wrong)
"""


def test_memory_that_is_given_up_before_it_has_come(python: Path, tmp_path: Path) -> None:
    """Post-copy: who gets it next finds zeros."""
    with begun(python, name_of("filled"), "python3", "-c", _GIVEN_UP) as (program, trees):
        program.until("filled\n")
        saved = snapshot.create(program.machine, tmp_path)
    memory = snapshot.read_memory(tmp_path)[0].reshape(-1, PAGE_SIZE)
    spec = arriving(saved.spec, name=name_of("filling"), image="", accel="kvm", linger=True, trees=trees)
    with Machine.launch(spec, start=False) as machine, machine.lease("incoming", "test"), \
            MissingPages(machine, {0: memory.any(axis=1)}) as missing:
        machine.set_state(saved.vcpus)
        machine.start()
        program = Followed(machine, program.said)
        deadline = time.monotonic() + 60.0
        while "wrong" not in program.said:
            assert time.monotonic() < deadline
            for fd in select.select(missing.faults, [], [], 0.05)[0]:
                for each in missing.wanted(fd):     # and nothing else comes
                    missing.put(each.slot, np.array([each.page]), memory[[each.page]])
            program.hear(0.0)
        left = np.flatnonzero(missing.bitmaps()[0])
        assert len(left)
        missing.put(0, left, memory[left])
        missing.finish()
        program.end()
    assert program.said == "filled\nwrong 0\n"


def _kill_coordinators(names: list[str], over: threading.Event) -> None:
    """Of the machine that is the last of them now, four times each at most: more in a minute are a fault."""
    killed: dict[str, int] = {}
    while not over.wait(1.5):
        name = names[-1]
        if killed.get(name, 0) < 4:
            with contextlib.suppress(VmmError, ProcessLookupError), Machine.attach(name) as machine:
                os.kill(machine.status()["coordinator"]["pid"], signal.SIGKILL)
                killed[name] = killed.get(name, 0) + 1


@pytest.mark.parametrize("postcopy", [False, pytest.param(True, marks=pytest.mark.long)])
def test_coordinators_die_meanwhile(python: Path, tmp_path: Path, postcopy: bool) -> None:
    """What a coordinator had not passed on yet of what is said goes with it: here the last line says it all."""
    command = ["python3", "-c", _BUSY, "200", "0.05", name_of("busy")]
    native, over = natively(python, *command), threading.Event()
    with contextlib.ExitStack() as stack:
        program, trees = stack.enter_context(begun(python, name_of("kills"), *command))
        names = [program.machine.name]
        killer = threading.Thread(target=_kill_coordinators, args=(names, over))
        stack.callback(killer.join)
        stack.callback(over.set)
        killer.start()
        program.listen(2.0)
        for _ in range(2):
            program = stack.enter_context(migrated(program, trees, tmp_path, name_of("kills"), postcopy=postcopy))
            names.append(program.machine.name)
            program.listen(2.0)
        over.set()
        killer.join()
        assert program.end()["program"]["exit_status"] == 3
    assert program.said.splitlines()[-1] == native.output.decode().splitlines()[-1]
