"""Processes and threads: how they come, how they end, who waits for whom, and who is sent what signal."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from typing import Protocol

from ipc.linux import futex

from . import signals
from .processes import Process, Thread
from .signals import Action, Default, SignalInfo, bit, is_pending
from .space import SegmentationFault, Space

__all__ = ["CHILD_SUBREAPER", "FIRST_PID", "PDEATHSIG", "Launcher", "Population"]

FIRST_PID = 1
_ROBUST_MOST = 2048     # ROBUST_LIST_LIMIT
_TID_MASK, _OWNER_DIED, _WAITERS = 0x3FFF_FFFF, 0x4000_0000, 0x8000_0000      # uapi/linux/futex.h
_CLD_EXITED, _CLD_KILLED, _CLD_DUMPED, _CLD_STOPPED, _CLD_CONTINUED = 1, 2, 3, 5, 6
PDEATHSIG, CHILD_SUBREAPER = 1, 36          # PR_SET_*: what is done for those who ask for it
SI_USER, SI_KERNEL, SI_TKILL, SI_TIMER = 0, 0x80, -6, -2


class Launcher(Protocol):
    """Who has the vCPUs."""

    def free_vcpus(self) -> int:
        """Those without a thread."""

    def launch(self, thread: Thread, registers: Sequence[int], fs_base: int) -> None:
        """Have it run on one of them."""

    def look_at(self, thread: Thread) -> None:
        """It has a signal to take, or has ended: have it come to its system, from wherever it is."""

    def forget_space(self, space: Space) -> None:
        """It is closed: nobody may keep translations of it."""

    def forget_tables(self) -> None:
        """Nobody may keep anything that was read of page tables."""

    def host_address(self, frame: int, offset: int) -> int:
        """Of guest memory, in this process (for futexes)."""

    def wrote(self, frame: int) -> None:
        """It was written to by that address."""


class Population:
    """``launcher``: before a thread is made."""

    launcher: Launcher

    def __init__(self) -> None:
        self.processes: dict[int, Process] = {}
        self.threads: dict[int, Thread] = {}
        self.next_id = FIRST_PID
        #: What has changed since somebody looked: calls that are blocked on it can be made again.
        self.notified: set[Hashable] = set()
        #: How the first process has ended, as wait(2) gives it.
        self.code: int | None = None

    def notify(self, source: Hashable, events: int = 0) -> None:
        """Something about it has changed. ``events``: what can have become possible, as poll(2) says it (0: all)."""
        self.notified.add(source)

    def process(self, pid: int) -> Process:
        """One that has not ended. Raises OSError (ESRCH)."""
        found = self.processes.get(pid)
        if found is None or found.code is not None:
            raise OSError(errno.ESRCH, "")
        return found

    def thread(self, tid: int) -> Thread:
        """Raises OSError (ESRCH)."""
        found = self.threads.get(tid)
        if found is None:
            raise OSError(errno.ESRCH, "")
        return found

    def children(self, process: Process) -> Iterator[Process]:
        """Those that are there, also as zombies."""
        return (each for each in self.processes.values() if each.parent == process.pid)

    def has_group(self, group: int, session: int = 0) -> bool:
        """There is such a group, in this session if one is given."""
        return any(each.group == group and session in (0, each.session) for each in self.processes.values())

    def new_id(self) -> int:
        while self.next_id in self.threads or self.next_id in self.processes:
            self.next_id = self.next_id % 0x3F_FFFF + 1
        found = self.next_id
        self.next_id = self.next_id % 0x3F_FFFF + 1
        return found

    # --- beginnings -------------------------------------------------------------------------------------------------

    def new_thread(self, process: Process, name: bytes, tid: int = 0) -> Thread:
        thread = Thread(tid or self.new_id(), process, name)
        process.threads.append(thread)
        self.threads[thread.tid] = thread
        return thread

    def fork(self, thread: Thread, *, share: bool, exit_signal: int,
             share_files: bool = False) -> Thread:
        """The child's thread; ``share``: it has the same address space (vfork). Raises OSError, NoFrames, NoTables."""
        parent = thread.process
        if share:
            space = parent.space
            space.users += 1
        else:
            space = parent.space.fork()
        pid = self.new_id()
        parent.directory.keep()
        files = parent.files if share_files else parent.files.copy(pid)
        files.users += share_files
        child = Process(pid, parent.pid, space, files, parent.directory, parent.path, parent.name, parent.mask,
                        parent.group, parent.session, limits=dict(parent.limits), actions=dict(parent.actions),
                        exit_signal=exit_signal, oom_adjustment=parent.oom_adjustment)
        child.arguments, child.environment = parent.arguments, parent.environment
        child.users, child.groups, child.more_groups = parent.users, parent.groups, list(parent.more_groups)
        child.settings = {which: value for which, value in parent.settings.items()
                          if which not in (PDEATHSIG, CHILD_SUBREAPER)}
        child.niceness, child.persona = parent.niceness, parent.persona
        self.processes[pid] = child
        made = self.new_thread(child, thread.name, pid)
        made.blocked, made.alternate = thread.blocked, thread.alternate
        made.be_scheduled_as(thread)
        return made

    def leave_space(self, process: Process) -> None:
        """The process has no address space, or another one, from now on."""
        space = process.space
        space.users -= 1
        if not space.users:
            space.close()
            self.launcher.forget_space(space)

    # --- ends -------------------------------------------------------------------------------------------------------

    def end_thread(self, thread: Thread, code: int) -> None:
        """exit(2)."""
        process = thread.process
        if len(process.threads) == 1:
            self.end_process(process, code << 8)
            return
        self._leave(thread)
        process.threads.remove(thread)

    def end_process(self, process: Process, code: int) -> None:
        """``code`` as wait(2) gives it. Its threads have ended, wherever they are."""
        if process.code is not None:
            return
        for thread in list(process.threads):
            self._leave(thread)
            self.launcher.look_at(thread)
        process.code = code
        process.threads.clear()
        process.timers.clear()
        self.leave_files(process)
        process.directory.let_go()
        self.release_vfork(process)
        self.leave_space(process)
        first = self.processes.get(FIRST_PID)
        for child in list(self.children(process)):
            child.parent = self._heir(process) if child is not first else 0
            if child.code is not None:
                self._tell_parent(child)
            elif child.settings.get(PDEATHSIG):
                self.signal_process(child, SignalInfo(child.settings[PDEATHSIG], SI_USER, process.pid))
        if process.pid == FIRST_PID:
            self.code = code
            for each in list(self.processes.values()):
                self.end_process(each, signals.KILL)
            return
        self._tell_parent(process)

    def _heir(self, process: Process) -> int:
        """Who gets the children of one that has ended."""
        above = self.processes.get(process.parent)
        for _ in range(len(self.processes)):
            if above is None or (above.settings.get(CHILD_SUBREAPER) and above.code is None):
                break
            above = self.processes.get(above.parent)
        return FIRST_PID if above is None else above.pid

    def leave_files(self, process: Process) -> None:
        """The process has no descriptors, or others, from now on. Whoever waits for a lock may get it."""
        files = process.files
        files.users -= 1
        if not files.users:
            for number in files:
                self.notify(files.get(number, path_only=True).inode)
            files.close_all()

    def unshare_files(self, process: Process) -> None:
        """Its descriptors are its own from now on."""
        if process.files.users > 1:
            files = process.files.copy(process.pid)
            self.leave_files(process)
            process.files = files

    def would_wait_forever(self, owner: int, holder: int) -> bool:
        """Whether the holder of a lock of fcntl(2) waits for one of the owner's, perhaps by way of others."""
        for _ in range(len(self.processes)):
            if holder == owner:
                return True
            holder = next((each.lock_owner for each in self.threads.values()
                           if each.lock_owner and each.process.files.owner == holder), 0)
            if holder <= 0:         # nobody, or an open file (of those nobody knows)
                return False
        return False

    def release_vfork(self, process: Process) -> None:
        """Its parent, which waits in vfork(2), goes on."""
        for thread in self.threads.values():
            if thread.vfork is process:
                thread.vfork = None
                self.notify(process)

    def _leave(self, thread: Thread) -> None:
        """What it owes to those that share its memory."""
        if thread.ended:
            return
        thread.ended = True
        thread.process.cpu_before += thread.cpu_ns
        thread.cpu_ns = 0
        self.threads.pop(thread.tid, None)
        try:
            self._give_up_robust(thread)
            if thread.clear_tid:
                thread.process.space.write(thread.clear_tid, bytes(4))
                self.wake_futex(thread.process.space, thread.clear_tid, 1)
        except SegmentationFault:
            pass

    def _give_up_robust(self, thread: Thread) -> None:
        """Locks that it holds still (Documentation/locking/robust-futexes.rst). Raises SegmentationFault."""
        head, _ = thread.robust
        if not head:
            return
        space = thread.process.space
        entry, offset, waited = struct.unpack("<QqQ", space.read(head, 24))
        for _ in range(_ROBUST_MOST):
            if entry & ~1 == head or not entry:
                break
            following, = struct.unpack("<Q", space.read(entry & ~1, 8))
            if entry != waited:
                self._owner_died(thread, (entry & ~1) + offset)
            entry = following
        if waited:
            self._owner_died(thread, (waited & ~1) + offset)

    def _owner_died(self, thread: Thread, address: int) -> None:
        space = thread.process.space
        word, = struct.unpack("<I", space.read(address, 4))
        if word & _TID_MASK != thread.tid:
            return
        space.write(address, struct.pack("<I", word & _WAITERS | _OWNER_DIED))
        if word & _WAITERS:
            self.wake_futex(space, address, 1)

    def wake_futex(self, space: Space, address: int, count: int) -> None:
        """Raises SegmentationFault."""
        frame, offset = space.place_of(address)
        futex.wake(self.launcher.host_address(frame, offset), count)

    # --- parents and children ---------------------------------------------------------------------------------------

    def _tell_parent(self, process: Process) -> None:
        """That it has ended."""
        parent = self.processes.get(process.parent)
        self.notify(("children", process.parent))
        if parent is None or parent.code is not None:
            del self.processes[process.pid]
            return
        action = parent.action(signals.CHLD)
        if process.exit_signal == signals.CHLD and (action.ignores or action.flags & signals.NOCLDWAIT):
            del self.processes[process.pid]
        if process.exit_signal and not action.ignores:
            self.signal_process(parent, self.child_info(process))

    @staticmethod
    def child_info(process: Process) -> SignalInfo:
        """What is known about a child that has ended, stopped, or goes on."""
        number = process.exit_signal or signals.CHLD
        code = process.code
        if code is None:
            what, status = (_CLD_CONTINUED, signals.CONT) if process.told < 0 else (_CLD_STOPPED, process.told)
        elif code & 0x7F:
            what, status = (_CLD_DUMPED if code & 0x80 else _CLD_KILLED), code & 0x7F
        else:
            what, status = _CLD_EXITED, code >> 8
        return SignalInfo(number, what, process.pid, process.users.real, status)

    def reap(self, process: Process) -> None:
        """A zombie that its parent has asked for."""
        parent = self.processes.get(process.parent)
        if parent is not None:
            parent.cpu_children += process.cpu_ns + process.cpu_children
        del self.processes[process.pid]

    # --- signals ----------------------------------------------------------------------------------------------------

    def signal_process(self, process: Process, info: SignalInfo) -> None:
        """Any of its threads that does not block it takes it."""
        if process.code is not None:
            return
        number = info.number
        if self._acts_at_once(process, number) or self._is_ignored(process, number):
            return
        if is_pending(number, process.pending):
            return
        process.pending.append(info)
        for thread in process.threads:
            if (bit(number) & thread.awaited) or not thread.blocked & bit(number):
                self.launcher.look_at(thread)
                return

    def signal_thread(self, thread: Thread, info: SignalInfo) -> None:
        process, number = thread.process, info.number
        if thread.ended or self._acts_at_once(process, number) or self._is_ignored(process, number, thread):
            return
        if is_pending(number, thread.pending):
            return
        thread.pending.append(info)
        if (bit(number) & thread.awaited) or not thread.blocked & bit(number):
            self.launcher.look_at(thread)

    def raise_signal(self, thread: Thread, number: int) -> None:
        """For what it has just done (SIGPIPE)."""
        self.signal_thread(thread, SignalInfo(number, SI_USER, thread.process.pid, thread.process.users.real))

    def signal_group(self, group: int, number: int) -> None:
        """All processes of a group."""
        for process in list(self.processes.values()):
            if process.group == group:
                self.signal_process(process, SignalInfo(number, SI_KERNEL))

    def force(self, thread: Thread, info: SignalInfo) -> None:
        """A fault of its own: blocked or ignored, it ends the process."""
        process, number = thread.process, info.number
        action = process.action(number)
        if thread.blocked & bit(number) or action.ignores:
            process.actions[number] = action.as_default()
            thread.blocked &= ~bit(number)
        thread.pending.insert(0, info)

    def refuse_frame(self, thread: Thread, number: int) -> None:
        """There is no room for that of this signal's handler: a fault of its own."""
        if number == signals.SEGV:
            thread.process.actions[number] = thread.process.action(number).as_default()
        self.force(thread, SignalInfo(signals.SEGV, SI_KERNEL))

    def _is_ignored(self, process: Process, number: int, thread: Thread | None = None) -> bool:
        """At once, where nobody has blocked it."""
        action = process.action(number)
        if not action.ignores and not (action.is_default and signals.default_of(number) is Default.IGNORE):
            # The first process is what the machine is for: it has no one to protect it from itself, as init has not.
            return False
        threads = process.threads if thread is None else [thread]
        return not any((each.blocked | each.awaited) & bit(number) for each in threads)

    def _acts_at_once(self, process: Process, number: int) -> bool:
        """Stops and continuations; SIGKILL; whether that is all."""
        if number == signals.KILL:
            self.end_process(process, signals.KILL)
            return True
        if number == signals.CONT:
            self.discard_signals(process, signals.STOPPING)
            if process.stopped:
                process.stopped, process.told = 0, -1
                self._tell_of_stop(process)
                for thread in process.threads:
                    self.launcher.look_at(thread)
        return False

    @staticmethod
    def discard_signals(process: Process, numbers: Collection[int]) -> None:
        """Those that are pending are so no more."""
        for pending in (process.pending, *(each.pending for each in process.threads)):
            pending[:] = [each for each in pending if each.number not in numbers]
        for timer in process.timers.values():
            if timer.number in numbers:
                timer.pending = False

    def stop(self, process: Process, number: int) -> None:
        """Its threads stay where they are until SIGCONT."""
        process.stopped = process.told = number
        for thread in process.threads:
            self.launcher.look_at(thread)
        self._tell_of_stop(process)

    def _tell_of_stop(self, process: Process) -> None:
        parent = self.processes.get(process.parent)
        self.notify(("children", process.parent))
        if parent is not None and not parent.action(signals.CHLD).flags & signals.NOCLDSTOP:
            self.signal_process(parent, self.child_info(process))

    @staticmethod
    def deliverable(thread: Thread) -> bool:
        """It has a signal to take that it does not block."""
        mine, all_ = thread.pending, thread.process.pending
        return bool(mine or all_) and any(not thread.blocked & bit(each.number) for each in (*mine, *all_))

    def take_signal(self, thread: Thread, wanted: int) -> SignalInfo | None:
        """The first of those in ``wanted``: its own before its process', faults before others, by number. It is pending
        no more."""
        for pending in (thread.pending, thread.process.pending):
            found = min((each for each in pending if wanted & bit(each.number)), key=_order, default=None)
            if found is not None:
                pending.remove(found)
                return found
        return None

    def act(self, thread: Thread, jump: Callable[[SignalInfo, Action], None]) -> bool:
        """Take the signals that the thread does not block, until one has a handler, for which ``jump`` is called. False
        where it does not go on: it has ended or stopped."""
        process = thread.process
        while not thread.ended and not process.stopped:
            info = self.take_signal(thread, signals.ALL & ~thread.blocked)
            if info is None:
                break
            action = process.action(info.number)
            if action.ignores:
                continue
            if not action.is_default:
                if action.flags & signals.RESETHAND:
                    process.actions[info.number] = action.as_default()
                jump(info, action)
                return True
            what = signals.default_of(info.number)
            if what is Default.END:
                self.end_process(process, signals.wait_code(info.number))
            elif what is Default.STOP:
                self.stop(process, info.number)
        return not thread.ended and not process.stopped


def _order(info: SignalInfo) -> tuple[bool, int]:
    return not info.is_fault, info.number
