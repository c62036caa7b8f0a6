"""What a coordinator and its clients both know of a machine. Imports ipc and, of workers, what an accelerator says
of itself.

    spec.py, rules.py       a machine, fully resolved; what one may be
    names.py, runtime.py    names and where they lead; who runs on this host, and what is left of who died
    memory.py               memory slots and their bitmaps, as segments
    boot.py, loader.py      what a vCPU finds at its first instruction; guest images
    room.py, trackings.py   what this host can give: memory, descriptors; modes of dirty tracking
    verbs.py, report.py     what a coordinator may be asked for; what it says of its machine
    events.py               trace events, those of QEMU's dirty ring
    tracefile.py            dirty traces as files
    log.py, records.py      what a machine's processes say, and what is kept of it beyond its end
"""
