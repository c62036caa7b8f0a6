"""What the replay accelerator's compiled loops know: plain C structures as numpy records."""

from __future__ import annotations

from enum import IntEnum

import numpy as np

__all__ = ["PRODUCER", "QUANTILES", "SLOT", "Left", "Pattern"]

#: Equal steps of probability between the quantiles of a Zipf distribution.
QUANTILES = 1 << 14


class Pattern(IntEnum):
    """Which page is written next. *k* counts the writes of a phase, *n* the pages of the vCPU's share."""

    SEQUENTIAL = 0      # k mod n
    STRIDED = 1         # k * stride mod n
    RANDOM = 2          # uniform
    ZIPF = 3            # the quantile of a uniform number
    TRACE = 4           # as recorded


class Left(IntEnum):
    """Why ``produce`` (workers/accel/replay/calls.py) has come back."""

    DONE = 0            # it has made its writes
    FULL = 1            # soft-full
    KICKED = 2          # asked out, or at the push limit


#: A memory slot. The pages of all slots, in the order of the machine's file, are numbered through.
SLOT = np.dtype([
    ("first", np.uint64), ("end", np.uint64),       # its pages among all
    ("id", np.uint64),
    ("logged", np.uint64),
    ("record", np.int64),           # address of the words of the verifier's record; 0: none is kept
    ("summary", np.int64),          # and of its summary (ipc/bitmap.py)
])

#: What a producer knows. Written by the vCPU thread but where it says otherwise. Addresses are int64.
PRODUCER = np.dtype([
    ("ring", np.int64), ("entries", np.uint64),
    ("soft_limit", np.uint64),      # entries in use at which the vCPU is to be left
    ("pushed", np.uint64),          # entries, since the ring was built
    ("push_limit", np.uint64),      # value of ``pushed`` at which it is to be left (dirty limit)
    ("reset", np.int64),            # address of the count of entries reset (u64, by the service thread)
    ("immediate_exit", np.int64),   # address of the control block's flag (u32)
    ("pushed_total", np.int64),     # address of the control block's
    ("pushed_bits", np.int64),      # address of a bit a page of the share; 0: every write makes an entry
    ("reset_bits", np.int64),
    ("slots", np.int64), ("slot_count", np.int64),      # address of SLOT records
    ("first", np.uint64), ("pages", np.uint64),         # this vCPU's share
    ("seed", np.uint64),
    ("written", np.uint64),         # writes made in all
    # the phase
    ("pattern", np.int64),
    ("cursor", np.uint64),          # sequential, strided: the next page of the share; trace: the next entry
    ("stride", np.uint64),
    ("quantiles", np.int64),        # address of QUANTILES + 1 float64
    ("trace", np.int64),            # address of the trace's entries, uint64: slot id << 48 | page
])
