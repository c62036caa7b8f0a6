"""Modes of dirty tracking, one file each: what it needs, how it gathers what was dirtied, how a machine changes to
it.

    base.py                                 what each has
    ring.py, bitmap.py, uffd.py, none.py    the modes
    modes.py                                which there are, by name
    auto.py                                 which one a machine should have now (no I/O)
    switch.py                               from one to another, with nothing lost
"""
