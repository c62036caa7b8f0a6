"""Machine code for what Python is too slow for.

    atomics.py      atomic loads and stores, for Numba
    streaming.py    memory that no cache can hold, for Numba
    loops.py        the hot loops of rings and bitmaps, as Numba compiles them (imported to compile only)
    kept.py         compiled code on disk
    loader.py       it is compiled and kept, or loaded without the compiler
    calls.py        the loops, to call: import it late, the first import ever compiles

An accelerator's own loops are beside it, in the same two halves (workers/accel).
"""
