"""Where things are in a checkout."""

from __future__ import annotations

from pathlib import Path

#: Modules that tests share are here.
TESTS = Path(__file__).parent
TOP = TESTS.parent
CONFIGS = TOP / "configs"
