"""What the software CPU's native hooks know of their machine: plain C structures as numpy records.

The run loop (workers/accel/unicorn/cpu.py, pages.py) fills them in while the guest stands still; the hooks
(workers/accel/unicorn/hooks.py) read the same memory. Addresses are int64.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

import numpy as np

__all__ = ["CONTEXT", "FRAME", "LOCKED", "NO_EXECUTE", "PAGE_CODE", "PAGE_LOGGED", "PRESENT", "SEEN", "SEEN_BLOCKS",
           "SLOT", "TRANSLATION", "USER", "WRITABLE", "LockedOp", "Stop"]

#: Flags of a guest page, one byte a page.
PAGE_LOGGED = 1     # its next write needs no log entry: it has one, or its slot is not logged
PAGE_CODE = 2       # a block that was looked at lies in it

#: Bits of an entry of a program's page tables (Intel SDM 3A, 4.5.4).
PRESENT, WRITABLE, USER, NO_EXECUTE = 1 << 0, 1 << 1, 1 << 2, 1 << 63
FRAME = 0x000F_FFFF_FFFF_F000

#: Entries of the table of blocks looked at (a power of two; it is emptied when half full).
SEEN_BLOCKS = 1 << 16


class Stop(IntFlag):
    """Why the guest is to be left before its next block (CONTEXT ``stop``)."""

    FULL = 1            # soft-full, or the dirty limit's slice is over
    UNSEEN = 2          # a block that was not looked at yet
    SPECIAL = 4         # an instruction that the run loop carries out itself
    CODE_WRITTEN = 8    # the guest wrote over code that was looked at
    CALL = 16           # a system call of a Linux program
    FAULT = 32          # a locked instruction of one may not access its operand
    CHANGED = 64        # a block of one that was looked at has other code now


class LockedOp(IntEnum):
    """Instructions that are atomic on memory (Intel SDM vol. 2, LOCK prefix; XCHG is so without one),
    and MFENCE."""

    ADD = 0
    OR = 1
    ADC = 2
    SBB = 3
    AND = 4
    SUB = 5
    XOR = 6
    INC = 7
    DEC = 8
    NOT = 9
    NEG = 10
    XCHG = 11
    CMPXCHG = 12
    XADD = 13
    BTS = 14
    BTR = 15
    BTC = 16
    CMPXCHG8B = 17
    CMPXCHG16B = 18
    FENCE = 19


#: A RAM slot.
SLOT = np.dtype([
    ("gpa", np.int64), ("end", np.int64),
    ("host", np.int64),             # address of its first byte in this process
    ("flags", np.int64),            # address of its page flags
    ("id", np.int64),
])

#: uc_tlb_entry: where a page is, and what may be done with it.
TRANSLATION = np.dtype([("address", np.uint64), ("rights", np.int32)], align=True)

#: A block looked at. ``sum``: of its code, where a program may write to that; else 0.
SEEN = np.dtype([("address", np.uint64), ("size", np.uint64), ("sum", np.uint64)])

CONTEXT = np.dtype([
    # libunicorn's functions
    ("emu_stop", np.int64), ("reg_read", np.int64), ("reg_write", np.int64),
    # leaving the guest
    ("immediate_exit", np.int64),   # address of the control block's flag (u32)
    ("hold", np.uint64),            # not 0: the service thread wants the guest out for a moment
    ("stop", np.uint64),            # Stop; set by hooks alone, cleared by the run loop
    ("block", np.uint64), ("block_size", np.uint64),    # with UNSEEN, CHANGED
    ("special", np.uint64),         # with SPECIAL: the instruction's address
    # memory
    ("slots", np.int64), ("slot_count", np.int64),      # address of SLOT records
    ("last_slot", np.int64),        # index of the slot written last, tried first
    ("cr3", np.uint64),             # of the identity map
    # a Linux program: its page tables, and an access that they do not allow
    ("root", np.uint64),            # GPA of the first table; 0: the guest is none
    ("tables", np.int64), ("tables_gpa", np.uint64), ("tables_end", np.uint64),    # the system slot: address, GPAs
    ("fault_vector", np.uint64), ("fault_error", np.uint64), ("fault_address", np.uint64),
    ("seen", np.int64),             # address of SEEN records, SEEN_BLOCKS of them
    ("seen_count", np.uint64),
    # ring
    ("ring", np.int64),             # address of its entries; 0: no ring
    ("entries", np.uint64),
    ("soft_limit", np.uint64),      # entries in use at which the guest is to be left
    ("pushed", np.uint64), ("reset", np.uint64),
    ("push_limit", np.uint64),      # value of ``pushed`` at which the guest is to be left (dirty limit)
    ("pushed_total", np.int64),     # address of the control block's
    ("overflowed", np.uint64),      # entries there was no room for: the ring has lost count
    # scratch of the locked instructions: a register on its way, wanted and new value of 16 bytes
    ("exchange", np.uint64),
    ("wanted", np.uint64, (2,)), ("new", np.uint64, (2,)),
])

#: A locked instruction, decoded. Registers are Unicorn's numbers; 0 is none.
LOCKED = np.dtype([
    ("context", np.int64),          # address of the CONTEXT
    ("op", np.int64), ("size", np.int64),   # LockedOp; bytes of the memory operand
    ("next", np.uint64),            # address of the next instruction
    ("segment_base", np.int64),     # FS_BASE or GS_BASE
    ("base", np.int64), ("index", np.int64), ("scale", np.uint64),
    ("displacement", np.uint64),    # two's complement; for RIP-relative operands the absolute address
    ("address_mask", np.uint64),    # 2**32 - 1 with 32-bit addresses
    ("source", np.int64),           # source register, of the operand's size; 0: the immediate
    ("immediate", np.uint64),
    ("target", np.int64),           # where XCHG and XADD put the old value: the source register, but of
                                    # a 4-byte one the 64-bit whole, whose upper half they clear
])
