"""The helper process: has a thread of another process call userfaultfd(2), fetches the descriptor, has it close its
own, and sends it to the watcher. It does nothing else, imports little, and lives for a fraction of a second.

It may be killed at any moment. The thread is at each of them either as it was, or at code that brings it back by
itself: its stack pointer is at a signal frame below its stack (frame.py) whose return address is the restorer, its
instruction pointer at ``syscall; ret``. A thread whose tracer ends makes the call, returns to the restorer, and is
where it was. What the process has more then is one descriptor that nothing is registered with, closed by exec.

    seize, interrupt        it stands still, within the kernel's handling of signals
    frame written           below its red zone: bytes that it does not use
    registers set           to the call                 (killed from here on: it makes the call, and goes on)
    run to the call, run to its end, fetch or close
    interrupt               it stands still as at first
    registers put back      with the call that it was in, which the kernel has go on as after any stop
    detach

A signal that comes meanwhile is handed on with the registers put back, and all begins anew.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import NamedTuple

from ipc.linux.foreign import Mapping, has_memory, mappings, read_memory, write_memory
from ipc.linux.libc import LIBC, SYS_PIDFD_GETFD, SYS_USERFAULTFD, check
from ipc.linux.process import SERVICE_SLICE, set_time_slice
from ipc.linux.processid import ProcessId, open_process
from ipc.linux.ptrace import Ended, Registers, Stop, Traced
from ipc.steps import step
from ipc.userfault import WRITE_ASYNC

from .frame import CALL_BYTES, build, frame_room
from .gadgets import Gadgets, find_gadgets
from .threads import INSTEAD, Candidate, candidates, stack_unfit, why_none

__all__ = ["Injected", "inject", "main"]

_CLOSE = 3              # of asm/unistd_64.h
_PATIENCE = 5.0         # seconds for a stop, which takes microseconds
_TRIES = 100            # signals and restartable sequences that may come in between
_SEQUENCE = 0.0002      # seconds, more each time, in which a thread is to come to the end of a restartable sequence
_NONE = (1 << 64) - 1   # orig_rax: in no system call
_OURS = "anon_inode:[userfaultfd]"


class Refused(Exception):
    """It is not done; the text says why, and is fit for a user."""


class _Unfit(Exception):
    """Not with this thread."""


class _Late(Exception):
    """A thread did not stop in time."""


class Injected(NamedTuple):
    """The descriptor, and what it took."""

    fd: int
    tid: int
    doing: str          # what the thread was at
    interrupted: bool   # its call ended with EINTR
    stopped: float      # seconds for which the thread stood still, all told


def _late(number: int, frame: FrameType | None) -> None:
    raise _Late


class _Injection:
    """Into one thread. Raises Refused, _Unfit and Ended."""

    def __init__(self, process: ProcessId, pidfd: int, candidate: Candidate, gadgets: Gadgets,
                 there: list[Mapping]) -> None:
        self._pid, self._pidfd, self._gadgets, self._there = process.pid, pidfd, gadgets, there
        self._main = candidate.tid == process.pid
        self._stopped = 0.0
        self._fd = self._number = -1    # here, and in the process
        self._error = 0
        try:
            self._thread = Traced(candidate.tid)
        except OSError as exc:
            if exc.errno in (errno.EPERM, errno.EACCES):
                raise _Unfit("not this user's to trace (needs root or CAP_SYS_PTRACE; sysctl kernel.yama.ptrace_scope "
                             "may forbid it)") from None
            raise

    def run(self) -> tuple[int, float]:
        """(the descriptor, seconds for which the thread stood still)."""
        step("inject-seized")
        self._stop()
        try:
            self._call(SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK | WRITE_ASYNC.flags, self._fetched)
            # Another thread may have closed it, and have another by that number.
            with contextlib.suppress(FileNotFoundError):
                if os.readlink(f"/proc/{self._pid}/fd/{self._number}") == _OURS:
                    self._call(_CLOSE, self._number, self._closed)
            if self._error:
                raise Refused(f"userfaultfd of process {self._pid}: {os.strerror(self._error)}")
        except BaseException as exc:
            if self._fd >= 0:
                os.close(self._fd)
            if self._number >= 0 and not isinstance(exc, Ended):
                raise Refused(f"{exc or type(exc).__name__}; process {self._pid} keeps one descriptor more, "
                              f"{self._number}: a userfaultfd that nothing uses") from None
            raise
        finally:
            with contextlib.suppress(Ended):
                self._thread.detach()
        self._stopped += time.monotonic() - self._since
        step("inject-detached")
        return self._fd, self._stopped

    def _fetched(self, result: int) -> None:
        """While the thread stands at the end of its call."""
        if result < 0:
            self._error = -result
            return
        self._number = result
        try:
            self._fd = check(LIBC.syscall(SYS_PIDFD_GETFD, self._pidfd, result, 0))
        except OSError as exc:
            self._error = exc.errno or errno.EIO
        step("inject-fetched")

    def _closed(self, result: int) -> None:
        self._number = -1

    def _wait(self) -> Stop:
        signal.setitimer(signal.ITIMER_REAL, _PATIENCE)
        try:
            return self._thread.wait()
        except _Late:
            raise _Unfit("one that does not stop") from None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _stop(self) -> None:
        """Until it stands still in the kernel's handling of signals; those that come are its own."""
        for number in range(_TRIES):
            self._thread.interrupt()
            found = self._wait()
            if found.kind == "stop" or self._must_go_on(found):
                self._since = time.monotonic()
                if not self._in_sequence():
                    step("inject-stopped")
                    return
                self._thread.run()
                time.sleep(number * _SEQUENCE)
            elif found.kind == "group":
                self._thread.detach()
                raise Refused(f"process {self._pid} is being stopped by a signal (SIGCONT lets it go on)")
            else:
                self._thread.run(found.signal)
        self._thread.interrupt()
        self._wait()
        self._thread.detach()
        raise _Unfit("busy with signals or restartable sequences")

    def _must_go_on(self, found: Stop) -> bool:
        """Its process is being stopped, and has a descriptor to close: the thread makes that call before it stops."""
        return found.kind == "group" and self._number >= 0

    def _in_sequence(self) -> bool:
        """It is within a restartable sequence (rseq(2)), perhaps: the kernel would not know that it was moved on."""
        pointer = self._thread.restartable_sequences()
        try:
            return bool(pointer) and read_memory(self._pid, pointer + 8, 8) != bytes(8)     # type: ignore[operator]
        except OSError:
            return True

    def _call(self, number: int, argument: int, at_end: Callable[[int], None]) -> int:
        """Its result. The thread stands still before and after it, with its own registers."""
        for _ in range(_TRIES):
            saved = self._thread.registers()
            address, before, registers = self._prepare(saved, number, argument)
            step("inject-frame")
            result: int | None = None
            self._thread.set_registers(registers)
            step("inject-set")
            self._thread.run_to_call()
            found = self._wait()
            if found.kind == "syscall":
                step("inject-entered")
                self._thread.run_to_call()
                found = self._wait()
                if found.kind == "syscall":
                    result = self._result(number)
                    step("inject-made")
                    at_end(result)
                    self._thread.interrupt()
                    self._thread.run()
                    found = self._wait()
                    step("inject-returned")
            # Where the thread stands now, the kernel has a call that was interrupted go on.
            self._thread.set_registers(saved)
            step("inject-restored")
            write_memory(self._pid, address, before)
            if found.kind == "group" and not self._must_go_on(found):
                self._thread.detach()
                raise Refused(f"process {self._pid} is being stopped by a signal (SIGCONT lets it go on)")
            if found.kind == "signal":
                self._stopped += time.monotonic() - self._since
                self._thread.run(found.signal)
                self._stop()
            if result is not None:
                return result
        self._thread.detach()
        raise _Unfit("busy with signals")

    def _prepare(self, saved: Registers, number: int, argument: int) -> tuple[int, bytes, Registers]:
        """The frame is written: (its address, what was there, the registers for the call). Detached where it cannot
        be."""
        try:
            state = self._thread.extended_state()
            if self._thread.dispatches_calls():
                raise _Unfit("one whose system calls are signals to it (syscall user dispatch)")
            if reason := stack_unfit(saved, self._there, self._main, frame_room(state)):
                raise _Unfit(reason)
            try:
                frame = build(saved, state, self._thread.blocked_signals(), self._gadgets.restorer)
            except ValueError as exc:
                raise _Unfit(f"one whose registers cannot be saved: {exc}") from None
            before = read_memory(self._pid, frame.address, len(frame.data))
            write_memory(self._pid, frame.address, frame.data)
        except (OSError, _Unfit) as exc:
            self._thread.detach()
            raise exc if isinstance(exc, _Unfit) else _Unfit(f"one whose stack cannot be written: {exc}") from None
        registers = saved.copy()
        registers.rip, registers.rsp = self._gadgets.call, frame.stack
        registers.rax, registers.orig_rax, registers.rdi = number, _NONE, argument
        return frame.address, before, registers

    def _result(self, number: int) -> int:
        """Of the call that the thread has just made; it must be the one."""
        found = self._thread.registers()
        if found.rip != self._gadgets.call + CALL_BYTES or found.orig_rax != number:
            raise Refused(f"thread {self._thread.tid} made another call than it was given: it goes on by itself")
        return int(found.rax) - (1 << 64 if found.rax >> 63 else 0)


def inject(process: ProcessId) -> Injected:
    """Raises Refused, and OSError, with nothing changed in the process. To be called in a process that has one
    thread and does nothing else: SIGALRM is used."""
    signal.signal(signal.SIGALRM, _late)
    try:
        pidfd = open_process(process)
    except ProcessLookupError:
        raise Refused(f"process {process.pid} has ended") from None
    try:
        return _with_any_thread(process, pidfd)
    except (Refused, OSError):      # whatever it failed of
        if not has_memory(process.pid):
            raise Refused(f"process {process.pid} has ended") from None
        raise
    finally:
        os.close(pidfd)


def _with_any_thread(process: ProcessId, pidfd: int) -> Injected:
    refused: Counter[str] = Counter()
    pid = process.pid
    there = mappings(pid)
    gadgets = find_gadgets(pid, there)
    if gadgets is None:
        raise Refused(f"process {pid} has no code that makes system calls and returns from signals as is needed "
                      + INSTEAD)
    found = candidates(pid, refused)
    _be_quick()
    for candidate in found:
        try:
            fd, stopped = _Injection(process, pidfd, candidate, gadgets, there).run()
        except _Unfit as exc:
            refused[str(exc)] += 1
        except Ended:
            refused["ended"] += 1
        else:
            return Injected(fd, candidate.tid, candidate.doing, candidate.interrupted, stopped)
    raise Refused(f"process {pid} cannot be watched: {why_none(refused)}")


def _be_quick() -> None:
    """The thread waits for this process five times: where the processors are busy, it is to come to its turn at once
    (median 1 ms rather than 5 for a thread that computes, on two cores with twenty that would run)."""
    with contextlib.suppress(OSError):
        set_time_slice(SERVICE_SLICE)
    with contextlib.suppress(OSError):      # needs CAP_SYS_NICE
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))


def main(arguments: list[str]) -> int:
    """PID, its start time, and the number of the socket that the descriptor goes into, with a line of JSON."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    pid, start, descriptor = map(int, arguments)
    with socket.socket(fileno=descriptor) as watcher:
        try:
            made = inject(ProcessId(pid, start))
        except (Refused, OSError) as exc:
            return _say(watcher, {"error": str(exc)}, [])
        step("inject-send")
        return _say(watcher, made._asdict() | {"error": ""}, [made.fd])


def _say(watcher: socket.socket, what: dict[str, object], descriptors: list[int]) -> int:
    with contextlib.suppress(OSError):      # the watcher has gone
        socket.send_fds(watcher, [json.dumps(what).encode()], descriptors)
    return 0
