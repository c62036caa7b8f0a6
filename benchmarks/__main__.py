"""Run benchmarks: ``python -m benchmarks [NAME ...] [--quick] [--output DIR]``; without a name all but ``programs`` and
``ltp``.

``python -m benchmarks NAME --help`` tells what a benchmark compares, how, and its further options.
"""

from __future__ import annotations

import runpy
import sys

NAMES = ("dirtying", "migration", "harvest", "coordinator", "replay", "dirty_limit", "snapshot", "tracking",
         "tracked", "log_cost", "linux", "predict", "watch", "fleet")
#: Only by their names: they take hours.
LONG = ("programs", "ltp")


def main() -> int:
    options = sys.argv[1:]
    names = []
    while options and not options[0].startswith("-"):
        names.append(options.pop(0))
    unknown = [name for name in names if name not in NAMES + LONG]
    if unknown or (not names and {"-h", "--help"} & set(options)):
        print(__doc__, f"There are: {', '.join(NAMES + LONG)}", sep="\n", file=sys.stderr)
        return 2 if unknown else 0
    for name in names or NAMES:
        print(f"--- {name}", flush=True)
        sys.argv = [name, *options]
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
