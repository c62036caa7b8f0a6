"""One vCPU process.

    __main__.py, zygote.py  how one comes to be: alone, or as a fork of one that has all imported
    process.py              set-up and tear-down; its threads:
    vcpu.py                 the vCPU's, which enters the guest
    service.py, resets.py   the one that answers requests, the one that resets the ring
    slots.py, memory.py     its memory slots, mapped
    accel/                  what runs the guest
    ports.py, hypercalls.py, faults.py, throttle.py    port devices, hypercalls, exceptions, the dirty limit
    state.py, msr.py        a vCPU's state: what of it a snapshot or a migration has
    tracking/               dirty tracking by the worker itself

Imports :mod:`ipc` only; knows nothing of the machine around it beyond its WorkerSpec.
"""
