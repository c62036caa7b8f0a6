"""Arguments and results of system calls as strace(1) shows them: numbers of files and counts in decimal, paths and what
is written as text, flags and addresses in hexadecimal."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from .abi import CALLS, number_of
from .calls.registry import signed, signed32
from .frames import NoFrames
from .space import SegmentationFault, Space
from .tables import NoTables

__all__ = ["Shown"]

#: A letter an argument: d file, p path, i int, l long, u unsigned, o octal, x flags, a address, v list of texts, w what
#: is written (the next argument says how much), r what was read (the result does). After a colon, the result.
_FORMS = (
    "read=dru write=dwu open=pxo close=d stat=pa fstat=da lstat=pa poll=aui lseek=dli mmap=auxxdl:x mprotect=aux "
    "munmap=au brk=a:x rt_sigaction=iaau rt_sigprocmask=iaau rt_sigreturn= ioctl=dxa pread64=drul pwrite64=dwul "
    "readv=dau writev=dau access=pi pipe=a select=iaaaa sched_yield= mremap=auuxa:x msync=aui madvise=aui dup=d "
    "dup2=dd pause= nanosleep=aa getitimer=aa alarm=i setitimer=iaa getpid= sendfile=ddau socket=iii connect=dau "
    "accept=daa sendto=dwuxau recvfrom=druxaa sendmsg=dax recvmsg=dax shutdown=di bind=dau listen=di getsockname=daa "
    "getpeername=daa socketpair=iiia setsockopt=diiau getsockopt=diiaa clone=xaaax fork= vfork= execve=pva exit=i "
    "wait4=iaxa kill=ii uname=a fcntl=dxx flock=dx fsync=d fdatasync=d truncate=pl ftruncate=dl getcwd=au chdir=p "
    "fchdir=d rename=pp mkdir=po rmdir=p creat=po link=pp unlink=p symlink=pp readlink=pru chmod=po fchmod=do "
    "chown=pii fchown=dii lchown=pii umask=i gettimeofday=aa getrlimit=ia getrusage=ia sysinfo=a times=a getuid= "
    "getgid= setuid=i setgid=i geteuid= getegid= setpgid=ii getppid= getpgrp= setsid= setreuid=ii setregid=ii "
    "getgroups=ia setgroups=ia setresuid=iii getresuid=aaa setresgid=iii getresgid=aaa getpgid=i setfsuid=i "
    "setfsgid=i getsid=i rt_sigpending=au rt_sigtimedwait=aaau rt_sigqueueinfo=iia rt_sigsuspend=au sigaltstack=aa "
    "mknod=pox statfs=pa fstatfs=da getpriority=ii setpriority=iii sched_setscheduler=iia mlock=au munlock=au "
    "mlockall=x prctl=iaaa arch_prctl=xa setrlimit=ia sync= gettid= tkill=ii time=a futex=aiiaai "
    "sched_setaffinity=iua sched_getaffinity=iua epoll_create=i getdents64=dau set_tid_address=a fadvise64=dlui "
    "clock_gettime=ia clock_getres=ia clock_nanosleep=ixaa exit_group=i epoll_wait=daii epoll_ctl=didx tgkill=iii "
    "waitid=iiaxa openat=dpxo mkdirat=dpo mknodat=dpox fchownat=dpiix newfstatat=dpax unlinkat=dpx renameat=dpdp "
    "linkat=dpdpx symlinkat=pdp readlinkat=dpru fchmodat=dpo faccessat=dpi pselect6=iaaaaa ppoll=auaau "
    "set_robust_list=au get_robust_list=iaa sync_file_range=dlux utimensat=dpax epoll_pwait=daiiau timerfd_create=ix "
    "timer_create=iaa timer_settime=ixaa timer_gettime=ia timer_getoverrun=i timer_delete=i "
    "eventfd=u fallocate=dxll timerfd_settime=dxaa timerfd_gettime=da accept4=daax eventfd2=ux epoll_create1=x "
    "dup3=ddx pipe2=ax preadv=daul pwritev=daul rt_tgsigqueueinfo=iiia recvmmsg=dauxa prlimit64=iiaa syncfs=d "
    "sendmmsg=daux getcpu=aaa renameat2=dpdpx getrandom=aux memfd_create=px execveat=dpvax membarrier=aux mlock2=aux "
    "statx=dpxxa rseq=auxx clone3=au close_range=uux faccessat2=dpix epoll_pwait2=daiaau")
_FORM = {number_of(name): form for name, _, form in (each.partition("=") for each in _FORMS.split())}
_UNKNOWN = "xxxxxx"

_TEXT_MOST = 32         # bytes that are shown of what is read and written
_PATH_MOST = 4096
_LIST_MOST = 32
_ERROR_MOST = 4095
_AT_FDCWD = -100
_ESCAPES = {ord("\n"): "\\n", ord("\t"): "\\t", ord("\r"): "\\r", ord('"'): '\\"', ord("\\"): "\\\\"}


class Shown:
    """A call that is about to be made: what it is given is read now, what it gives when it is over."""

    def __init__(self, space: Space, number: int, arguments: Sequence[int]) -> None:
        self.name = CALLS.get(number, f"syscall_{number:#x}")
        letters, _, self._result = _FORM.get(number, _UNKNOWN).partition(":")
        self._parts: list[str] = []
        self._read: tuple[int, int] | None = None       # (argument, address) of what it reads
        for at, letter in enumerate(letters):
            value = arguments[at]
            if letter == "r":
                self._read = at, value
            if letter == "w":
                self._parts.append(_data(space, value, arguments[at + 1]))
            else:
                self._parts.append(_argument(space, letter, value))

    def arguments(self, space: Space, result: int | None) -> str:
        """Of the call, with this result."""
        if self._read is not None and result is not None and result >= 0:
            at, address = self._read
            self._parts[at] = _data(space, address, result)
        return ", ".join(self._parts)

    def result(self, value: int | None) -> str:
        """``value``: negative for an error; None: the thread does not come back."""
        if value is None:
            return "?"
        error = self.error(value)
        if error:
            return f"-1 {error} ({os.strerror(-value)})"
        return f"{value:#x}" if self._result == "x" else str(value)

    @staticmethod
    def error(value: int | None) -> str:
        """The name of the error that it is; empty: none."""
        return errno.errorcode.get(-value, f"E{-value}") if value is not None and -_ERROR_MOST <= value < 0 else ""


def _argument(space: Space, letter: str, value: int) -> str:
    if letter == "d":
        return "AT_FDCWD" if signed32(value) == _AT_FDCWD else str(signed32(value))
    if letter == "i":
        return str(signed32(value))
    if letter == "l":
        return str(signed(value))
    if letter == "u":
        return str(value)
    if letter == "o":
        return f"0{value & 0xFFFF_FFFF:o}" if value else "0"
    if letter == "x":
        return f"{value:#x}"
    if value and letter in "pv":
        try:
            return _path(space, value) if letter == "p" else _texts(space, value)
        except (SegmentationFault, NoFrames, NoTables, OSError):
            pass
    return f"{value:#x}" if value else "NULL"


def _path(space: Space, address: int) -> str:
    return f'"{_escaped(space.text(address, _PATH_MOST))}"'


def _texts(space: Space, address: int) -> str:
    found: list[str] = []
    while len(found) < _LIST_MOST:
        place = int.from_bytes(space.read(address + 8 * len(found), 8), "little")
        if not place:
            return f"[{', '.join(found)}]"
        found.append(_path(space, place))
    return f"[{', '.join(found)}, ...]"


def _data(space: Space, address: int, count: int) -> str:
    try:
        text = _escaped(space.read(address, min(count, _TEXT_MOST)))
    except (SegmentationFault, NoFrames, NoTables):
        return f"{address:#x}" if address else "NULL"
    return f'"{text}"' + ("..." if count > _TEXT_MOST else "")


def _escaped(data: bytes) -> str:
    return "".join(_ESCAPES.get(byte) or (chr(byte) if 32 <= byte < 127 else f"\\{byte:o}") for byte in data)
