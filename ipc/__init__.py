"""What the processes of one machine share.

A dirty page's way, from the guest's store to whoever wants to know of it::

      vCPU worker (one process a vCPU)           coordinator (one process a machine)
    +--------------------------------+         +------------------------------------------+
    | guest store                    |         |                                          |
    |   | write fault (KVM, or the   |         |  harvest: load-acquire DIRTY             |
    |   v  software CPU's tracker)   |  ring   |    -> staging bitmap -> store RESET      |
    | push entry, store-release DIRTY|========>|                                          |
    |                                |         |                                          |
    | ioctl RESET (re-protects)      |<--------|  reset_request in the control block      |
    |   reset_total += count         |-------->|  counts compared (invariant 3)           |
    +--------------------------------+         |                                          |
                                               |  publish: staging -> slot bitmap         |
                                               |  sync:    slot bitmap -> each client's   |
                                               +------------------------------------------+

Modules, in the order of that way: :mod:`ipc.shm` (segments), :mod:`ipc.layout` (control
blocks and ring entries), :mod:`ipc.ring`, :mod:`ipc.compiled` and :mod:`ipc.compiled.atomics` (the hot
loops), :mod:`ipc.bitmap`, :mod:`ipc.messages` (what is said over ZeroMQ), :mod:`ipc.sockets`
(sockets and the passing of file descriptors), :mod:`ipc.linux.futex`, :mod:`ipc.linux.process`.

This package knows nothing of machines and imports neither ``workers`` nor ``vmm``.
"""
