"""What a machine does, event by event: what its processes wrote down of late (ipc/lanes.py) and what its coordinator
told (vmm/coordinator/events.py), in one stream.

    event.py        an event, and what a mark is as one; QEMU's names where QEMU has the event
    stream.py       those of a running machine, from the past on
    lines.py        as text, as lines of JSON, and read again
    perfetto.py     as a trace for Perfetto: a track for each vCPU, the coordinator, each client
"""
