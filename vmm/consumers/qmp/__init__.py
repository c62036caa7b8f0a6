"""QMP, QEMU's machine protocol, for a machine: ``vmm qmp NAME SOCKET``. Commands and answers are those of QEMU 7.2
(``query-qmp-schema``), as far as docs/qmp.md lists them.

    server.py       the socket, sessions, events to all of them, the end
    wire.py         JSON values out of a stream, answers, errors
    commands.py     the table of commands; state, vCPUs, stop, cont, quit
    arguments.py    what commands take, checked
    dirty.py        dirty rate and dirty limit
    migration.py    migrate and what belongs to it
    follower.py     what happens to the machine, until it ends
    story.py        from the machine's events and its migration's report to QMP's events (no I/O)

It is a client of the machine like any other: a coordinator that dies is replaced behind it, and an upgraded machine
keeps it. A migration is carried out by a process of its own, so neither's end is the other's.
"""

from __future__ import annotations

from .server import QmpServer

__all__ = ["QmpServer"]
