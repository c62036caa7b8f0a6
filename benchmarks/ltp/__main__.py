"""The Linux Test Project's tests of system calls, each natively and in a machine, in the same root.
``python -m benchmarks ltp --built DIR [--only NAME,NAME]``

DIR is LTP's source with static programs built in it (docs/linux-ltp.md says how). It takes root, for the native run's
namespaces. The table goes to docs/linux-ltp.md; with ``--only`` or ``--again``, lines of it are put in place of
what was there.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from vmm.errors import VmmError

from .running import Outcome, Test, found_tests, inside, natively, root_of_tests
from .tables import Row, text_of
from .wanted import FOLDERS, NOT_HERE

_DOCS = Path(__file__).parents[2] / "docs" / "linux-ltp.md"
_RESULTS = Path(__file__).parents[1] / "results" / "ltp.json"


def main() -> int:
    parser = argparse.ArgumentParser(prog="ltp", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--built", type=Path, required=True, help="LTP's directory")
    parser.add_argument("--only", help="names of tests, or directories of testcases/kernel/syscalls, with commas")
    parser.add_argument("--seconds", type=int, default=100, help="for each test")
    parser.add_argument("--batch", type=int, default=40, help="tests in one machine")
    parser.add_argument("--show", action="store_true", help="what tests that passed natively alone have said inside")
    parser.add_argument("--again", action="store_true", help="only those that did not pass inside before")
    options = parser.parse_args()
    rows = kept()
    try:
        root = root_of_tests(options.built, FOLDERS)
        tests = chosen(found_tests(options.built, FOLDERS), options.only, rows if options.again else None)
        for at in range(0, len(tests), options.batch):
            part = tests[at:at + options.batch]
            found = tried(root, part, options.seconds)
            keep([Row.of(*each) for each in found])
            for test, native, ours in found:
                if native.passed and not ours.passed:
                    print(f"{test.name}: {ours.kind} inside", flush=True)
                    if options.show:
                        print(ours.output, flush=True)
            print(f"{at + len(part)} of {len(tests)}", flush=True)
    except VmmError as exc:
        print(exc, file=sys.stderr)
        return 1
    return 0


def chosen(tests: Sequence[Test], only: str | None, before: dict[str, Row] | None) -> list[Test]:
    """Raises VmmError."""
    found = [test for test in tests if test.name not in NOT_HERE]
    if only:
        names = set(only.split(","))
        found = [test for test in found if {test.name, test.about} & names]
    if before is not None:
        found = [test for test in found if test.name not in before or before[test.name].differs]
    if not found:
        raise VmmError("there are no such tests")
    return found


def tried(root: Path, tests: Sequence[Test], seconds: int) -> list[tuple[Test, Outcome, Outcome]]:
    """Natively in turn; inside in one machine, and in another one those that one has not come to."""
    native, ours = natively(root, tests, seconds), inside(root, tests, seconds)
    while left := [test for test in tests if test.name not in ours]:
        ours |= inside(root, left, seconds)
    while left := [test for test in tests if test.name not in native]:
        native |= natively(root, left, seconds)
    return [(test, native[test.name], ours[test.name]) for test in tests]


def kept() -> dict[str, Row]:
    """The results so far."""
    return {row["name"]: Row(**row) for row in json.loads(_RESULTS.read_text())} if _RESULTS.exists() else {}


def keep(rows: Sequence[Row]) -> None:
    """They are in the results, and the table is made of all of them. Others may do the same."""
    with _DOCS.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = kept() | {row.name: row for row in rows}
        there = [found[name] for name in sorted(found)]
        _RESULTS.write_text(json.dumps([row.data() for row in there], indent=1) + "\n")
        head, mark, _ = _DOCS.read_text().partition("## Results\n")
        _DOCS.write_text(f"{head}{mark}\n{text_of(there)}")


if __name__ == "__main__":
    sys.exit(main())
