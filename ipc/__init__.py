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

A page's way, down through the files of all three packages:

     workers/accel/*        the guest's store, and the entry that logs it (KVM's, or hooks.py of the software CPU)
     ipc/ring.py            the ring: both ends, their protocol (ipc/compiled/loops.py has its two loops)
     vmm/dirty/reaper.py    harvest, reset, compare, publish; when: schedule.py
     vmm/dirty/log.py       slot bitmaps, and each client's (ipc/bitmap.py)
     vmm/client/machine.py  ``Machine.sync``
     vmm/consumers/*        dirty rate, working set, trace, snapshot, migration

In this package: shm.py (segments), layout.py (ring entries and control blocks), ring.py, bell.py (that somebody
should look), spin.py (looking before sleeping), bitmap.py, journal.py, lanes.py (what each process did of late),
claims.py (names that one owner at a time has); messages.py, sockets.py, lines.py, listening.py (what is said, over
what); userfault.py, pagescan.py and writelog.py (missing pages, written pages); steps.py (where a test may kill);
run.py (how a process begins and ends); oneline.py (text from outside, as it is said); compiled/, linux/, traces/.

This package knows nothing of machines and imports neither ``workers`` nor ``vmm``.
"""
