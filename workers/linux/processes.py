"""Programs at work: processes and their threads, as data. What a thread is about to do is in a vCPU."""

from __future__ import annotations

import errno
import os
from dataclasses import astuple, dataclass, field
from typing import TYPE_CHECKING, Any

from .directories import Directory
from .openfiles import OpenFile
from .owners import ROOT, Ids
from .signals import CHLD, Action, SignalInfo
from .space import Space
from .timers import Timer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .state import Loading, Saving

__all__ = ["RESET_ON_FORK", "Descriptor", "FileTable", "Process", "Thread"]

RESET_ON_FORK = 0x4000_0000     # SCHED_RESET_ON_FORK
_FILES_MAX = 1024       # RLIMIT_NOFILE, as usual
_DEFAULT = Action()


@dataclass(slots=True)
class Descriptor:
    """What a number stands for in a process."""

    file: OpenFile
    close_on_exec: bool = False


class FileTable:
    """File descriptors: the lowest free number is given. ``owner``: the process whose record locks (fcntl(2)) go when
    it closes any descriptor of their file. Raises OSError."""

    def __init__(self, owner: int = 0) -> None:
        self.owner = owner
        self.users = 1          # processes that have it (CLONE_FILES)
        self._there: dict[int, Descriptor] = {}
        self.limit = _FILES_MAX

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._there))

    def get(self, number: int, *, path_only: bool = False) -> OpenFile:
        """``path_only``: one that was opened with O_PATH will do."""
        found = self.descriptor(number).file
        if found.path_only and not path_only:
            raise OSError(errno.EBADF, "")
        return found

    def descriptor(self, number: int) -> Descriptor:
        try:
            return self._there[number]
        except KeyError:
            raise OSError(errno.EBADF, "") from None

    def add(self, file: OpenFile, *, close_on_exec: bool = False, least: int = 0) -> int:
        """Its number. The table has the use of the file that the caller had."""
        number = least
        while number in self._there:
            number += 1
        if number >= self.limit:
            file.let_go()
            raise OSError(errno.EMFILE, "")
        self._there[number] = Descriptor(file, close_on_exec)
        return number

    def put(self, number: int, file: OpenFile, *, close_on_exec: bool = False) -> None:
        """Under this number, whatever was there."""
        if not 0 <= number < self.limit:
            file.let_go()
            raise OSError(errno.EBADF, "")
        if number in self._there:
            self.close(number)
        self._there[number] = Descriptor(file, close_on_exec)

    def close(self, number: int) -> None:
        self.descriptor(number)
        file = self._there.pop(number).file
        if file.inode.locks:
            file.inode.locks.unlock(self.owner)
        file.let_go()

    def close_all(self, *, on_exec: bool = False) -> None:
        for number in list(self._there):
            if not on_exec or self._there[number].close_on_exec:
                self.close(number)

    def copy(self, owner: int) -> FileTable:
        """For a fork."""
        copied = FileTable(owner)
        copied.limit = self.limit
        for number, each in self._there.items():
            each.file.keep()
            copied._there[number] = Descriptor(each.file, each.close_on_exec)
        return copied

    def save(self, saving: Saving) -> dict[str, Any]:
        return {"owner": self.owner, "limit": self.limit, "there": [[number, saving.file(each.file), each.close_on_exec]
                                               for number, each in self._there.items()]}

    @classmethod
    def load(cls, loading: Loading, saved: dict[str, Any]) -> FileTable:
        """Without its users, which follow."""
        found = cls(saved["owner"])
        found.users = 0
        found.limit = saved["limit"]
        found._there = {number: Descriptor(loading.files[file], close_on_exec)
                        for number, file, close_on_exec in saved["there"]}
        return found


@dataclass(eq=False)
class Process:
    """``code``: as wait(2) gives it, once it has ended; it is there until its parent has asked for that."""

    pid: int
    parent: int
    space: Space
    files: FileTable
    directory: Directory            # where relative paths begin; one use is the process's
    path: bytes = b""               # of its program
    name: bytes = b""               # 15 bytes at most: comm
    mask: int = 0o022               # umask
    group: int = 0
    session: int = 0
    threads: list[Thread] = field(default_factory=list)
    arguments: list[bytes] = field(default_factory=list)
    environment: list[bytes] = field(default_factory=list)
    limits: dict[int, tuple[int, int]] = field(default_factory=dict)
    actions: dict[int, Action] = field(default_factory=dict)    # by signal; default where there is none
    pending: list[SignalInfo] = field(default_factory=list)     # of the whole process, in the order of their coming
    code: int | None = None
    stopped: int = 0                # the signal that has stopped it; 0: it runs
    told: int = 0                   # a stop (the signal) or continuation (-1) that its parent has not asked for yet
    exit_signal: int = CHLD         # that its parent gets
    cpu_before: int = 0             # processor time of its threads that have ended, nanoseconds
    has_execed: bool = False        # since it was forked
    cpu_children: int = 0           # and of children that it has waited for
    alarm: tuple[int, int] = (0, 0)     # ITIMER_REAL: when (CLOCK_MONOTONIC, nanoseconds; 0: never), and how often
    timers: dict[int, Timer] = field(default_factory=dict)      # timer_create(2)
    next_timer: int = 0
    users: Ids = ROOT
    groups: Ids = ROOT
    more_groups: list[int] = field(default_factory=list)
    niceness: int = 0               # it has no effect
    persona: int = 0                # personality(2), nor has this
    settings: dict[int, int] = field(default_factory=dict)      # prctl(2): by PR_SET_*
    oom_adjustment: int = 0         # /proc/<pid>/oom_score_adj: nobody asks it when memory is used up

    @property
    def is_privileged(self) -> bool:
        """It may do what user 0 may."""
        return not self.users.effective

    def may_schedule(self, other: Process) -> bool:
        """Set its niceness, policy or processors: it is the same user's."""
        return self.is_privileged or self.users.effective in (other.users.real, other.users.effective)

    @property
    def cpu_ns(self) -> int:
        """Processor time of all of its threads."""
        return self.cpu_before + sum(each.cpu_ns for each in self.threads)

    def action(self, number: int) -> Action:
        return self.actions.get(number, _DEFAULT)

    def save(self, saving: Saving) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _PROCESS} | {
            "space": saving.space(self.space), "files": saving.table(self.files),
            "directory": saving.inode(self.directory), "threads": [each.save(saving) for each in self.threads],
            "arguments": list(self.arguments), "environment": list(self.environment),
            "users": list(astuple(self.users)), "groups": list(astuple(self.groups)),
            "more_groups": list(self.more_groups), "settings": [list(pair) for pair in self.settings.items()],
            "limits": [[which, *pair] for which, pair in self.limits.items()],
            "actions": [[number, *astuple(action)] for number, action in self.actions.items()],
            "pending": [list(astuple(each)) for each in self.pending], "alarm": list(self.alarm),
            "timers": [[number, *astuple(each)] for number, each in self.timers.items()]}

    @classmethod
    def load(cls, loading: Loading, saved: dict[str, Any]) -> Process:
        """Without what its threads wait for."""
        found = cls(space=loading.spaces[saved["space"]], files=loading.tables[saved["files"]],
                    directory=loading.directory(saved["directory"]), **{name: saved[name] for name in _PROCESS})
        found.threads = [Thread.load(loading, each, found) for each in saved["threads"]]
        found.arguments, found.environment = saved["arguments"], saved["environment"]
        found.users, found.groups, found.more_groups = Ids(*saved["users"]), Ids(*saved["groups"]), saved["more_groups"]
        found.settings = dict(saved["settings"])
        found.limits = {which: (soft, hard) for which, soft, hard in saved["limits"]}
        found.actions = {number: Action(*rest) for number, *rest in saved["actions"]}
        found.pending = [SignalInfo(*each) for each in saved["pending"]]
        at, interval = saved["alarm"]
        found.alarm = (at, interval)
        found.timers = {number: Timer(*rest) for number, *rest in saved["timers"]}
        return found


@dataclass(eq=False)
class Thread:
    """``fs_base``: given by arch_prctl(2), and where it is not None new to its vCPU."""

    tid: int
    process: Process
    name: bytes = b""
    blocked: int = 0                # signals, a bit each
    saved_mask: int | None = None   # what is blocked again once a handler has been called (sigsuspend, ppoll ...)
    policy: int = 0                 # SCHED_*, and a priority: the host does as it likes
    priority: int = 0
    pending: list[SignalInfo] = field(default_factory=list)
    awaited: int = 0                # signals that sigtimedwait(2) waits for
    alternate: bytes = b""          # struct stack_t
    clear_tid: int = 0              # address
    robust: tuple[int, int] = (0, 0)
    fs_base: int | None = None
    deadline: int | None = None     # CLOCK_MONOTONIC in nanoseconds, of the call that it is blocked in
    done: int = 0                   # bytes that this call has moved already
    vfork: Process | None = None    # the child that it waits for, until that has another program or has ended
    #: Registers as its vCPU will have them, while a call is served (ipc.programs.REGISTERS), and FS base.
    registers: memoryview | list[int] = field(default_factory=list)
    fs_now: int = 0
    cpu_ns: int = 0                 # processor time until its last call
    #: It goes on with ``registers``, not with a result; in another address space; with this XSAVE area.
    jumps: bool = False
    new_space: bool = False
    xsave: bytes | None = None
    lock_owner: int = 0             # that has what F_SETLKW waits for, as it was found last
    opening: OpenFile | None = None     # a fifo that it waits for the other end of
    ended: bool = False

    def be_scheduled_as(self, maker: Thread) -> None:
        if not maker.policy & RESET_ON_FORK:
            self.policy, self.priority = maker.policy, maker.priority

    def save(self, saving: Saving) -> dict[str, Any]:
        """Between two calls: what it has in its vCPU is not here."""
        return {name: getattr(self, name) for name in _THREAD} | {
            "pending": [list(astuple(each)) for each in self.pending], "robust": list(self.robust),
            "vfork": None if self.vfork is None else self.vfork.pid,
            "opening": None if self.opening is None else saving.file(self.opening)}

    @classmethod
    def load(cls, loading: Loading, saved: dict[str, Any], process: Process) -> Thread:
        """Without ``vfork``: its child may not be there yet."""
        found = cls(process=process, **{name: saved[name] for name in _THREAD})
        found.pending = [SignalInfo(*each) for each in saved["pending"]]
        head, size = saved["robust"]
        found.robust = (head, size)
        found.opening = None if saved["opening"] is None else loading.files[saved["opening"]]
        return found


#: What is saved of them as it is.
_PROCESS = ("pid", "parent", "path", "name", "mask", "group", "session", "code", "stopped", "told", "exit_signal",
            "cpu_before", "cpu_children", "next_timer", "oom_adjustment", "has_execed",
            "niceness", "persona")
_THREAD = ("tid", "name", "blocked", "saved_mask", "awaited", "alternate", "clear_tid", "fs_base", "deadline", "done",
           "fs_now", "cpu_ns", "policy", "priority")


def makes(flags: int) -> bool:
    """Whether openat(2) with these flags looks at its mode."""
    return bool(flags & (os.O_CREAT | (os.O_TMPFILE & ~os.O_DIRECTORY)))
