"""Build the peer's boot ROM: ``python -m benchmarks.peer.build [--check]``. Needs GNU as and ld."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from vmm.guests.build import SOURCE_DIR

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "rom.S"
ROM = HERE / "rom.bin"


def build(target: Path) -> None:
    """Raises CalledProcessError or FileNotFoundError."""
    with tempfile.TemporaryDirectory(prefix="shardvmm-build-") as folder:
        unlinked = Path(folder) / "rom.o"
        for command in (["as", "--64", "-I", SOURCE_DIR, "-o", unlinked, SOURCE],
                        ["ld", "-m", "elf_x86_64", "-static", "--oformat", "binary", "-T", HERE / "rom.ld",
                         "-o", target, unlinked]):
            subprocess.run([str(part) for part in command], check=True, timeout=60)
    target.chmod(0o644)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peer.build", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where the image is out of date")
    if not parser.parse_args().check:
        build(ROM)
        return 0
    with tempfile.TemporaryDirectory(prefix="shardvmm-build-") as folder:
        fresh = Path(folder) / ROM.name
        build(fresh)
        same = ROM.exists() and fresh.read_bytes() == ROM.read_bytes()
    if not same:
        print(f"{ROM.name} is not what {SOURCE.name} builds", file=sys.stderr)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
