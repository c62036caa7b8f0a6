"""Dirty traces in shared memory, on their way into a file and out of one (vmm/machine/tracefile.py).

    queue.py        harvested entries, from the coordinator to who records them
    segment.py      one vCPU's part of a trace, for the worker that replays it
"""
