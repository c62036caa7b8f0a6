"""Which tests are tried, and why some of them do not pass in a machine."""

from __future__ import annotations

__all__ = ["FOLDERS", "NOT_HERE", "WHY"]

_FOLDERS = """
    abort accept accept4 access alarm arch_prctl bind brk capget capset chdir chmod chown clock_getres
    clock_gettime clock_nanosleep clone close close_range confstr connect copy_file_range creat dup dup2 dup3
    epoll_create epoll_create1 epoll_ctl epoll_pwait epoll_wait eventfd eventfd2 execl execle execlp execv
    execve execveat execvp exit exit_group faccessat faccessat2 fadvise fallocate fchdir fchmod fchmodat
    fchmodat2 fchown fchownat fcntl fdatasync fgetxattr flistxattr flock fork fpathconf fremovexattr fsetxattr
    fstat fstatat fstatfs fsync ftruncate futex futimesat get_robust_list getcontext getcpu getcwd getdents
    getegid geteuid getgid getgroups gethostid gethostname getitimer getpagesize getpeername getpgid getpgrp
    getpid getppid getpriority getrandom getresgid getresuid getrlimit getrusage getsid getsockname getsockopt
    gettid gettimeofday getuid getxattr inotify inotify_init ioctl ioprio kcmp kill lchown lgetxattr link
    linkat listen listxattr llistxattr llseek lremovexattr lseek lstat madvise mallinfo mallopt membarrier
    memcmp memcpy memfd_create memset mincore mkdir mkdirat mknod mknodat mlock mlock2 mlockall mmap mprotect
    mq_notify mq_open mq_timedreceive mq_timedsend mq_unlink mremap msgctl msgget msgrcv msgsnd msync munlock
    munlockall munmap nanosleep newuname nftw nice open openat openat2 pathconf pause personality pidfd_getfd
    pidfd_open pidfd_send_signal pipe pipe2 poll ppoll prctl pread preadv preadv2 process_madvise pselect
    pwrite pwritev pwritev2 read readahead readdir readlink readlinkat readv realpath recv recvfrom recvmmsg
    recvmsg removexattr rename renameat renameat2 rmdir rt_sigaction rt_sigprocmask rt_sigqueueinfo
    rt_sigsuspend rt_sigtimedwait rt_tgsigqueueinfo sbrk sched_get_priority_max sched_get_priority_min
    sched_getaffinity sched_getparam sched_getscheduler sched_rr_get_interval sched_setaffinity sched_setparam
    sched_setscheduler sched_yield select semctl semget semop send sendfile sendmmsg sendmsg sendto
    set_robust_list set_tid_address setegid setfsgid setfsuid setgid setgroups setitimer setpgid setpgrp
    setpriority setregid setresgid setresuid setreuid setrlimit setsid setsockopt setuid setxattr shmat shmctl
    shmdt shmget shutdown sigaction sigaltstack sighold signal signalfd signalfd4 sigpending sigprocmask
    sigrelse sigsuspend sigtimedwait sigwait sigwaitinfo socket socketpair sockioctl splice stat statfs
    statvfs statx string switch symlink symlinkat sync sync_file_range syncfs sysconf sysinfo tee tgkill time
    timer_create timer_delete timer_getoverrun timer_gettime timer_settime timerfd times tkill truncate ulimit
    umask uname unlink unlinkat unshare utime utimensat utimes vfork vmsplice wait wait4 waitid waitpid write
    writev
"""
#: Of testcases/kernel/syscalls: about calls that docs/linux.md has, and some that it has not.
FOLDERS = tuple(_FOLDERS.split())

#: They would harm the host on which they are run natively (broken memory is reported, all memory is used).
NOT_HERE = frozenset({"madvise07", "madvise08", "madvise11", "fork14"})

_IPC = "System V and POSIX shared memory, semaphores, message queues are not served"
#: Why some do not pass in a machine: a pattern of names, and one of what they say first. The first that fits.
WHY = (
    ("Users: no file is refused to anybody but for execute rights",
     r"access01|bind02|chmod05|connect03|creat0[48]|faccessat202|fchdir03|fchmod05|fchown0\d|link04|lstat02|mkdir04|mknod08"
     r"|open(02|08|10)|pathconf02|readlink03|stat\d+|rename09|rmdir03|set(re|res)?uid0\d|symlink03|truncate03(_64)?"
     r"|unlink08|utime0\d|utimes01", ""),
    ("Capabilities are those of uid 0, and stay", r"cap[gs]et\d+", ""),
    ("mount is not served (most of these try a file system that cannot be written to)", "",
     r"Failed to acquire device|mount\("),
    (_IPC, r"(sh|se|ms|mq_)\w*(get|at|ctl|dt|op|rcv|snd|open|notify|receive|send|unlink)\d.*", ""),
    (_IPC, "sendmsg02", r"shmget|semget|msgget|mq_open|allocate semaphore"),
    ("There are no extended attributes", "", "xattr"),
    ("There are no namespaces", "", r"namespace|/proc/self/ns/|unshare|clone failed: EINVAL"),
    ("There are no timers of processor time", r"[gs]etitimer\d+", "CPUTIME_ID"),
    ("Memory that is locked is not counted, nor had beforehand",
     "mlock.*|mmap14|munlockall01|mincore03|msync03|madvise02", ""),
    ("Files do not tell of others' use (leases, dnotify, F_SETOWN)", r"fcntl(23|27|31|38|39)(_64)?", ""),
    ("Threads run where the host has them run", r"getcpu01|sched_setaffinity\d+", ""),
    ("Memory cannot be sealed", r"memfd_create01", ""),
    ("They take longer than the test waits, or need more threads than the machine has", "signal06",
     r"slept for too long|Test killed! \(timeout|fork\(\) failed: EAGAIN"),
    ("They ask for a later kernel than 6.1, or for what it was not built with", "",
     "requires kernel|controller required|Huge page is not|kernel config"),
    ("Something of /proc or /sys is not there, or cannot be written to", "", r"/(proc|sys)/|pagemap"),
    ("A call is not served", r"signalfd\w+|sched_rr_get_interval\d+",
     r"ENOSYS|errno:38|Function not implemented|__NR_\w+ not supported|not supported on your arch"),
)
