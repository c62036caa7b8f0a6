"""The keeper: a small process that outlives the coordinator, so that nothing else does.

``vmm launch`` starts it; it claims the machine's name, starts the coordinator and waits. Only a decision ends a
machine (docs/decisions/0011):

* The coordinator says that it is done (vmm/coordinator/entry.py) and ends: the keeper clears what may be left
  and passes on the exit status.
* The coordinator ends without having said so, killed or of an error of its own: the workers stand on their own, so
  another coordinator is started, which carries on (invariant 5). After too many such deaths within a minute the
  machine is torn down: whatever kills them is not going to stop.
* The launching process goes away before it has let the machine go, or says so, or the keeper gets SIGTERM: the
  machine ends in order. SIGQUIT (``vmm stop --force``): at once.
* The machine's runtime directory is removed, or its lock: the machine could no longer be reached, or its memory be
  taken for a leftover, and it ends in order.
* The keeper itself is killed: the kernel sends the coordinator SIGTERM, which ends the machine in
  order; were that one killed too, the workers see the end of the keeper's pipe, clear the files and
  go (workers/service.py).

It keeps the machine's log, too: the standard error of all these processes is a pipe to it (vmm/machine/log.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import select
import selectors
import signal
import socket
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from ipc import sandbox
from ipc.claims import Claim
from ipc.linux import inotify, process
from ipc.run import Fork

from ..errors import ExitCode, VmmError
from ..machine import records
from ..machine.log import LogFile
from ..machine.runtime import CONTINUES, END, KEEPER, LET_GO, PROGRAMS, claim, release
from .confine import confine

__all__ = ["Deaths", "main"]

# Another coordinator is of no use when so many in a row have died that were at work for less than so many seconds
# in all.
_LIVES = 6
_LIVED = 60.0
_END_TIMEOUT = 20.0         # seconds in which a coordinator must end that was told to, or has said that it will
_REAP_TIMEOUT = 5.0         # seconds for killed children to be gone
_READ = 64 << 10
_MODULE = "vmm.coordinator.keeper"


class Deaths:
    """Of coordinators, counted over the time in which there was one at work: a machine that runs for months may see
    many. How long each took to take over does not matter, be the host as slow as it may."""

    def __init__(self, lives: int, seconds: float) -> None:
        self._lived: deque[float] = deque(maxlen=lives)
        self._seconds = seconds

    def too_many(self, lived: float) -> bool:
        """One has died after ``lived`` seconds of work: have the last ``lives`` done less than ``seconds``?"""
        self._lived.append(lived)
        return len(self._lived) == self._lived.maxlen and sum(self._lived) < self._seconds


class Keeper:
    """``begin``, and then ``run`` it. ``programs``: the machine runs a Linux program. ``tell`` passes a line on to the
    process that launches the machine."""

    def __init__(self, name: str, taken: Claim, status_fd: int, life_fd: int, launcher: int, signals: int, *,
                 programs: bool) -> None:
        self._name = name
        self._claim = taken
        self._programs = programs
        self._spec = b""
        self._status_fd = status_fd
        self._life_fd = life_fd
        self._launcher_fd = os.pidfd_open(launcher) if os.getppid() == launcher else -1
        self._log = LogFile(None)
        self._log_error = ""
        self._coordinator: Fork | None = None
        self._answer_fd = self._spec_fd = -1    # what it says, and is told
        self._signals = signals
        # Only the keeper holds the write end: it closes when the keeper ends, however that happens.
        self._alive_read, self._alive_write = os.pipe2(os.O_CLOEXEC)
        self.log_read, self.log_write = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self.log_read, False)
        self._watch_fd = -1
        self._ready = False
        self._at_work_since: float | None = None    # monotonic seconds; of the present coordinator
        self._done: int | None = None       # the exit status that the coordinator has said to end with
        self._error = ""
        self._said = b""
        self._kill_at: float | None = None  # monotonic seconds; when the coordinator must have ended
        #: Why the machine is being ended; empty: it is not.
        self.ending = ""

    # --- the machine's life -----------------------------------------------------------------------

    def begin(self) -> None:
        """Start what a machine's other processes come from, whose imports take longer than all else."""
        from ipc import messages, sockets  # noqa: F401  (both of them need it: it is imported once)

        sandbox.missing()       # and this
        self._start_coordinator(recover=False)

    def run(self, spec: bytes, log: LogFile) -> tuple[int, str, str]:
        """Until the machine has ended: exit status, state (``ended``, or ``failed`` to start) and why."""
        self._spec, self._log = spec, log
        self._watch_directory()
        if self._launcher_fd < 0:
            self.ending = "the process that launched it has ended"
        deaths = Deaths(_LIVES, _LIVED)
        recover = False
        while not self.ending:
            if recover:
                self._start_coordinator(recover=True)
            how = self._run_coordinator(recover=recover)
            if self._done is not None:
                return self._done, "ended" if self._ready else "failed", self._error or self.ending
            if self.ending:
                break
            if not self._ready:
                return int(ExitCode.WORKER_DIED), "failed", f"the coordinator died during set-up ({how})"
            if deaths.too_many(0.0 if self._at_work_since is None else time.monotonic() - self._at_work_since):
                why = f"{_LIVES} coordinators died within {_LIVED:.0f} s of running time, the last one of {how}"
                return int(ExitCode.WORKER_DIED), "ended", why
            recover = True
            self.say("warning", f"the coordinator died ({how}); another one is taking over")
        return int(ExitCode.STOPPED), "ended" if self._ready else "failed", self.ending

    def _start_coordinator(self, *, recover: bool) -> None:
        keeper = os.getpid()
        self._answer_fd, write = os.pipe2(os.O_CLOEXEC)
        spec, self._spec_fd = os.pipe2(os.O_CLOEXEC)
        terminal = os.dup(sys.stderr.fileno())      # for trace events without a file
        inherited = [write, self._alive_read, self._claim.fd, terminal]
        with contextlib.ExitStack() as stack:
            for fd in (write, spec, terminal):
                stack.callback(os.close, fd)
            sock = -1
            if not recover:
                sock = stack.enter_context(self._start_zygote()).fileno()
                inherited.append(sock)
            self._coordinator = Fork(
                "vmm.coordinator.entry", str(write), str(self._alive_read), str(keeper), str(sock),
                str(self._claim.fd), str(terminal), shown=[self._name],
                streams=(spec, self.log_write, self.log_write), keep=inherited)

    def _start_zygote(self) -> socket.socket:
        """Its end of the socket is the coordinator's to inherit."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, open(os.devnull, "rb") as null:
            Fork("workers.zygote", str(theirs.fileno()), str(self._claim.belongings.directory),
                 *([PROGRAMS] if self._programs else []), shown=[self._name],
                 streams=(null.fileno(), self.log_write, self.log_write),
                 keep=(theirs.fileno(), self._alive_read), session=True)
        return ours

    def _run_coordinator(self, *, recover: bool) -> str:
        """Tell the one that was started what the machine is, and wait for its end; how it ended."""
        assert self._coordinator is not None
        with contextlib.suppress(BrokenPipeError), open(self._spec_fd, "wb") as pipe:
            pipe.write(self._spec)
        if not recover:     # while the coordinator is starting; those that take over start with it
            self._confine()
        pidfd = os.pidfd_open(self._coordinator.pid)
        try:
            code = self._watch(pidfd, self._answer_fd)
        finally:
            os.close(pidfd)
            os.close(self._answer_fd)
        return signal.Signals(-code).name if code < 0 else f"an error, exit status {code}"

    def _confine(self) -> None:
        """Or the machine does not start."""
        spec = json.loads(self._spec)
        try:
            confine(spec["image"], spec["replay_trace"], spec["trace_file"])
        except VmmError as exc:
            self._error = f"its keeper {exc}"
            self._log.say("error", self._error)
            self.tell({"error": self._error, "code": int(exc.exit_code)})
            self._end(self._error)

    def _watch(self, pidfd: int, answer_fd: int) -> int:
        """Until this coordinator has ended; its return code (negative: the signal that killed it)."""
        assert self._coordinator is not None
        self._said = b""
        self._at_work_since = None
        with selectors.PollSelector() as selector:
            for fd in (pidfd, answer_fd, self._signals, self.log_read, self._life_fd, self._launcher_fd,
                       self._watch_fd):
                if fd >= 0:
                    selector.register(fd, selectors.EVENT_READ)
            while True:
                ready = {key.fd for key, _ in selector.select(self._left())}
                if self._signals in ready:
                    for signum in os.read(self._signals, 64):
                        self._on_signal(signum)
                if self.log_read in ready:
                    self.read_log()
                if answer_fd in ready and not self._read_answer(answer_fd):
                    selector.unregister(answer_fd)
                if self._life_fd in ready or self._launcher_fd in ready:
                    selector.unregister(self._life_fd)
                    selector.unregister(self._launcher_fd)
                    self._part_from_launcher()
                if self._watch_fd in ready and (gone := self._watch_for.gone()) is not None:
                    selector.unregister(self._watch_fd)
                    self._watch_for.close()
                    self._watch_fd = -1
                    self._end(f"its {'lock' if gone == self._claim.belongings.lock_path else 'runtime directory'}"
                              " was removed")
                if self._left() == 0 and self._coordinator.poll() is None:
                    self.say("error", f"the coordinator did not end within {_END_TIMEOUT:.0f} s: killing it")
                    self._coordinator.kill()
                    self._kill_at = None
                if pidfd in ready:
                    while self._read_answer(answer_fd):     # what it has said before it ended
                        pass
                    return self._coordinator.wait()

    def _on_signal(self, signum: int) -> None:
        if signum == signal.SIGTERM:
            self._end("its keeper received SIGTERM")
        elif signum == signal.SIGQUIT:
            self._end("ended by force", at_once=True)

    def _part_from_launcher(self) -> None:
        """It has said its last word on the life pipe, or ended. (The pipe's end alone would not show that: children
        that it has forked have the other end too.)"""
        word = os.read(self._life_fd, 1) if select.select([self._life_fd], [], [], 0)[0] else b""
        for fd in (self._life_fd, self._launcher_fd):
            os.close(fd)
        self._life_fd = self._launcher_fd = -1
        if word != LET_GO:
            self._end(f"the process that launched it {'closed it' if word == END else 'has ended'}")

    def _read_answer(self, fd: int) -> bool:
        """What the coordinator says; False when that was all."""
        chunk = os.read(fd, _READ)
        *lines, self._said = (self._said + chunk).split(b"\n")
        for line in lines:
            self._heed(line)
        return bool(chunk)

    def _left(self) -> float | None:
        return None if self._kill_at is None else max(0.0, self._kill_at - time.monotonic())

    def _heed(self, line: bytes) -> None:
        """The coordinator says ``{"ready": …}`` or ``{"error": …, "code": n}``, once, and ``{"done": exit status}``
        before it ends the machine in order."""
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            return
        if "done" in answer:
            self._done = int(answer["done"])
            self._kill_at = time.monotonic() + _END_TIMEOUT
        if "error" in answer:
            self._error = str(answer["error"])
            self._log.say("error", self._error)
        if "memory" in answer:
            self.tell(answer)
        if "ready" in answer:
            self._at_work_since = time.monotonic()
        if self._ready:
            return      # a replacement's: nobody waits for it
        self._ready = "ready" in answer
        if self._ready or "error" in answer:
            self.tell(answer)

    def _end(self, why: str, *, at_once: bool = False) -> None:
        """Have the coordinator end the machine in order, or not at all in order."""
        coordinator = self._coordinator
        if self.ending and not at_once:
            return
        self.ending = why
        self._log.say("info", f"ending the machine: {why}")
        self._kill_at = time.monotonic() + _END_TIMEOUT
        if coordinator is not None and coordinator.poll() is None:
            if at_once:
                coordinator.kill()
            else:
                coordinator.terminate()

    def _watch_directory(self) -> None:
        """Without its directory the machine is out of reach, and without its lock its memory counts as left over."""
        directory = self._claim.belongings.directory
        try:
            # Cleaners of /tmp leave a directory alone that is locked (systemd.io/TEMPORARY_DIRECTORIES).
            fcntl.flock(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), fcntl.LOCK_SH)
            self._watch_for = inotify.RemovalWatch(directory, self._claim.belongings.lock_path)
            self._watch_fd = self._watch_for.fd
        except OSError as exc:
            self.say("warning", f"cannot watch the runtime directory: {exc.strerror}")

    # --- what is said -------------------------------------------------------------------------------

    def tell(self, answer: dict[str, Any]) -> None:
        """To the process that launches the machine, if it is still there."""
        with contextlib.suppress(OSError):
            os.write(self._status_fd, json.dumps(answer).encode() + b"\n")

    def say(self, level: str, text: str) -> None:
        """In the log, and on standard error: in the foreground that is the launching process's."""
        self._log.say(level, text)
        _print(f"vmm: machine '{self._name}': {text}")

    def read_log(self) -> None:
        """What has come from the other processes."""
        try:
            data = os.read(self.log_read, _READ)
        except BlockingIOError:
            return
        self._log.feed(data)
        if self._log.error and not self._log_error:
            _print(f"vmm: machine '{self._name}': cannot write its log ({self._log.error}); it keeps running")
            self._log_error = self._log.error

    def read_all_of_log(self) -> None:
        """At the end, with every process gone that could write."""
        os.close(self.log_write)
        while True:
            try:
                data = os.read(self.log_read, _READ)
            except BlockingIOError:     # another process has kept the other end open
                return
            if not data:
                return
            self._log.feed(data)


def _catch_signals() -> int:
    """A descriptor that gives the numbers of SIGTERM and SIGQUIT as they come. (Handlers of its own would run
    between any two steps of what goes on.)"""
    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for signum in (signal.SIGTERM, signal.SIGQUIT):
        signal.signal(signum, lambda *_: None)
    return read


def _print(text: str) -> None:
    """On standard error, unless that would have to wait for its reader."""
    if sys.stderr is None:      # it was closed when this process began
        return
    try:
        poll = select.poll()
        poll.register(sys.stderr.fileno(), select.POLLOUT)
        if any(event & select.POLLOUT for _, event in poll.poll(0)):
            print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        pass


def _kill_children(timeout: float) -> None:
    """Kill and reap whatever is left: the coordinator's workers came to us when it died."""
    deadline = time.monotonic() + timeout
    me = os.getpid()
    while time.monotonic() < deadline:
        children = Path(f"/proc/{me}/task/{me}/children").read_text().split()
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)
        try:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.002)
        except ChildProcessError:
            return


def _open_record(name: str, *, goes_on: bool) -> records.Record | str:
    """The machine's record, or why there is none: it runs all the same."""
    try:
        return records.Record(name, goes_on=goes_on)
    except (OSError, VmmError) as exc:
        return f"no log and no report will be kept: {exc}"


def main(argv: list[str]) -> int:
    """``vmm.coordinator.keeper NAME STATUS_FD LIFE_FD LAUNCHER_PID [programs]``; the machine's specification is on
    standard input. Where none comes, nothing of the machine is left. An empty NAME: it comes there too, in a line
    before (with ``programs``, and ``continues`` for a machine that was upgraded), and meanwhile everything is
    imported."""
    name, words = argv[0], argv[4:]
    status_fd, life_fd, launcher = (int(a) for a in argv[1:4])
    process.set_name(KEEPER)
    process.set_subreaper()
    process.no_new_privileges()
    process.raise_descriptor_limit()
    os.environ["OPENBLAS_NUM_THREADS"] = "1"    # of all that come from here: numpy's threads have nothing to do
    signals = _catch_signals()
    if not name:
        importlib.import_module("vmm.coordinator.loop")
        name, *words = sys.stdin.buffer.readline().decode().split() or [""]
        if not name:
            return int(ExitCode.STOPPED)
        process.set_command_line([_MODULE, name])
    try:
        taken = claim(name, continues=CONTINUES in words)
    except VmmError as exc:
        os.write(status_fd, json.dumps({"error": str(exc), "code": int(exc.exit_code)}).encode() + b"\n")
        return int(exc.exit_code)
    keeper = Keeper(name, taken, status_fd, life_fd, launcher, signals, programs=PROGRAMS in words)
    spec = b""
    try:
        keeper.begin()
        spec = sys.stdin.buffer.read()
    finally:
        if not spec:        # it has been given up
            _kill_children(_REAP_TIMEOUT)
            release(taken)
    if not spec:
        return int(ExitCode.STOPPED)
    record = _open_record(name, goes_on=CONTINUES in words)
    log = LogFile(record.log_path if isinstance(record, records.Record) else None)
    if isinstance(record, str):
        keeper.tell({"warning": record})
    code, state, why = int(ExitCode.BUG), "ended", "its keeper failed"
    try:
        code, state, why = keeper.run(spec, log)
    except Exception as exc:
        why = f"its keeper failed: {type(exc).__name__}: {exc}"
        raise
    finally:
        _kill_children(_REAP_TIMEOUT)
        keeper.read_all_of_log()
        log.say("info" if keeper.ending or not why else "error",
                f"{state}, exit status {code}" + (f": {why}" if why else ""))
        if isinstance(record, records.Record):
            _report(name, record, code, state, why, keeper.ending)
        log.close()
        if state == "failed":
            keeper.tell({"error": f"machine '{name}' did not start: {why}", "code": code})
        elif why and not keeper.ending:
            _print(f"vmm: machine '{name}': {why} (see vmm logs {name})")
        release(taken)
    return code


def _report(name: str, record: records.Record, code: int, state: str, why: str, ending: str) -> None:
    """The coordinator's own is better, where it could make one."""
    with contextlib.suppress(OSError, ValueError):
        if not record.reported:
            records.write_report(name, {"name": name, "state": state, "exit_code": code, "cause": why,
                                        "ended_at": records.now()})
        elif ending:
            record.explain(ending)
    record.close()
