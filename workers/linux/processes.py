"""Programs at work: processes and their threads, as data. What a thread is about to do is in a vCPU."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .directories import Directory
from .openfiles import OpenFile
from .space import Space

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Descriptor", "FileTable", "Process", "Thread"]

_FILES_MAX = 1024       # RLIMIT_NOFILE, as usual


@dataclass(slots=True)
class Descriptor:
    """What a number stands for in a process."""

    file: OpenFile
    close_on_exec: bool = False


class FileTable:
    """File descriptors: the lowest free number is given. Raises OSError."""

    def __init__(self) -> None:
        self._there: dict[int, Descriptor] = {}
        self.limit = _FILES_MAX

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._there))

    def get(self, number: int, *, path_only: bool = False) -> OpenFile:
        """``path_only``: one that was opened with O_PATH will do."""
        found = self.descriptor(number).file
        if found.path_only and not path_only:
            raise OSError(errno.EBADF, "")
        return found

    def descriptor(self, number: int) -> Descriptor:
        try:
            return self._there[number]
        except KeyError:
            raise OSError(errno.EBADF, "") from None

    def add(self, file: OpenFile, *, close_on_exec: bool = False, least: int = 0) -> int:
        """Its number. The table has the use of the file that the caller had."""
        number = least
        while number in self._there:
            number += 1
        if number >= self.limit:
            file.let_go()
            raise OSError(errno.EMFILE, "")
        self._there[number] = Descriptor(file, close_on_exec)
        return number

    def put(self, number: int, file: OpenFile, *, close_on_exec: bool = False) -> None:
        """Under this number, whatever was there."""
        if not 0 <= number < self.limit:
            file.let_go()
            raise OSError(errno.EBADF, "")
        if number in self._there:
            self.close(number)
        self._there[number] = Descriptor(file, close_on_exec)

    def close(self, number: int) -> None:
        self.descriptor(number)
        self._there.pop(number).file.let_go()

    def close_all(self, *, on_exec: bool = False) -> None:
        for number in list(self._there):
            if not on_exec or self._there[number].close_on_exec:
                self.close(number)

    def copy(self) -> FileTable:
        """For a fork."""
        copied = FileTable()
        copied.limit = self.limit
        for number, each in self._there.items():
            each.file.keep()
            copied._there[number] = Descriptor(each.file, each.close_on_exec)
        return copied


@dataclass(eq=False)
class Process:
    """``code``: as wait(2) gives it, once it has ended."""

    pid: int
    parent: int
    space: Space
    files: FileTable
    directory: Directory            # where relative paths begin; one use is the process's
    path: bytes = b""               # of its program
    name: bytes = b""               # 15 bytes at most: comm
    mask: int = 0o022               # umask
    group: int = 0
    session: int = 0
    threads: list[Thread] = field(default_factory=list)
    limits: dict[int, tuple[int, int]] = field(default_factory=dict)
    actions: dict[int, bytes] = field(default_factory=dict)     # struct sigaction, by signal
    code: int | None = None


@dataclass(eq=False)
class Thread:
    """``fs_base``: given by arch_prctl(2), and where it is not None new to its vCPU."""

    tid: int
    process: Process
    name: bytes = b""
    blocked: int = 0                # signals, a bit each
    alternate: bytes = b""          # struct stack_t
    clear_tid: int = 0              # address
    robust: tuple[int, int] = (0, 0)
    fs_base: int | None = None
    deadline: int | None = None     # CLOCK_MONOTONIC in nanoseconds, of the call that it is blocked in
    done: int = 0                   # bytes that this call has moved already
    opening: OpenFile | None = None     # a fifo that it waits for the other end of
    ended: bool = False


def makes(flags: int) -> bool:
    """Whether openat(2) with these flags looks at its mode."""
    return bool(flags & (os.O_CREAT | (os.O_TMPFILE & ~os.O_DIRECTORY)))
