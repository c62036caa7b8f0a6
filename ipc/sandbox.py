"""What a process of a machine gives up before a guest runs: new privileges, files, the network, system calls.

A vCPU worker is what a guest would have broken into first, and needs least: its system calls are a list of what it
may do (seccomp(2); as in Firecracker), it can make no process, signal none but itself, open no socket but a Unix one,
let no file grow, and reach no file but the machine's, shared memory, ``/dev/kvm`` and what Python reads (Landlock).
Keeper and coordinator start processes and so keep more: their system calls are a list of what they may not do (as
with QEMU's ``-sandbox on``), and they write to the directories of machines only.

Landlock binds the calling thread and those that it makes from then on, so all of this comes before the first one that
lives on while a guest runs.
What the kernel lacks is left out: ``missing`` says what that is. docs/decisions/0017 has the reasons.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import stat
import sys
import termios
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .linux.process import PR_GET_NAME, PR_SET_NAME
from .shm import SHM_DIRECTORY
from .steps import DIRECTORY

if TYPE_CHECKING:
    from py_landlock import AccessFs, Landlock

__all__ = ["SandboxError", "VcpuConfinement", "confine_machine", "missing"]


class SandboxError(Exception):
    """A process could not give up what it should, although this host can do that; the text is fit for a user."""


# --- system calls ------------------------------------------------------------------------------------------------

_MEMORY = "brk madvise mbind membarrier mincore mmap mprotect mremap msync munmap userfaultfd"
_THREADS = ("exit exit_group futex get_robust_list getcpu getpriority gettid rseq sched_get_priority_max "
            "sched_get_priority_min sched_getaffinity sched_getattr sched_getparam sched_getscheduler "
            "sched_setattr sched_yield set_robust_list setpriority")
_SIGNALS = "pause restart_syscall rt_sigaction rt_sigpending rt_sigprocmask rt_sigreturn rt_sigtimedwait sigaltstack"
_TIME = ("alarm clock_getres clock_gettime clock_nanosleep getitimer gettimeofday nanosleep setitimer time times "
         "timerfd_create timerfd_gettime timerfd_settime")
_FILES = ("access close close_range dup dup2 dup3 faccessat faccessat2 fcntl flock fstat fstatfs ftruncate getcwd "
          "getdents64 lseek lstat newfstatat open openat openat2 pipe pipe2 pread64 preadv pwrite64 pwritev read "
          "readlink readlinkat readv rmdir stat statfs statx umask unlink unlinkat write writev")
_WAITING = ("epoll_create1 epoll_ctl epoll_pwait epoll_pwait2 epoll_wait eventfd2 poll ppoll pselect6 select")
_SOCKETS = "connect getpeername getsockname getsockopt recvfrom recvmsg sendmsg sendto setsockopt shutdown"
_WHO = "getegid geteuid getgid getpid getppid getrandom getrusage getuid sysinfo uname"

#: All that a vCPU worker may call, beside what `_vcpu_rules` allows with some arguments only.
_VCPU_CALLS = " ".join((_MEMORY, _THREADS, _SIGNALS, _TIME, _FILES, _WAITING, _SOCKETS, _WHO)).split()

#: What no process of a machine has any business with.
_FORBIDDEN = " ".join((
    "kcmp pidfd_getfd process_madvise process_vm_readv process_vm_writev ptrace",                 # other processes
    "fsconfig fsmount fsopen fspick mount mount_setattr move_mount open_tree pivot_root chroot setns umount2 unshare",
    "capset setfsgid setfsuid setgid setgroups setregid setresgid setresuid setreuid setuid",   # who it is
    "chown fchown fchownat lchown open_by_handle_at quotactl swapoff swapon",
    "add_key bpf fanotify_init io_uring_enter io_uring_register io_uring_setup keyctl perf_event_open request_key",
    "acct adjtimex clock_adjtime clock_settime delete_module finit_module init_module ioperm iopl kexec_file_load",
    "kexec_load lookup_dcookie modify_ldt personality reboot setdomainname sethostname settimeofday vhangup")).split()

_CLONE_THREAD = 0x00010000      # uapi/linux/sched.h

_WORKER_FILES = 1024            # descriptors that a worker may have open

# Of what Python and the C library read; what is not there is left out.
_SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/proc", "/sys", "/dev/null", "/dev/zero", "/dev/urandom",
           "/etc/ld.so.cache", "/etc/ld.so.preload", "/etc/localtime", "/etc/ssl/openssl.cnf")
# And to find a host by its name, or a user's home: a migration that its coordinator has finished.
_LOOKUP = ("/etc/hosts", "/etc/host.conf", "/etc/resolv.conf", "/etc/nsswitch.conf", "/etc/gai.conf",
           "/etc/services", "/etc/passwd")


def _devices() -> list[Path]:
    """What every process of a machine writes to; and where a test says at which step it is to fail."""
    found = [SHM_DIRECTORY, Path("/dev/kvm"), Path("/dev/userfaultfd"), Path("/dev/null")]
    return found if DIRECTORY is None else [*found, Path(DIRECTORY)]


def _seccomp() -> ModuleType:
    """Raises ImportError and RuntimeError without libseccomp."""
    import pyseccomp

    return pyseccomp


@contextlib.contextmanager
def _seccomp_or_none() -> Iterator[ModuleType | None]:
    """None without libseccomp: `missing` says so. Raises SandboxError for what fails in the ``with``."""
    try:
        found: ModuleType | None = _seccomp()
    except (ImportError, RuntimeError):
        found = None
    try:
        yield found
    except OSError as exc:
        raise SandboxError(f"cannot give up system calls (seccomp): {exc.strerror or exc}") from None


def missing() -> list[tuple[str, str]]:
    """What this host cannot do of it, and what to do about that; nothing is changed."""
    from py_landlock import LandlockError, get_abi_version

    found = []
    try:
        get_abi_version()
    except LandlockError:
        found.append(("Landlock: processes can reach all files of this user",
                      "boot a kernel with CONFIG_SECURITY_LANDLOCK and landlock in lsm="))
    try:
        _seccomp()
    except (ImportError, RuntimeError):
        found.append(("seccomp: processes can make any system call", "apt-get install libseccomp2"))
    return found


class VcpuConfinement:
    """What a vCPU worker gives up; ``directory`` is its machine's. To put it together takes six times as long as to
    apply it, so a process whose forks are workers makes one for all of them; each applies it to itself."""

    def __init__(self, directory: Path) -> None:
        """Nothing is given up yet. Raises SandboxError."""
        self.directory = directory
        # A worker clears up when keeper and coordinator are gone: so it can remove what is the machine's.
        self._files = _FileRules(read=_readable(), write=[*_devices(), directory], run=False, connect=False,
                                 empty=directory.parent)
        self._calls: Any = None
        with _seccomp_or_none() as self._seccomp:
            if self._seccomp is not None:
                self._calls = _vcpu_rules(self._seccomp)

    def apply(self, read: Iterable[Path] = ()) -> None:
        """By the only thread of the worker, once. ``read``: files of the host that its guest is to find, where it is
        the system of Linux programs. Raises SandboxError."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        files = _WORKER_FILES if hard == resource.RLIM_INFINITY else min(hard, _WORKER_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
        self._files.let_read(read)
        self._files.apply()
        with _seccomp_or_none():
            if self._seccomp is not None:
                for name in ("kill", "tgkill"):     # of nobody but itself
                    self._calls.add_rule(self._seccomp.ALLOW, name, self._seccomp.Arg(0, self._seccomp.EQ, os.getpid()))
                self._calls.load()


def confine_machine(read: Iterable[Path], write: Iterable[Path], empty: Path) -> None:
    """Of a keeper or a coordinator: beside what its programs read, it may read and write only this, and what is in
    shared memory, and remove empty directories in ``empty``. By its only thread, or the only one that goes on. Raises
    SandboxError."""
    _FileRules(read=[*_readable(), *map(Path, _LOOKUP), *read], write=[*_devices(), *write], run=True, connect=True,
               empty=empty).apply()
    with _seccomp_or_none() as seccomp:
        if seccomp is None:
            return
        rules = seccomp.SyscallFilter(seccomp.ALLOW)
        refused = seccomp.ERRNO(errno.EPERM)
        _add(rules, refused, _FORBIDDEN)
        rules.add_rule(refused, "ioctl", seccomp.Arg(1, seccomp.EQ, termios.TIOCSTI))
        for kind in (stat.S_IFCHR, stat.S_IFBLK):       # fifos it makes
            for name, at in (("mknod", 1), ("mknodat", 2)):
                rules.add_rule(refused, name, seccomp.Arg(at, seccomp.MASKED_EQ, 0o170000, kind))
        rules.load()


def _vcpu_rules(seccomp: ModuleType) -> Any:
    """What is not in the list is "not implemented": the C library then does without (clone3, whose flags a filter
    cannot see)."""
    rules = seccomp.SyscallFilter(seccomp.ERRNO(errno.ENOSYS))
    _add(rules, seccomp.ALLOW, _VCPU_CALLS)
    for name, argument in (
            ("clone", seccomp.Arg(0, seccomp.MASKED_EQ, _CLONE_THREAD, _CLONE_THREAD)),      # threads, no processes
            ("socket", seccomp.Arg(0, seccomp.EQ, socket.AF_UNIX)),
            ("prctl", seccomp.Arg(0, seccomp.EQ, PR_SET_NAME)),
            ("prctl", seccomp.Arg(0, seccomp.EQ, PR_GET_NAME)),
            ("sched_setscheduler", seccomp.Arg(1, seccomp.EQ, os.SCHED_OTHER)),       # ZeroMQ asks for what it has
            ("prlimit64", seccomp.Arg(2, seccomp.EQ, 0)),             # reads
            ("ioctl", seccomp.Arg(1, seccomp.NE, termios.TIOCSTI))):  # all of KVM's; no typing into a terminal
        rules.add_rule(seccomp.ALLOW, name, argument)
    return rules


def _add(rules: Any, action: int, names: Iterable[str]) -> None:
    for name in names:
        with contextlib.suppress(OSError):      # this architecture, or this libseccomp, has no such call
            rules.add_rule(action, name)


# --- files -------------------------------------------------------------------------------------------------------


def _readable() -> list[Path]:
    """These packages, too: an editable installation may have them elsewhere than ``sys.path`` says."""
    return [*map(Path, _SYSTEM), Path(sys.prefix), Path(sys.base_prefix), Path(__file__).parents[1],
            *(Path(p) for p in sys.path if p)]


class _FileRules:
    """``run``: programs among what can be read; ``connect``: over TCP. A process that does not ``connect`` cannot
    signal others either. ``empty``: of this, empty directories can be removed."""

    def __init__(self, read: Iterable[Path], write: Iterable[Path], *, run: bool, connect: bool, empty: Path) -> None:
        """Nothing is given up yet. Raises SandboxError."""
        from py_landlock import AccessFs, Landlock

        self._reads = AccessFs.READ_FILE | (AccessFs.EXECUTE if run else AccessFs(0))
        writes = AccessFs.READ_FILE | AccessFs.WRITE_FILE | AccessFs.TRUNCATE | AccessFs.IOCTL_DEV
        makes = (AccessFs.MAKE_REG | AccessFs.MAKE_DIR | AccessFs.MAKE_SOCK | AccessFs.MAKE_FIFO | AccessFs.MAKE_SYM
                 | AccessFs.REMOVE_FILE | AccessFs.REMOVE_DIR | AccessFs.REFER)
        self._rules: Landlock | None = None     # the kernel has none: `missing` says so
        with _landlock_errors():
            rules = Landlock(strict=False)
            _let(rules, read, self._reads, AccessFs(0))
            _let(rules, write, writes, makes)
            rules.add_path_rule(empty, access=AccessFs.REMOVE_DIR)
            if connect:
                rules.allow_all_network().allow_all_scope()
            self._rules = rules

    def let_read(self, paths: Iterable[Path]) -> None:
        """These too. Raises SandboxError."""
        if self._rules is not None:
            with _landlock_errors():
                _let(self._rules, paths, self._reads, type(self._reads)(0))

    def apply(self) -> None:
        """To the calling thread, and those that it makes. Raises SandboxError."""
        if self._rules is not None:
            with _landlock_errors():
                self._rules.apply()


def _let(rules: Landlock, paths: Iterable[Path], of_file: AccessFs, of_directory: AccessFs) -> None:
    """A file must not be given what only a directory can have. What is not there is left out."""
    from py_landlock import AccessFs

    for path in paths:
        if path.is_dir():
            rules.add_path_rule(path, access=of_file | of_directory | AccessFs.READ_DIR)
        elif path.exists():
            rules.add_path_rule(path, access=of_file)


@contextlib.contextmanager
def _landlock_errors() -> Iterator[None]:
    """Raises SandboxError; nothing where the kernel has no Landlock."""
    from py_landlock import LandlockDisabledError, LandlockError, LandlockNotAvailableError

    try:
        yield
    except (LandlockDisabledError, LandlockNotAvailableError):
        pass
    except (LandlockError, OSError) as exc:
        raise SandboxError(f"cannot give up access to files (Landlock): {exc}") from None
