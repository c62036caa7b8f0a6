"""ioctl(2) of terminals (ioctl_tty(2)): settings, queues, size, and who is controlled by it."""

from __future__ import annotations

import errno
import signal
import struct
import termios
from typing import TYPE_CHECKING

from .settings import Settings
from .terminal import Tty

if TYPE_CHECKING:
    from .processes import Process, Thread
    from .system import System

__all__ = ["control"]

_TCGETS, _TCSETS, _TCSETSW, _TCSETSF = range(0x5401, 0x5405)      # uapi/asm-generic/ioctls.h
_TCGETS2 = 0x802C_542A
_TCSETS2, _TCSETSW2, _TCSETSF2 = range(0x402C_542B, 0x402C_542E)
_TCSBRK, _TCXONC, _TCFLSH, _TCSBRKP = 0x5409, 0x540A, 0x540B, 0x5425
_TIOCSCTTY, _TIOCGPGRP, _TIOCSPGRP, _TIOCGSID, _TIOCNOTTY = 0x540E, 0x540F, 0x5410, 0x5429, 0x5422
_TIOCOUTQ, _TIOCGWINSZ, _TIOCSWINSZ, _FIONREAD, _TIOCGETD = 0x5411, 0x5413, 0x5414, 0x541B, 0x5424

_SETS = {_TCSETS: Settings.SIZE, _TCSETSW: Settings.SIZE, _TCSETSF: Settings.SIZE,
         _TCSETS2: Settings.SIZE2, _TCSETSW2: Settings.SIZE2, _TCSETSF2: Settings.SIZE2}
_SIZE = struct.Struct("<4H")


def control(system: System, thread: Thread, tty: Tty, request: int, argument: int) -> int:
    """The result. Raises OSError and SegmentationFault."""
    space, process = thread.process.space, thread.process
    if request == _TCGETS:
        space.write(argument, tty.settings.pack())
    elif request == _TCGETS2:
        space.write(argument, tty.settings.pack2())
    elif request in _SETS:
        wanted = tty.settings.changed(space.read(argument, _SETS[request]))
        if request in (_TCSETSF, _TCSETSF2):
            tty.flush()
        tty.set(wanted)
    elif request == _TCFLSH:
        _flush(tty, argument)
    elif request == _TCXONC:
        _stop_or_start(tty, argument)
    elif request in (_TCSBRK, _TCSBRKP):
        pass        # nothing is on a line
    elif request == _TIOCGWINSZ:
        space.write(argument, _SIZE.pack(tty.rows, tty.columns, tty.width, tty.height))
    elif request == _TIOCSWINSZ:
        tty.resize(*_SIZE.unpack(space.read(argument, _SIZE.size)))
    elif request == _FIONREAD:
        _give(thread, argument, tty.readable)
    elif request in (_TIOCOUTQ, _TIOCGETD):
        _give(thread, argument, 0)
    elif request == _TIOCGPGRP:
        _check_controls(tty, process)
        _give(thread, argument, tty.group)
    elif request == _TIOCGSID:
        _check_controls(tty, process)
        _give(thread, argument, tty.session)
    elif request == _TIOCSPGRP:
        _set_group(system, tty, process, struct.unpack("<i", space.read(argument, 4))[0])
    elif request == _TIOCSCTTY:
        _take(tty, process, force=argument == 1)
    elif request == _TIOCNOTTY:
        _give_up(tty, process)
    else:
        raise OSError(errno.ENOTTY, "")
    return 0


def _give(thread: Thread, address: int, value: int) -> None:
    thread.process.space.write(address, struct.pack("<i", value))


def _flush(tty: Tty, queue: int) -> None:
    if queue not in (termios.TCIFLUSH, termios.TCOFLUSH, termios.TCIOFLUSH):
        raise OSError(errno.EINVAL, "")
    if queue != termios.TCOFLUSH:
        tty.flush()
    if queue != termios.TCIFLUSH:
        tty.screen.shown.clear()


def _stop_or_start(tty: Tty, action: int) -> None:
    if action == termios.TCOOFF:
        tty.screen.stop(by_call=True)
    elif action == termios.TCOON:
        tty.screen.start(by_call=True)
    elif action in (termios.TCIOFF, termios.TCION):
        byte = tty.settings.characters[termios.VSTOP if action == termios.TCIOFF else termios.VSTART]
        tty.screen.shown += bytes((byte,)) if byte else b""
    else:
        raise OSError(errno.EINVAL, "")


# --- whom it controls ---------------------------------------------------------------------------------------------


def _check_controls(tty: Tty, process: Process) -> None:
    if process.session != tty.session:
        raise OSError(errno.ENOTTY, "")


def _set_group(system: System, tty: Tty, process: Process, group: int) -> None:
    _check_controls(tty, process)
    if group < 0:
        raise OSError(errno.EINVAL, "")
    members = [each for each in system.processes.values() if each.group == group]
    if not members:
        raise OSError(errno.ESRCH, "")
    if members[0].session != tty.session:
        raise OSError(errno.EPERM, "")
    tty.group = group


def _take(tty: Tty, process: Process, *, force: bool) -> None:
    """A session has it that has none, and that nobody else's is unless it is taken away."""
    leads = process.session == process.pid
    if leads and tty.session == process.session:
        return
    if not leads or (tty.session and not force):
        raise OSError(errno.EPERM, "")
    tty.session, tty.group = process.session, process.group


def _give_up(tty: Tty, process: Process) -> None:
    """Of the first process of a session: the whole of it."""
    _check_controls(tty, process)
    if process.session == process.pid:
        tty.signals += [signal.SIGHUP, signal.SIGCONT]
        tty.session = 0
