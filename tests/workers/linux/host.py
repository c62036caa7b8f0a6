"""The host's kernel as an oracle for files: a tmpfs of its own that one thread of this process sees as its root."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

__all__ = ["Host", "call", "host"]

_CLONE_NEWNS = 0x20000
_MS_PRIVATE, _MS_REC, _MNT_DETACH = 1 << 18, 1 << 14, 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

Result = TypeVar("Result")


def call(number: int, *arguments: int | bytes | ctypes.Array[ctypes.c_char] | None) -> int:
    """A system call. Raises OSError."""
    found = int(_libc.syscall(ctypes.c_long(number), *(
        ctypes.c_long(each) if isinstance(each, int) else each for each in arguments)))
    if found < 0:
        raise OSError(ctypes.get_errno(), "")
    return found


class Host:
    """``do`` makes a call where the root is an empty tmpfs since ``renew``, and the umask 0. Nobody else sees it."""

    def __init__(self, directory: str) -> None:
        self._directory = os.fsencode(directory)
        self._thread = ThreadPoolExecutor(1)
        self._mounted = False
        self._root = self.do(self._separate)

    def do(self, what: Callable[[], Result]) -> Result:
        return self._thread.submit(what).result()

    def renew(self, pages: int) -> None:
        self.do(lambda: self._renew(pages))

    def close(self) -> None:
        self.do(self._leave)
        self._thread.shutdown()
        os.close(self._root)

    def _separate(self) -> int:
        """The root as only this thread has it."""
        for failed in (_libc.unshare(_CLONE_NEWNS), _libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)):
            if failed:
                raise OSError(ctypes.get_errno(), "")
        os.umask(0)
        return os.open("/", os.O_PATH | os.O_DIRECTORY)

    def _renew(self, pages: int) -> None:
        self._leave()
        options = b"mode=755,nr_inodes=0,huge=never,size=%d" % (pages * 4096)
        if _libc.mount(b"tmpfs", self._directory, b"tmpfs", 0, options):
            raise OSError(ctypes.get_errno(), "")
        self._mounted = True
        os.chroot(self._directory)
        os.chdir("/")

    def _leave(self) -> None:
        os.fchdir(self._root)
        os.chroot(".")
        if self._mounted:
            _libc.umount2(self._directory, _MNT_DETACH)
            self._mounted = False


@contextmanager
def host() -> Iterator[Host]:
    directory = tempfile.mkdtemp()
    found = Host(directory)
    try:
        yield found
    finally:
        found.close()
        shutil.rmtree(directory)
