"""One vCPU process.

    __main__.py, zygote.py  how one comes to be: alone, or as a fork of one that has all imported
    process.py              set-up, the vCPU thread's run loop, the service and reset threads
    slots.py, memory.py     its memory slots, mapped
    accel/                  what runs the guest
    ports.py, hypercalls.py, faults.py, throttle.py    port devices, hypercalls, exceptions, the dirty limit
    state.py, msr.py        a vCPU's state: what of it a snapshot or a migration has
    tracking/               dirty tracking by the worker itself

Imports :mod:`ipc` only; knows nothing of the machine around it beyond its WorkerSpec.
"""
