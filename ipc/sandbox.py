"""What a process of a machine gives up before a guest runs: new privileges, files, the network, system calls.

A vCPU worker is what a guest would have broken into first, and needs least: its system calls are a list of what it
may do (seccomp(2); as in Firecracker), it can make no process, signal none but itself, open no socket but a Unix one,
let no file grow, and reach no file but the machine's, shared memory, ``/dev/kvm`` and what Python reads (Landlock).
Keeper and coordinator start processes and so keep more: their system calls are a list of what they may not do (as
with QEMU's ``-sandbox on``), and they write to the directories of machines only.

Landlock binds the calling thread and those that it makes from then on, so all of this comes before the first one.
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
from typing import Any

from .linux.process import PR_GET_NAME, PR_SET_NAME
from .shm import SHM_DIRECTORY
from .steps import DIRECTORY

__all__ = ["SandboxError", "confine_machine", "confine_vcpu", "missing"]


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

#: All that a vCPU worker may call, beside what `_vcpu_filter` allows with some arguments only.
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


def confine_vcpu(directory: Path, read: Iterable[Path] = ()) -> None:
    """Of a vCPU worker; ``directory`` is the machine's. ``read``: files of the host that its guest is to find, where
    it is the system of Linux programs. By its only thread. Raises SandboxError."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = _WORKER_FILES if hard == resource.RLIM_INFINITY else min(hard, _WORKER_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    # A worker clears up when keeper and coordinator are gone: so it can remove what is the machine's.
    _restrict_files(read=[*_readable(), *read], write=[*_devices(), directory], run=False, connect=False,
                    empty=directory.parent)
    with _seccomp_or_none() as seccomp:
        if seccomp is not None:
            _vcpu_filter(seccomp)


def confine_machine(read: Iterable[Path], write: Iterable[Path], empty: Path) -> None:
    """Of a keeper or a coordinator: beside what its programs read, it may read and write only this, and what is in
    shared memory, and remove empty directories in ``empty``. By its only thread. Raises SandboxError."""
    _restrict_files(read=[*_readable(), *map(Path, _LOOKUP), *read],
                    write=[*_devices(), *write], run=True, connect=True, empty=empty)
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


def _vcpu_filter(seccomp: ModuleType) -> None:
    """What is not in the list is "not implemented": the C library then does without (clone3, whose flags a filter
    cannot see)."""
    me = os.getpid()
    rules = seccomp.SyscallFilter(seccomp.ERRNO(errno.ENOSYS))
    _add(rules, seccomp.ALLOW, _VCPU_CALLS)
    for name, argument in (
            ("clone", seccomp.Arg(0, seccomp.MASKED_EQ, _CLONE_THREAD, _CLONE_THREAD)),      # threads, no processes
            ("kill", seccomp.Arg(0, seccomp.EQ, me)), ("tgkill", seccomp.Arg(0, seccomp.EQ, me)),
            ("socket", seccomp.Arg(0, seccomp.EQ, socket.AF_UNIX)),
            ("prctl", seccomp.Arg(0, seccomp.EQ, PR_SET_NAME)),
            ("prctl", seccomp.Arg(0, seccomp.EQ, PR_GET_NAME)),
            ("sched_setscheduler", seccomp.Arg(1, seccomp.EQ, os.SCHED_OTHER)),       # ZeroMQ asks for what it has
            ("prlimit64", seccomp.Arg(2, seccomp.EQ, 0)),             # reads
            ("ioctl", seccomp.Arg(1, seccomp.NE, termios.TIOCSTI))):  # all of KVM's; no typing into a terminal
        rules.add_rule(seccomp.ALLOW, name, argument)
    rules.load()


def _add(rules: Any, action: int, names: Iterable[str]) -> None:
    for name in names:
        with contextlib.suppress(OSError):      # this architecture, or this libseccomp, has no such call
            rules.add_rule(action, name)


# --- files -------------------------------------------------------------------------------------------------------


def _readable() -> list[Path]:
    return [*map(Path, _SYSTEM), Path(sys.prefix), Path(sys.base_prefix), *(Path(p) for p in sys.path if p)]


def _restrict_files(read: Iterable[Path], write: Iterable[Path], *, run: bool, connect: bool,
                    empty: Path | None = None) -> None:
    """``run``: programs among what can be read; ``connect``: over TCP. A process that does not ``connect`` cannot
    signal others either. ``empty``: of this, empty directories can be removed. Raises SandboxError."""
    from py_landlock import AccessFs, Landlock, LandlockDisabledError, LandlockError, LandlockNotAvailableError

    reads = AccessFs.READ_FILE | (AccessFs.EXECUTE if run else AccessFs(0))
    writes = AccessFs.READ_FILE | AccessFs.WRITE_FILE | AccessFs.TRUNCATE | AccessFs.IOCTL_DEV
    makes = (AccessFs.MAKE_REG | AccessFs.MAKE_DIR | AccessFs.MAKE_SOCK | AccessFs.MAKE_FIFO | AccessFs.MAKE_SYM
            | AccessFs.REMOVE_FILE | AccessFs.REMOVE_DIR | AccessFs.REFER)
    try:
        rules = Landlock(strict=False)
        for paths, of_file, of_directory in ((read, reads, AccessFs(0)), (write, writes, makes)):
            for path in paths:      # a file must not be given what only a directory can have
                if path.is_dir():
                    rules.add_path_rule(path, access=of_file | of_directory | AccessFs.READ_DIR)
                elif path.exists():
                    rules.add_path_rule(path, access=of_file)
        if empty is not None:
            rules.add_path_rule(empty, access=AccessFs.REMOVE_DIR)
        if connect:
            rules.allow_all_network().allow_all_scope()
        rules.apply()
    except (LandlockDisabledError, LandlockNotAvailableError):
        pass        # the kernel has none: `missing` says so
    except (LandlockError, OSError) as exc:
        raise SandboxError(f"cannot give up access to files (Landlock): {exc}") from None
