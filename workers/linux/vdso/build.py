"""Build the vDSO's image: ``python -m workers.linux.vdso.build [--check]``.

Needs GCC and GNU ld (Debian: gcc, binutils). ``--check`` builds into a temporary folder and compares with the image
beside the source; another compiler makes other code of it, so that says something where both were made by the same.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from elftools.elf.elffile import ELFFile

__all__ = ["IMAGE", "BuildError", "build", "compiler", "is_stale", "main", "missing_tools"]

_FOLDER = Path(__file__).resolve().parent
IMAGE = _FOLDER / "vdso.so"
_TOOLS = ("gcc", "ld")
_TIMEOUT = 60       # seconds
# No data, no table of jumps, no register but the general ones: nothing to relocate, nothing to save.
_FLAGS = ("-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-ffreestanding", "-fno-builtin", "-fPIC", "-shared",
          "-nostdlib", "-fno-stack-protector", "-fcf-protection=none", "-fno-jump-tables", "-mgeneral-regs-only",
          "-fasynchronous-unwind-tables")
_LINKER_FLAGS = ("-soname=linux-vdso.so.1", "--hash-style=both", "--build-id=none", "--eh-frame-hdr", "-Bsymbolic",
                 "-znoexecstack", "-zmax-page-size=4096", "--no-undefined", "--orphan-handling=error", "-s")


class BuildError(Exception):
    """A tool is missing or has failed; the text is fit for a user."""


def missing_tools() -> list[str]:
    return [tool for tool in _TOOLS if shutil.which(tool) is None]


def build(target: Path) -> None:
    """Raises BuildError."""
    missing = missing_tools()
    if missing:
        raise BuildError(f"not installed: {', '.join(missing)} (Debian: apt install gcc binutils)")
    # By their names here: what the image says does not depend on where the checkout is.
    command = ["gcc", *_FLAGS, f"-Wl,-T,vdso.ld,{','.join(_LINKER_FLAGS)}", "-o", str(target), "vdso.c"]
    try:
        subprocess.run(command, cwd=_FOLDER, check=True, capture_output=True, text=True, timeout=_TIMEOUT)
    except subprocess.CalledProcessError as exc:
        raise BuildError(f"gcc failed: {exc.stderr.strip()}") from None
    except subprocess.TimeoutExpired:
        raise BuildError(f"gcc took longer than {_TIMEOUT} s") from None
    target.chmod(0o644)     # it is data here


def compiler(image: Path) -> bytes:
    """What has made it, as it says itself."""
    with image.open("rb") as file:
        section = ELFFile(file).get_section_by_name(".comment")
        return section.data() if section else b""


def is_stale() -> bool:
    """The image is missing, or is not what its source builds. Raises BuildError."""
    with tempfile.TemporaryDirectory(prefix="shardvmm-build-") as folder:
        fresh = Path(folder) / "vdso.so"
        build(fresh)
        return not IMAGE.exists() or IMAGE.read_bytes() != fresh.read_bytes()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m workers.linux.vdso.build", description="Build the vDSO.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the image is out of date")
    check = parser.parse_args(arguments).check
    try:
        if check:
            if is_stale():
                print("vdso.so does not match what vdso.c builds", file=sys.stderr)
                return 1
            return 0
        build(IMAGE)
    except BuildError as exc:
        print(exc, file=sys.stderr)
        return 2
    print(f"{IMAGE.name}: {IMAGE.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
