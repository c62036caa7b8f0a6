"""Linux programs as guests: the operating system that they see. docs/decisions/0018-linux-guests.md has the design.

    abi.py          numbers and structures of the system-call interface, as data
    frames.py       pages of the machine's memory: which are free, how often each is mapped
    tables.py       page tables, in memory of their own
    space.py        an address space: mappings, demand paging, copy on write; reads and writes as the program would
    vfs.py          the file system, with paths.py, openfiles.py, inodes.py, directories.py, contents.py, locks.py
    sources.py      trees of the host that it imports, read at first use
    state.py        all of it as plain data, for a snapshot or a migration

All of it is data of one process, without a thread of its own and without a host descriptor that belongs to the guest.
Nothing here imports numpy: this process is started with each machine.
"""
