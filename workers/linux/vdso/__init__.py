"""The vDSO: a library that every program finds mapped, and reads the clocks with.

    vdso.c, vdso.ld     its source; vdso.so is what build.py makes of it
    page.py             where it is mapped, and the page that it computes with
    tsc.py              the counter that it reads
"""

from __future__ import annotations

from .page import Line, Vdso
from .tsc import counter

__all__ = ["Line", "Vdso", "counter"]
