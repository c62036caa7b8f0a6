"""A call in another process's thread (vmm/consumers/watch/injector.py): the thread notices nothing of it, and
nothing of the death of whoever makes it call, at whatever moment."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from watched import MODES, Target, compiler_missing

from ipc.linux.foreign import status
from ipc.linux.processid import ProcessId, identity
from ipc.steps import STEPS
from vmm.consumers.watch import injector
from vmm.consumers.watch.attach import attach, check_target
from vmm.consumers.watch.injector import inject
from vmm.errors import VmmError

pytestmark = [pytest.mark.watch, pytest.mark.skipif(bool(compiler_missing()), reason=compiler_missing())]

UFFD = "anon_inode:[userfaultfd]"
#: After which the process has a descriptor that nobody closes.
KEPT = ("inject-set", "inject-entered", "inject-made", "inject-fetched", "inject-returned", "inject-restored")
ALL_STEPS = STEPS["a call of another process's thread"]


@pytest.mark.parametrize("mode", MODES)
def test_the_thread_goes_on_as_if_nothing_had_been(mode: str) -> None:
    with Target(mode) as target:
        before = target.descriptors()
        for _ in range(3):
            attached = attach(check_target(target.pid))
            attached.fault.close()
            assert target.check() == "ok"
        assert target.descriptors() == before
        assert target.tracers() == {"0"}


@pytest.mark.parametrize("call", [attach, inject])
def test_one_that_ends_before_anything_is_done_has_ended(call: Callable[[ProcessId], object]) -> None:
    """It is a zombie: there is such a process, and it has no memory, code or threads."""
    with subprocess.Popen(["sleep", "60"]) as process:
        known = check_target(process.pid)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises((VmmError, injector.Refused), match=f"^process {process.pid} has ended$"):
            call(known)
        with pytest.raises(VmmError, match="has ended"):
            check_target(process.pid)


def test_a_thread_is_found_that_is_not_interrupted_where_there_is_one() -> None:
    with Target("thread-poll") as target, attach(check_target(target.pid)).fault:
        pass
    with Target("thread-poll") as target:
        attached = attach(check_target(target.pid))
        attached.fault.close()
        assert (attached.doing, attached.interrupted) == ("poll", False)
        assert attached.tid != target.pid
    with Target("epoll") as target:
        attached = attach(check_target(target.pid))
        attached.fault.close()
        assert (attached.doing, attached.interrupted) == ("epoll_wait", True)


def killed_at(step: str, steps: Path, target: Target) -> None:
    (steps / f"kill-{step}").touch()
    before = target.descriptors()
    with pytest.raises(VmmError, match="was ended before it had one; the process runs on"):
        attach(check_target(target.pid))
    assert not (steps / f"kill-{step}").exists()
    assert target.check() == "ok"
    more = list(target.descriptors())
    for each in before:
        more.remove(each)
    assert more == ([UFFD] if step in KEPT else [])
    assert target.tracers() == {"0"}


@pytest.mark.parametrize("step", ALL_STEPS)
@pytest.mark.parametrize("mode", ["compute", "thread-futex"])
def test_whoever_makes_it_call_may_be_killed_at_every_step(mode: str, step: str, steps: Path) -> None:
    with Target(mode) as target:
        killed_at(step, steps, target)
        attach(check_target(target.pid)).fault.close()      # and it is no worse for the next
        assert target.check() == "ok"


def injecting(process: ProcessId) -> tuple[int, int]:
    """A fork of this process that does it: its process id, and a pipe that says when it comes to the thread."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, read
    ready = injector._be_quick

    def told() -> None:
        ready()
        os.write(write, b"x")

    injector._be_quick = told
    with contextlib.suppress(BaseException):
        os.close(inject(process).fd)
        os._exit(0)
    os._exit(1)


def killed_anywhere(target: Target, count: int, seed: int) -> list[bool]:
    """The injection ``count`` times, killed after a time by chance; whether it had come to its end each time."""
    chance, took, found = random.Random(seed), [], []
    process = identity(target.pid)
    for number in range(count):
        child, pipe = injecting(process)
        os.read(pipe, 1)
        os.close(pipe)
        began = time.monotonic()
        if number < 5:
            os.waitpid(child, 0)
            took.append(time.monotonic() - began)
            continue
        delay = sorted(took)[2] * chance.uniform(0.0, 1.2)
        while time.monotonic() - began < delay:
            pass
        os.kill(child, signal.SIGKILL)
        _, code = os.waitpid(child, 0)
        found.append(code == 0)
        assert target.check() == "ok"
        assert target.tracers() == {"0"}
    return found


def stopped_anywhere(target: Target, count: int, seed: int) -> list[bool]:
    """The injection ``count`` times, while the target is stopped at a time by chance; whether it was done all the same
    each time."""
    chance, found = random.Random(seed), []
    process = identity(target.pid)
    for _ in range(count):
        child, pipe = injecting(process)
        os.read(pipe, 1)
        os.close(pipe)
        end = time.monotonic() + chance.uniform(0.0, 0.001)
        while time.monotonic() < end:
            pass
        os.kill(target.pid, signal.SIGSTOP)
        _, code = os.waitpid(child, 0)
        found.append(code == 0)
        deadline = time.monotonic() + 30.0
        while status(target.pid)["State"][0] != "T":        # and so it stays
            assert time.monotonic() < deadline
        os.kill(target.pid, signal.SIGCONT)
        assert target.check() == "ok"
        assert target.tracers() == {"0"}
    return found


SCRIPT = """
import sys
sys.path[:0] = sys.argv[1:3]
import test_injection
from watched import Target
with Target(sys.argv[4]) as target:
    done = getattr(test_injection, sys.argv[3])(target, int(sys.argv[5]), int(sys.argv[6]))
    print(sum(done), len(done), len(target.descriptors()))
"""


def in_a_process(what: str, mode: str, count: int, seed: int) -> tuple[int, int, int]:
    """With one thread: (came to its end, all, descriptors of the target afterwards)."""
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(here), str(here.parent.parent), what, mode, str(count),
                           str(seed)], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    ended, killed, descriptors = map(int, done.stdout.split())
    return ended, killed, descriptors


@pytest.mark.parametrize("mode", ["compute", "thread-futex"])
def test_a_process_that_is_stopped_meanwhile_is_stopped_and_keeps_nothing(mode: str) -> None:
    with Target(mode) as target:
        before = len(target.descriptors())
    _, tried, descriptors = in_a_process("stopped_anywhere", mode, 40, 3)
    assert (tried, descriptors) == (40, before)


@pytest.mark.parametrize("mode", ["compute", "signals", "sequence", "thread-poll"])
def test_it_may_be_killed_at_any_time(mode: str) -> None:
    ended, killed, _ = in_a_process("killed_anywhere", mode, 60, 1)
    assert killed == 55
    assert ended < killed       # the others were killed on their way


@pytest.mark.long
@pytest.mark.parametrize("mode", MODES)
def test_it_may_be_killed_at_any_time_a_thousand_times(mode: str) -> None:
    ended, killed, descriptors = in_a_process("killed_anywhere", mode, 1000, 2)
    assert killed == 995
    assert ended < killed
    assert descriptors > 10     # some were killed when it had made the call
