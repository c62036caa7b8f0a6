"""Pipes. Fifos are opened as files are."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

from ..channels import nameless
from ..pipes import Pipe, PipeEnd
from .files import give_pair
from .registry import served

if TYPE_CHECKING:
    from ..processes import Thread
    from ..system import System


@served("pipe")
def pipe(system: System, thread: Thread, address: int, *_: int) -> int:
    return pipe2(system, thread, address, 0)


@served("pipe2")
def pipe2(system: System, thread: Thread, address: int, flags: int, *_: int) -> int:
    if flags & 0xFFFF_FFFF & ~(os.O_CLOEXEC | os.O_NONBLOCK | os.O_DIRECT):
        raise OSError(errno.EINVAL, "")
    made = Pipe(system.notify)
    inode = nameless(system.files.store, stat.S_IFIFO | 0o600)
    give_pair(thread, (PipeEnd(made, inode, os.O_RDONLY | flags & os.O_NONBLOCK),
                       PipeEnd(made, inode, os.O_WRONLY | flags & (os.O_NONBLOCK | os.O_DIRECT))), address,
              close_on_exec=bool(flags & os.O_CLOEXEC))
    return 0
