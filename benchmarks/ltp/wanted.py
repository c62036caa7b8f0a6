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
NOT_HERE = frozenset({"madvise07", "madvise08", "madvise10", "madvise11", "fork14"})

#: By what is the same about them: names (a regular expression).
WHY: dict[str, str] = {}
