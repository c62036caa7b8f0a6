"""Build the sample guests' images: ``python -m vmm.guests.build [--check]``.

Needs GNU as and ld (Debian: binutils). ``--check`` builds into a temporary folder and compares with the
images beside the sources. Another linker version may lay out the file's unloaded parts (section
headers) otherwise, so where the bytes differ, what the guest would find in memory decides.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..machine.loader import load_image

__all__ = ["SOURCE_DIR", "TOOLS", "BuildError", "build", "differing", "main", "missing_tools", "sources"]

SOURCE_DIR = Path(__file__).resolve().parent
TOOLS = ("as", "ld")
_TIMEOUT = 60  # seconds a tool may take


class BuildError(Exception):
    """A tool is missing or has failed; the text is fit for a user."""


def sources() -> list[Path]:
    """Every sample guest's source."""
    return sorted(SOURCE_DIR.glob("*.S"))


def missing_tools() -> list[str]:
    return [tool for tool in TOOLS if shutil.which(tool) is None]


def build(source: Path, target: Path) -> None:
    """Assemble and link one guest. Raises BuildError."""
    with tempfile.TemporaryDirectory(prefix="shardvmm-build-") as folder:
        unlinked = Path(folder) / "guest.o"
        _run("as", "--64", "-I", source.parent, "-o", unlinked, source)
        # -n: no page alignment within the file, so that an image is a few hundred bytes
        _run("ld", "-m", "elf_x86_64", "-static", "-n", "-s", "--build-id=none",
             "-T", SOURCE_DIR / "guest.ld", "-o", target, unlinked)
    target.chmod(0o644)  # it is data here, not a program of the host


def differing() -> list[str]:
    """Names of the committed images that are missing or are not what their source builds. Raises
    BuildError."""
    found = []
    with tempfile.TemporaryDirectory(prefix="shardvmm-build-") as folder:
        for source in sources():
            committed, fresh = source.with_suffix(".elf"), Path(folder) / f"{source.stem}.elf"
            build(source, fresh)
            if not committed.exists() or not _same(committed, fresh):
                found.append(source.stem)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vmm.guests.build",
                                     description="Build the images of the sample guests.")
    parser.add_argument("--check", action="store_true",
                        help="change nothing; fail if an image is out of date")
    check = parser.parse_args(arguments).check
    try:
        if check:
            stale = differing()
            for name in stale:
                print(f"{name}.elf does not match what {name}.S builds", file=sys.stderr)
            return 1 if stale else 0
        for source in sources():
            target = source.with_suffix(".elf")
            build(source, target)
            print(f"{target.name}: {target.stat().st_size} bytes")
    except BuildError as exc:
        print(exc, file=sys.stderr)
        return 2
    return 0


def _same(one: Path, two: Path) -> bool:
    if one.read_bytes() == two.read_bytes():
        return True
    a, b = load_image(one), load_image(two)
    return a.entry == b.entry and a.segments == b.segments


def _run(tool: str, *arguments: str | Path) -> None:
    try:
        subprocess.run([tool, *map(str, arguments)], check=True, capture_output=True, text=True,
                       timeout=_TIMEOUT)
    except FileNotFoundError:
        raise BuildError(f"'{tool}' is not installed (Debian: apt install binutils)") from None
    except subprocess.CalledProcessError as exc:
        raise BuildError(f"{tool} failed: {exc.stderr.strip()}") from None
    except subprocess.TimeoutExpired:
        raise BuildError(f"{tool} took longer than {_TIMEOUT} s") from None


if __name__ == "__main__":
    sys.exit(main())
