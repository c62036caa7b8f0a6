"""userfaultfd(2): missing pages of a shared mapping, filled by another process; and the protection against
writing that ipc/writelog.py is built on.

Numbers and structures of Linux ``uapi/linux/userfaultfd.h`` are here and nowhere else. An fd belongs to the
mapping of the process that made it, wherever it is sent: a worker registers its own mapping and gives the fd to
whoever fills the pages.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from types import TracebackType
from typing import NamedTuple

from .linux.libc import LIBC, SYS_USERFAULTFD, check
from .shm import PAGE_SIZE

__all__ = ["MISSING", "WRITE_ASYNC", "Use", "Userfault", "UserfaultError", "post_copy_missing"]

_API = 0xAA
_UFFDIO_API = 0xC018AA3F
_UFFDIO_REGISTER = 0xC020AA00
_UFFDIO_UNREGISTER = 0x8010AA01
_UFFDIO_WAKE = 0x8010AA02
_UFFDIO_COPY = 0xC028AA03
_USER_MODE_ONLY = 1
_EVENT_PAGEFAULT = 0x12
_MSG_SIZE = 32


class UserfaultError(Exception):
    """The kernel has no such thing, or does not let this user; the text is fit for a user. ``number``: errno, where
    one call failed."""

    def __init__(self, text: str, number: int = 0) -> None:
        super().__init__(text)
        self.number = number


class _Api(ctypes.Structure):
    _fields_ = [("api", ctypes.c_uint64), ("features", ctypes.c_uint64), ("ioctls", ctypes.c_uint64)]


class _Range(ctypes.Structure):
    _fields_ = [("start", ctypes.c_uint64), ("len", ctypes.c_uint64)]


class _Register(ctypes.Structure):
    _fields_ = [("range", _Range), ("mode", ctypes.c_uint64), ("ioctls", ctypes.c_uint64)]


class _Copy(ctypes.Structure):
    _fields_ = [("dst", ctypes.c_uint64), ("src", ctypes.c_uint64), ("len", ctypes.c_uint64),
                ("mode", ctypes.c_uint64), ("copy", ctypes.c_int64)]


class Use(NamedTuple):
    """What a userfaultfd is for."""

    flags: int          # of the system call
    features: int       # UFFD_FEATURE_*
    mode: int           # UFFDIO_REGISTER_MODE_*
    what: str           # that a kernel without these features lacks


#: Accesses to missing pages wait until somebody has filled them. UFFD_FEATURE_MISSING_SHMEM.
MISSING = Use(0, 1 << 5, 1, "missing pages of shared memory")
#: The first write to a protected page lifts its protection; nobody is told, nobody waits. WP_HUGETLBFS_SHMEM,
#: WP_UNPOPULATED (holes are protected too), WP_ASYNC. As the kernel settles such a fault by itself, faults within
#: the kernel (KVM's) need no privilege: USER_MODE_ONLY.
WRITE_ASYNC = Use(_USER_MODE_ONLY, 1 << 12 | 1 << 13 | 1 << 15, 2, "asynchronous write-protection of shared memory")


class Userfault:
    """Owns one userfaultfd."""

    def __init__(self, fd: int, use: Use = MISSING) -> None:
        self.fd = fd
        self._use = use

    @classmethod
    def make(cls, use: Use = MISSING) -> Userfault:
        """Of this process. Raises UserfaultError."""
        try:
            fd = check(LIBC.syscall(SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK | use.flags))
        except OSError as exc:
            advice = (" (needs root, CAP_SYS_PTRACE, or sysctl vm.unprivileged_userfaultfd=1)"
                      if exc.errno == errno.EPERM else "")
            raise UserfaultError(f"userfaultfd: {exc.strerror}{advice}") from None
        return cls.adopt(fd, use)

    @classmethod
    def adopt(cls, fd: int, use: Use) -> Userfault:
        """A fresh one of whatever process, which this is to own: what is registered are mappings of that process.
        It is closed where it raises UserfaultError."""
        found = cls(fd, use)
        try:
            fcntl.ioctl(fd, _UFFDIO_API, _Api(_API, use.features))
        except OSError as exc:
            found.close()
            raise UserfaultError(f"userfaultfd: this kernel lacks {use.what}: {exc.strerror}") from None
        return found

    def register(self, address: int, size: int) -> None:
        """From now on for this mapping of the process. (MISSING: accesses to missing pages wait, and are told by
        ``faults``.) Raises UserfaultError."""
        try:
            fcntl.ioctl(self.fd, _UFFDIO_REGISTER, _Register(_Range(address, size), self._use.mode))
        except OSError as exc:
            raise UserfaultError(f"userfaultfd: a mapping cannot be registered: {exc.strerror}",
                                 exc.errno or 0) from None

    def unregister(self, address: int, size: int) -> None:
        """The mapping is an ordinary one again. Raises UserfaultError."""
        try:
            fcntl.ioctl(self.fd, _UFFDIO_UNREGISTER, _Range(address, size))
        except OSError as exc:
            raise UserfaultError(f"userfaultfd: a mapping cannot be unregistered: {exc.strerror}") from None

    def faults(self) -> list[int]:
        """Page addresses that were touched since the last call, as the registering process has them."""
        try:
            data = os.read(self.fd, 64 * _MSG_SIZE)
        except BlockingIOError:
            return []
        found = []
        for at in range(0, len(data), _MSG_SIZE):
            if data[at] == _EVENT_PAGEFAULT:
                found.append(int.from_bytes(data[at + 16:at + 24], "little") & ~(PAGE_SIZE - 1))
        return found

    def fill(self, address: int, source: int, size: int, *, holes: bool = False) -> None:
        """Put ``size`` bytes (whole pages) from this process's ``source`` to ``address``, each page at once, and
        wake who waits for them there. Pages that are there already are left as they are; with ``holes`` there must be
        none (EEXIST). Raises OSError."""
        done = 0
        while done < size:
            job = _Copy(address + done, source + done, size - done, 0, 0)
            try:
                fcntl.ioctl(self.fd, _UFFDIO_COPY, job)
                return
            except OSError as exc:
                if job.copy > 0:        # as far as it came
                    done += job.copy
                elif exc.errno == errno.EEXIST and not holes:
                    done += PAGE_SIZE
                elif exc.errno != errno.EAGAIN:
                    raise

    def wake(self, address: int) -> None:
        """Have whoever waits for this page look again. The process may have gone."""
        try:
            fcntl.ioctl(self.fd, _UFFDIO_WAKE, _Range(address, PAGE_SIZE))
        except OSError:
            pass

    def close(self) -> None:
        """Idempotent. The mappings are ordinary ones again."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Userfault:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 tb: TracebackType | None) -> None:
        self.close()


def post_copy_missing() -> str:
    """Why missing pages cannot be waited for on this host; empty when they can. By trying it."""
    try:
        Userfault.make().close()
    except UserfaultError as exc:
        return str(exc)
    return ""
