"""/proc and /sys as programs have them: what is known here, under the names that Linux gives it (proc(5)).

    entries.py      how a tree of them is written down
    machine.py      processors, memory, time, settings; /sys
    processes.py    what there is of a process
    maps.py         its mappings
"""

from __future__ import annotations

from .mount import mount

__all__ = ["mount"]
