"""What write tracking costs the software CPU: no tracking, a hook in Python, the native hooks in use, and
userfaultfd write-protect. ``python -m benchmarks tracking``; one core, runs interleaved, medians.

The guest's loop is ``incq (mem); add; dec; jnz``. docs/decisions/0004 has the figures and what follows.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import statistics
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import unicorn
from rich.console import Console
from rich.table import Table
from unicorn import unicorn_const as uconst
from unicorn import x86_const as ux

TOP = Path(__file__).parent.parent
sys.path[:0] = [str(TOP), str(TOP / "tests")]

from bare import CODE, DATA, EXIT, bare  # noqa: E402

from .common import arguments_parser, quiet  # noqa: E402

LOOP = bytes.fromhex("48ff07 4801f7 48ffc9 75f5".replace(" ", ""))
PASSES = 1_000_000


def plain(passes: int, python_hook: bool) -> float:
    """Million passes a second of Unicorn alone, with or without a write hook in Python."""
    memory = mmap.mmap(-1, 4 << 20)
    anchor = ctypes.c_char.from_buffer(memory)
    memory[CODE:CODE + len(LOOP) + 1] = LOOP + b"\x90"
    engine = unicorn.Uc(uconst.UC_ARCH_X86, uconst.UC_MODE_64)
    engine.mem_map_ptr(0, len(memory), uconst.UC_PROT_ALL, ctypes.addressof(anchor))
    if python_hook:
        engine.hook_add(uconst.UC_HOOK_MEM_WRITE, lambda *arguments: None)
    passes = passes // 10 if python_hook else passes
    for register, value in ((ux.UC_X86_REG_RDI, DATA), (ux.UC_X86_REG_RSI, 0), (ux.UC_X86_REG_RCX, passes)):
        engine.reg_write(register, value)
    began = time.perf_counter()
    engine.emu_start(CODE, CODE + len(LOOP))
    return passes / (time.perf_counter() - began) / 1e6


def tracked(passes: int) -> float:
    """The same with this project's hooks: every store tracked, every block a place to leave from."""
    with bare("unicorn", LOOP + EXIT, rdi=DATA, rsi=0, rcx=passes) as vcpu:
        began = time.perf_counter()
        vcpu.run()
        return passes / (time.perf_counter() - began) / 1e6


_UFFDIO_API, _UFFDIO_REGISTER, _UFFDIO_WRITEPROTECT = 0xC018AA3F, 0xC020AA00, 0xC018AA06
_SYS_USERFAULTFD, _USER_MODE_ONLY = 323, 1
_FEATURE_WP_SHMEM = 1 << 12
_REGISTER_WP, _MODE_WP = 2, 1


def first_write_with_userfaultfd(pages: int = 2000) -> float:
    """Microseconds a first write to a page that userfaultfd protects, a thread taking the faults."""
    memory = mmap.mmap(-1, pages * 4096, mmap.MAP_SHARED)
    anchor = ctypes.c_char.from_buffer(memory)
    address = ctypes.addressof(anchor)
    memory[:] = b"\1" * len(memory)
    fd = ctypes.CDLL(None, use_errno=True).syscall(_SYS_USERFAULTFD, os.O_CLOEXEC | _USER_MODE_ONLY)
    if fd < 0:
        return float("nan")
    fcntl.ioctl(fd, _UFFDIO_API, struct.pack("<QQQ", 0xAA, _FEATURE_WP_SHMEM, 0))
    fcntl.ioctl(fd, _UFFDIO_REGISTER, struct.pack("<QQQQ", address, len(memory), _REGISTER_WP, 0))
    fcntl.ioctl(fd, _UFFDIO_WRITEPROTECT, struct.pack("<QQQ", address, len(memory), _MODE_WP))

    def serve() -> None:
        for _ in range(pages):
            fault = struct.unpack_from("<Q", os.read(fd, 32), 16)[0] & ~4095
            fcntl.ioctl(fd, _UFFDIO_WRITEPROTECT, struct.pack("<QQQ", fault, 4096, 0))

    thread = threading.Thread(target=serve)
    thread.start()
    store = ctypes.memset      # through ctypes: the GIL is free while the store waits
    began = time.perf_counter()
    for page in range(pages):
        store(address + page * 4096, 2, 1)
    took = time.perf_counter() - began
    thread.join()
    os.close(fd)
    return took / pages * 1e6


def main() -> None:
    options = arguments_parser("tracking", __doc__).parse_args()
    passes = PASSES // 50 if options.quick else PASSES
    rounds = options.rounds or (1 if options.quick else 5)
    kinds: dict[str, Callable[[], float]] = {"no tracking": lambda: plain(passes, False),
                                             "hook in Python": lambda: plain(passes, True),
                                             "native hooks (in use)": lambda: tracked(passes)}
    tracked(passes)     # compiles, once
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds):
        quiet(options.patience)
        for name, measure in kinds.items():
            found[name].append(measure())
    table = Table("tracking", "million stores/s", "of no tracking")
    base = statistics.median(found["no tracking"])
    for name, values in found.items():
        middle = statistics.median(values)
        table.add_row(name, f"{middle:.1f}", f"{middle / base:.2f}")
    console = Console()
    console.print(table)
    faults = statistics.median(first_write_with_userfaultfd() for _ in range(rounds))
    console.print(f"userfaultfd: {faults:.1f} us a first write, nothing afterwards")


if __name__ == "__main__":
    main()
