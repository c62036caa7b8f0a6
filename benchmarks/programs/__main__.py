"""Programs that nobody here wrote, unmodified, each in a machine and natively in the same root of Debian packages:
equal output, equal exit status, equal files (their sums are in the output), and the verifier finds no lost page.
``python -m benchmarks programs [--runs 10] [--only NAME,NAME]``

Roots are made when they are not there (.packages in the checkout); that takes root, and apt-get. The table goes to
docs/linux-programs.md; with ``--only``, lines of it are put in place of what was there.
"""

from __future__ import annotations

import argparse
import difflib
import fcntl
import json
import statistics
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vmm.errors import VmmError

from .cases import CASES
from .compare import Case, inside, natively, prepared, version_of

_DOCS = Path(__file__).parents[2] / "docs" / "linux-programs.md"
_RESULTS = Path(__file__).parents[1] / "results" / "programs.json"
_LINES_SHOWN = 20


@dataclass
class Row:
    """What there is to say of a program."""

    name: str
    what: str
    version: str = ""
    runs: int = 0
    equal: int = 0
    dirtied: list[int] = field(default_factory=list)
    lost: int = 0
    unchecked: int = 0
    seconds: list[float] = field(default_factory=list)
    native_seconds: float = 0.0
    missing: dict[str, int] = field(default_factory=dict)
    remarks: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="programs", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"some of {', '.join(each.name for each in CASES)}, with commas between them")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="one run of each")
    parser.add_argument("--more", action="store_true", help="add the runs to those that the table has")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else [each.name for each in CASES]
    unknown = set(names) - {each.name for each in CASES}
    if unknown:
        parser.error(f"no such program: {', '.join(sorted(unknown))}")
    good = True
    for case in CASES:
        if case.name in names:
            before = kept().get(case.name) if options.more else None
            row = tried(case, 1 if options.quick else options.runs, before)
            good &= row.equal == row.runs and not row.lost and not row.unchecked
            keep(row)
    return 0 if good else 1


def tried(case: Case, runs: int, before: Row | None) -> Row:
    row = before or Row(case.name, case.what)
    try:
        root = prepared(case)
    except VmmError as exc:
        row.remarks = f"not run: {exc}"
        return row
    row.version = version_of(case)
    native = natively(root, case)
    wanted, row.native_seconds = native.compared(case.differs), round(native.seconds, 2)
    print(f"{case.name}: natively {native.seconds:.1f} s, {wanted.count(chr(10))} lines, exit status {native.code}",
          flush=True)
    missing = Counter(row.missing)
    for _ in range(runs):
        ran = inside(root, case)
        row.runs += 1
        found = ran.compared(case.differs)
        row.equal += found == wanted
        row.seconds.append(round(ran.seconds, 1))
        check = ran.report.get("verification", {})
        row.lost += check.get("lost_pages", 0)
        row.unchecked += not check.get("ok")
        row.dirtied.append(sum(each["dirty_pages"] for each in ran.report.get("vcpus", [])))
        missing.update(ran.report.get("program", {}).get("missing_calls", {}))
        refused = ran.report.get("program", {}).get("refused_threads", 0)
        print(f"{case.name}: {'equal' if found == wanted else 'DIFFERENT'}, {ran.seconds:.1f} s, "
              f"{row.dirtied[-1]} pages, {check.get('lost_pages', '?')} lost, missing {dict(missing)}"
              + (f", {refused} threads refused" if refused else ""), flush=True)
        if found != wanted:
            for line in list(difflib.unified_diff(wanted.splitlines(), found.splitlines(), "natively", "inside",
                                                  lineterm="", n=1))[:_LINES_SHOWN]:
                print("   ", line)
            print(ran.error.decode(errors="replace")[-1500:], flush=True)
    row.missing = dict(missing)
    return row


def kept() -> dict[str, Row]:
    """The results so far."""
    return {row["name"]: Row(**row) for row in json.loads(_RESULTS.read_text())} if _RESULTS.exists() else {}


def keep(row: Row) -> None:
    """It is in the results, and the table is made of all of them. Others may do the same."""
    with _DOCS.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = {**kept(), row.name: row}
        there = [rows[each.name] for each in CASES if each.name in rows]
        _RESULTS.write_text(json.dumps([asdict(each) for each in there], indent=1) + "\n")
        head, mark, _ = _DOCS.read_text().partition("| program |")
        _DOCS.write_text("\n".join([
            head + mark + " version | runs equal | pages dirtied | pages lost | time, natively | remarks |",
            "| --- | --- | --- | --- | --- | --- | --- |", *map(line, there)]) + "\n")


def line(row: Row) -> str:
    """Of the table."""
    low, high = min(row.dirtied, default=0), max(row.dirtied, default=0)
    said = [row.remarks, next(each.remark for each in CASES if each.name == row.name)]
    if row.missing:
        said.append("not served: " + ", ".join(f"`{name}`" for name in sorted(row.missing)))
    return (f"| **{row.name}**: {row.what} | {row.version} | {row.equal} of {row.runs} | "
            + (f"{low:,}" if low == high else f"{low:,} to {high:,}")
            + f" | {row.lost}{' (not verified)' * bool(row.unchecked)} | "
            + (f"{statistics.median(row.seconds):.1f} s" if row.seconds else "")
            + f", {row.native_seconds:.1f} s | {'; '.join(filter(None, said))} |")


if __name__ == "__main__":
    sys.exit(main())
