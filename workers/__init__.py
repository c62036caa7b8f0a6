"""One vCPU process: its run loop, its accelerators and its port devices.

Imports :mod:`ipc` only; knows nothing of the machine around it beyond its WorkerSpec.
"""
