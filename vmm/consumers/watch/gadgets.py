"""What of a process's own code is used, found by its bytes in what it has mapped to execute: nothing is written there.

* ``syscall; ret``, which the vDSO and every C library have (getpid);
* the restorer: what its handlers of signals return to, which makes the call rt_sigreturn (glibc, musl, Go).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ipc.linux.foreign import Mapping

__all__ = ["Gadgets", "find_gadgets"]

_CALL_AND_RETURN = b"\x0f\x05\xc3"
_RESTORERS = (b"\x48\xc7\xc0\x0f\x00\x00\x00\x0f\x05",      # mov rax, 15; syscall
              b"\xb8\x0f\x00\x00\x00\x0f\x05")              # mov eax, 15; syscall
_MAX = 1 << 28          # bytes of one mapping that are looked through


class Gadgets(NamedTuple):
    """Addresses in the process."""

    call: int
    restorer: int


def find_gadgets(pid: int, there: Iterable[Mapping]) -> Gadgets | None:
    """None: the process has no such code. Raises OSError where its memory may not be read."""
    call = restorer = 0
    code = [m for m in there if "x" in m.mode and m.name != "[vsyscall]" and m.size <= _MAX]
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for mapping in sorted(code, key=_likely):
            try:
                data = os.pread(memory.fileno(), mapping.size, mapping.start)
            except OSError:     # a page of it cannot be read
                continue
            call = call or _found(mapping.start, data.find(_CALL_AND_RETURN))
            for pattern in _RESTORERS:
                restorer = restorer or _found(mapping.start, data.find(pattern))
            if call and restorer:
                return Gadgets(call, restorer)
    return None


def _found(start: int, at: int) -> int:
    return 0 if at < 0 else start + at


def _likely(mapping: Mapping) -> tuple[int, int]:
    """The vDSO, then C libraries, then the smallest."""
    name = mapping.name.rpartition("/")[2]
    return 0 if name == "[vdso]" else 1 if name.startswith(("libc.", "libc-", "ld-musl")) else 2, mapping.size
