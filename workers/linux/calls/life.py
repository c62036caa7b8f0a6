"""Threads and processes that begin and end, and waiting for them."""

from __future__ import annotations

import errno
import stat
import struct
from dataclasses import replace
from typing import TYPE_CHECKING

from ipc.programs import REGISTERS

from .. import signals
from ..blocked import Blocked, Ended
from ..contents import Regular
from ..program import start
from ..space import SegmentationFault
from .identity import AT_EXEC, packed_usage
from .registry import served, signed32

if TYPE_CHECKING:
    from ..inodes import Inode
    from ..processes import Process, Thread
    from ..system import System

# uapi/linux/sched.h
_VM, _VFORK, _PARENT_SETTID, _THREAD, _SETTLS = 0x100, 0x4000, 0x10_0000, 0x1_0000, 0x8_0000
_CHILD_CLEARTID, _CHILD_SETTID, _FILES = 0x20_0000, 0x100_0000, 0x400
_PARENT = 0x8000
_NAMESPACES = 0x7E02_0000 | 0x80
# uapi/linux/wait.h
_NOHANG, _UNTRACED, _EXITED, _CONTINUED, _NOWAIT = 1, 2, 4, 8, 0x100_0000
_NOTHREAD, _WALL, _WCLONE = 0x2000_0000, 0x4000_0000, 0x8000_0000
_WAITID_OPTIONS = _NOHANG | _UNTRACED | _EXITED | _CONTINUED | _NOWAIT | _NOTHREAD | _WALL | _WCLONE
_P_ALL, _P_PID, _P_PGID = 0, 1, 2
_WAITED = 28                # bytes of siginfo, up to si_status
_STOPPED_CODE, _CONTINUED_CODE = 0x7F, 0xFFFF
_TEXT_MAX = 128 << 10       # MAX_ARG_STRLEN
_WORDS_MAX = 256 << 10
_RAX, _RSP = REGISTERS.index("rax"), REGISTERS.index("rsp")


@served("exit")
def exit_(system: System, thread: Thread, code: int, *_: int) -> int:
    system.end_thread(thread, code & 255)
    raise Ended


@served("exit_group")
def exit_group(system: System, thread: Thread, code: int, *_: int) -> int:
    system.end_process(thread.process, (code & 255) << 8)
    raise Ended


# --- threads and children -------------------------------------------------------------------------------------------


@served("clone")
def clone(system: System, thread: Thread, flags: int, stack: int, parent_tid: int, child_tid: int, tls: int,
          *_: int) -> int:
    """As far as pthread_create, fork, vfork and posix_spawn go."""
    if thread.vfork is not None:
        raise Blocked(on=(thread.vfork,))
    if thread.done:         # vfork: the child has gone its way
        return thread.done
    if flags & _NAMESPACES or (flags & _THREAD and not flags & _VM):
        raise OSError(errno.EINVAL, "")
    if not system.launcher.free_vcpus():
        system.refused += 1
        raise OSError(errno.EAGAIN, "")
    if flags & _THREAD:
        made = system.new_thread(thread.process, thread.name)
        made.blocked = thread.blocked
        made.be_scheduled_as(thread)
    else:
        made = system.fork(thread, share=bool(flags & _VM), exit_signal=flags & 0xFF, share_files=bool(flags & _FILES))
        if flags & _PARENT:
            made.process.parent = thread.process.parent
    space = thread.process.space
    if flags & _PARENT_SETTID:
        space.write(parent_tid, struct.pack("<I", made.tid))
    if flags & _CHILD_SETTID:
        made.process.space.write(child_tid, struct.pack("<I", made.tid))
    if flags & _CHILD_CLEARTID:
        made.clear_tid = child_tid
    registers = list(thread.registers)
    registers[_RAX] = 0
    if stack:
        registers[_RSP] = stack
    system.launcher.launch(made, registers, tls if flags & _SETTLS else thread.fs_now)
    if not flags & _THREAD and len(thread.process.threads) > 1:
        for other in thread.process.threads:        # a futex that they wait on may be in another frame soon
            if other is not thread:
                system.launcher.look_at(other)
    if flags & _VFORK:
        thread.done, thread.vfork = made.tid, made.process
        raise Blocked(on=(made.process,))
    return made.tid


@served("clone3", "rseq")
def without(system: System, thread: Thread, *_: int) -> int:
    """Every C library does without them."""
    raise OSError(errno.ENOSYS, "")


@served("fork")
def fork(system: System, thread: Thread, *_: int) -> int:
    return clone(system, thread, signals.CHLD, 0, 0, 0, 0)


@served("vfork")
def vfork(system: System, thread: Thread, *_: int) -> int:
    return clone(system, thread, _VM | _VFORK | signals.CHLD, 0, 0, 0, 0)


# --- another program ------------------------------------------------------------------------------------------------


@served("execve")
def execve(system: System, thread: Thread, path: int, arguments: int, environment: int, *_: int) -> int:
    return _exec(system, thread, thread.process.directory, thread.process.space.text(path), arguments, environment)


@served("execveat")
def execveat(system: System, thread: Thread, fd: int, path: int, arguments: int, environment: int, flags: int,
             *_: int) -> int:
    text, number = thread.process.space.text(path), signed32(fd)
    at: Inode = thread.process.directory
    if number != -100 and not text.startswith(b"/"):
        at = thread.process.files.get(number, path_only=True).inode
    if not text and flags & 0x1000:
        raise OSError(errno.ENOSYS, "")
    return _exec(system, thread, at, text, arguments, environment)


def _exec(system: System, thread: Thread, at: Inode, path: bytes, arguments: int, environment: int) -> int:
    """The thread is the only one of its process afterwards, and the first."""
    process = thread.process
    argv, envp = _texts(thread, arguments), _texts(thread, environment)
    space = system.new_space()
    try:
        started = start(space, lambda name: system.executable(name, at), path, argv or [b""], envp,
                        random=system.files.store.random(16), vdso=system.vdso.map if system.vdso else None)
    except SegmentationFault:
        space.close()
        raise OSError(errno.ENOMEM, "") from None
    except BaseException:
        space.close()
        raise
    for other in list(process.threads):
        if other is not thread:
            system.end_thread(other, 0)
            system.launcher.look_at(other)
    if thread.tid != process.pid:
        system.threads.pop(thread.tid)
        system.threads[process.pid] = thread
        thread.tid = process.pid
    system.leave_space(process)
    process.space = space
    system.release_vfork(process)
    system.unshare_files(process)
    process.files.close_all(on_exec=True)
    process.actions = {number: action for number, action in process.actions.items() if action.ignores}
    process.timers.clear()
    process.has_execed = True
    for which in AT_EXEC:
        process.settings.pop(which, None)
    program = space.beginning.file if space.beginning else None
    if isinstance(program, Regular):
        process.users = process.users.at_exec(program.uid if program.mode & stat.S_ISUID else None)
        process.groups = process.groups.at_exec(program.gid if program.mode & stat.S_ISGID else None)
    thread.alternate, thread.clear_tid, thread.robust = b"", 0, (0, 0)
    system.name_program(process, started, path, argv, envp)
    thread.name = process.name
    for place, value in enumerate(started.registers()):
        thread.registers[place] = value
    thread.jumps = thread.new_space = True
    thread.xsave = signals.INIT_XSAVE
    return 0


def _texts(thread: Thread, address: int) -> list[bytes]:
    """A vector of strings, up to its null pointer."""
    found: list[bytes] = []
    while address:
        word, = struct.unpack("<Q", thread.process.space.read(address, 8))
        if not word:
            break
        if len(found) >= _WORDS_MAX:
            raise OSError(errno.E2BIG, "")
        try:
            found.append(thread.process.space.text(word, _TEXT_MAX))
        except OSError:
            raise OSError(errno.E2BIG, "") from None
        address += 8
    return found


# --- waiting --------------------------------------------------------------------------------------------------------


@served("wait4")
def wait4(system: System, thread: Thread, pid: int, status: int, options: int, usage: int, *_: int) -> int:
    options &= 0xFFFF_FFFF
    number = signed32(pid)
    if options & ~(_NOHANG | _UNTRACED | _CONTINUED | _NOTHREAD | _WALL | _WCLONE):
        raise OSError(errno.EINVAL, "")
    if number == -1 << 31:
        raise OSError(errno.ESRCH, "")
    group = 0 if number > 0 or number == -1 else -number or thread.process.group
    found = _changed(system, thread, number if number > 0 else 0, group, options | _EXITED)
    if found is None:
        return 0
    code = found.code
    if code is None:
        code = _CONTINUED_CODE if found.told < 0 else found.told << 8 | _STOPPED_CODE
    if status:
        thread.process.space.write(status, struct.pack("<I", code))
    if usage:
        thread.process.space.write(usage, packed_usage(found.cpu_ns + found.cpu_children))
    _taken(system, found)
    return found.pid


@served("waitid")
def waitid(system: System, thread: Thread, kind: int, number: int, address: int, options: int, usage: int,
           *_: int) -> int:
    kind, options, wanted = signed32(kind), options & 0xFFFF_FFFF, signed32(number)
    if options & ~_WAITID_OPTIONS or not options & (_EXITED | _UNTRACED | _CONTINUED):
        raise OSError(errno.EINVAL, "")
    if kind not in (_P_ALL, _P_PID, _P_PGID) or wanted < {_P_PID: 1, _P_PGID: 0}.get(kind, wanted):
        raise OSError(errno.EINVAL, "")
    group = (wanted or thread.process.group) if kind == _P_PGID else 0
    found = _changed(system, thread, wanted if kind == _P_PID else 0, group, options)
    if usage and found is not None:
        thread.process.space.write(usage, packed_usage(found.cpu_ns + found.cpu_children))
    if address:
        info = bytes(_WAITED) if found is None else replace(system.child_info(found), number=signals.CHLD).pack()
        thread.process.space.write(address, info[:12])
        thread.process.space.write(address + 16, info[16:_WAITED])
    if found is not None and not options & _NOWAIT:
        _taken(system, found)
    return 0


def _changed(system: System, thread: Thread, pid: int, group: int, options: int) -> Process | None:
    """A child about which there is something to tell; None with WNOHANG. Raises OSError and Blocked."""
    candidates = [each for each in system.children(thread.process)
                  if (not pid or each.pid == pid) and (not group or each.group == group) and _is_meant(each, options)]
    for each in candidates:
        if each.code is not None and options & _EXITED:
            return each
        if each.code is None and ((each.told > 0 and options & _UNTRACED) or (each.told < 0 and options & _CONTINUED)):
            return each
    if not candidates:
        raise OSError(errno.ECHILD, "")
    if options & _NOHANG:
        return None
    raise Blocked(on=(("children", thread.process.pid),))


def _is_meant(child: Process, options: int) -> bool:
    """Children that end with another signal than SIGCHLD are for those who ask for them."""
    return bool(options & _WALL) or (child.exit_signal != signals.CHLD) == bool(options & _WCLONE)


def _taken(system: System, process: Process) -> None:
    if process.code is not None:
        system.reap(process)
    else:
        process.told = 0


# --- groups and sessions --------------------------------------------------------------------------------------------


@served("setpgid")
def setpgid(system: System, thread: Thread, pid: int, group: int, *_: int) -> int:
    caller, wanted = thread.process, signed32(group)
    if wanted < 0:
        raise OSError(errno.EINVAL, "")
    process = system.processes.get(signed32(pid) or caller.pid)
    if process is None or (process is not caller and process.parent != caller.pid):
        raise OSError(errno.ESRCH, "")
    if process.session != caller.session:
        raise OSError(errno.EPERM, "")
    if process is not caller and process.has_execed:
        raise OSError(errno.EACCES, "")
    if process.pid == process.session or not (
            wanted in (0, process.pid) or system.has_group(wanted, process.session)):
        raise OSError(errno.EPERM, "")
    process.group = wanted or process.pid
    return 0


@served("setsid")
def setsid(system: System, thread: Thread, *_: int) -> int:
    process = thread.process
    if system.has_group(process.pid):
        raise OSError(errno.EPERM, "")
    process.session = process.group = process.pid
    return process.pid
