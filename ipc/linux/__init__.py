"""What Linux has for processes and Python does not.

    libc.py         the C library: called so that an error raises; numbers of system calls
    futex.py        waiting on a word of shared memory, across processes
    process.py      how a process of ours is named, scheduled, and tied to its parent
    processid.py    which process: its pid and when it started
    inotify.py      being told that a file or directory has gone
    files.py        two names swapped in one step; a lock with an end to the wait
    memory.py       how much memory there is for this process: of the host, and of its cgroups
    ptrace.py       stopping a thread of another process, and its registers
    foreign.py      another process: its mappings, threads and memory, as /proc and process_vm_readv(2) show them

userfaultfd is in ipc/userfault.py, KVM in workers/accel/kvm/api.py.
"""
