"""The harvest loop against QEMU's reap loop in C, in turns; and a client's sync of a large slot.

**Harvest.** A ring full of dirty entries is harvested by ``ipc.compiled.calls.harvest`` and by the loop of QEMU's patch
(``reap_peer.c``, gcc -O2), both over the same entries: sequential or random offsets, in one slot or in 32 in turn.
Filling the ring is not timed. Bitmaps lie as they do in each program: the C loop's at the start of a page, as
malloc puts large blocks, ours at another cache line for each slot (vmm/machine/memory.py). Ours keeps a summary
beside the bitmap and knows entries that a predecessor has harvested already; the C loop does neither.

**Sync.** What a sync of one client does to the bitmaps of a slot of 1 TiB (32 MiB a bitmap), 0.1 % of it dirty, in
one piece or each page anywhere, beside reading one such bitmap once.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from numpy.typing import NDArray

from ipc.bitmap import Bitmap, slot_table, summary_words, word_count
from ipc.compiled import calls
from ipc.layout import MAX_SLOTS

from .common import Case, Results, arguments_parser, in_turns

NAME = "harvest"
ENTRIES = 65536
SLOT_PAGES = 1 << 20            # 4 GiB
REPEATS = 20                    # rings a run
LARGE_PAGES = (1 << 40) // 4096
SOURCE = Path(__file__).with_name("reap_peer.c")

U64 = NDArray[np.uint64]


def mapped(words: int) -> U64:
    """Page-aligned and touched, as shared memory is."""
    array = np.frombuffer(mmap.mmap(-1, 8 * words), np.uint64)
    array[:] = 0
    return array


class Rings:
    """One ring with its content, and the bitmaps of its slots, for both."""

    def __init__(self, offsets: U64, slots: int) -> None:
        self.content = np.zeros((ENTRIES, 2), np.uint64)
        self.content[:, 0] = 1 | (np.arange(ENTRIES, dtype=np.uint64) % np.uint64(slots)) << np.uint64(32)
        self.content[:, 1] = offsets
        self.ring = mapped(2 * ENTRIES)
        words, summary = word_count(SLOT_PAGES), summary_words(SLOT_PAGES)
        self.memory = []
        self.table = slot_table(MAX_SLOTS)
        self.c_slots = np.zeros((MAX_SLOTS, 2), np.uint64)
        for slot in range(slots):
            log, bitmap = mapped(8 * slot + words + summary), mapped(words)     # vmm/machine/memory.py
            self.memory += [log, bitmap]
            at = log.ctypes.data + 64 * slot
            self.table[slot] = (at, at + 8 * words, SLOT_PAGES)
            self.c_slots[slot] = (bitmap.ctypes.data, SLOT_PAGES)
        self.out = np.zeros(4, np.uint64)

    def refill(self) -> None:
        self.ring[:] = self.content.reshape(-1)

    def ours(self) -> dict[str, float]:
        took = 0.0
        for number in range(REPEATS):
            self.refill()
            began = time.perf_counter()
            calls.harvest(self.ring.ctypes.data, ENTRIES, number * ENTRIES, ENTRIES, self.table.ctypes.data,
                            MAX_SLOTS, self.out.ctypes.data)
            took += time.perf_counter() - began
            assert self.out[0] == ENTRIES
        return {"rate": REPEATS * ENTRIES / took}

    def peer(self, reap: ctypes._NamedFuncPointer) -> dict[str, float]:
        took = 0.0
        fetch = ctypes.c_uint32(0)
        where = ctypes.byref(fetch)
        for _ in range(REPEATS):
            self.refill()
            began = time.perf_counter()
            count = reap(self.ring.ctypes.data, ENTRIES, where, ENTRIES, self.c_slots.ctypes.data, MAX_SLOTS)
            took += time.perf_counter() - began
            assert count == ENTRIES
        return {"rate": REPEATS * ENTRIES / took}


@contextlib.contextmanager
def peer_loop() -> Iterator[ctypes._NamedFuncPointer]:
    with tempfile.TemporaryDirectory(prefix="shardvmm-build-") as folder:
        library = Path(folder) / "reap_peer.so"
        subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", library, SOURCE], check=True)
        reap = ctypes.CDLL(str(library)).reap_peer
        reap.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p,
                         ctypes.c_uint32]
        reap.restype = ctypes.c_uint32
        yield reap


def harvest_cases(rounds: int) -> list[Case]:
    random = np.random.default_rng(1)
    found = []
    with peer_loop() as reap:
        for label, offsets in (("sequential", np.arange(ENTRIES, dtype=np.uint64)),
                               ("random", random.integers(0, SLOT_PAGES, ENTRIES, np.uint64))):
            for slots in (1, 32):
                rings = Rings(offsets, slots)
                runs = in_turns({"ours": rings.ours, "peer": lambda r=rings: r.peer(reap)}, rounds)
                found.append(Case(f"{label}, {slots} slot{'s' * (slots > 1)}", runs["ours"], runs["peer"],
                                  at_least={"rate": 1.0}))
    return found


class Sync:
    """The bitmaps of a slot and of its one client: what DirtyLog.take does to them, again and again."""

    def __init__(self, dirty: NDArray[np.int64]) -> None:
        words, summary = word_count(LARGE_PAGES), summary_words(LARGE_PAGES)
        self.memory = [mapped(words + summary) for _ in range(3)]
        self.slot, self.pending, self.synced = (
            Bitmap(SimpleNamespace(buf=m, address=m.ctypes.data), 0, LARGE_PAGES) for m in self.memory)
        self.at, bits = np.unique(dirty // 64, return_inverse=True)
        self.bits = np.zeros(len(self.at), np.uint64)
        np.bitwise_or.at(self.bits, bits, np.uint64(1) << (dirty % 64).astype(np.uint64))
        self.groups = np.unique(dirty // 4096)
        self.pages = len(np.unique(dirty))

    def sync(self) -> dict[str, float]:
        self.slot.words[self.at] = self.bits
        np.bitwise_or.at(self.slot.summary, self.groups // 64, np.uint64(1) << (self.groups % 64).astype(np.uint64))
        began = time.perf_counter()
        count = calls.take(self.slot, self.pending, self.synced)
        took = time.perf_counter() - began
        assert count == self.pages
        return {"time": took}

    def read(self) -> dict[str, float]:
        began = time.perf_counter()
        np.bitwise_or.reduce(self.synced.words)
        return {"time": time.perf_counter() - began}


def sync_cases(rounds: int) -> list[Case]:
    random = np.random.default_rng(2)
    count = LARGE_PAGES // 1000
    found = []
    for label, dirty in (("in one piece", np.arange(count) + 12345),
                         ("anywhere", random.integers(0, LARGE_PAGES, count))):
        sync = Sync(dirty)
        sync.sync()
        runs = in_turns({"ours": sync.sync, "read": sync.read}, rounds)
        found.append(Case(f"sync, 1 TiB, 0.1 % dirty {label}", runs["ours"], runs["read"], at_most={"time": 2.0}))
    return found


def main() -> None:
    parser = arguments_parser(NAME, __doc__)
    options = parser.parse_args()
    rounds = options.rounds or (1 if options.quick else 31)
    results = Results(NAME, "Harvest and sync", "QEMU's loop in C, or read", {
        "rate": ("entries/s (million)", 1e-6, ",.0f"), "time": ("time (ms)", 1e3, ",.2f")})
    if shutil.which("gcc") is None:
        results.skipped = "no gcc to build QEMU's loop with (Debian: apt install gcc)"
    else:
        results.cases += harvest_cases(rounds)
    results.cases += sync_cases(rounds)
    results.save(options.output)
    results.show()


if __name__ == "__main__":
    main()
