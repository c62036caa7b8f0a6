"""A program that knows what it has written. Lines of standard input say what it does; it answers each with a line.

    map KIND PAGES          a mapping: anonymous, shared, memfd, file, private-file; its number and address
    fill N                  each page of mapping N is written
    write N PAGE...         these pages of it
    read N                  each page of it is read
    drop N                  its pages are thrown away (MADV_DONTNEED)
    huge N                  it may be of huge pages
    unmap N
    fork                    a child that writes the first page of each mapping, and ends
    child                   a child that lives until the end of this program; its process id
    exec                    another program in its place, which waits for the end of standard input
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import tempfile

PAGE = mmap.PAGESIZE


def made(kind: str, size: int) -> mmap.mmap:
    if kind == "anonymous":
        return mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if kind == "shared":
        return mmap.mmap(-1, size, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    with os.fdopen(os.memfd_create("written"), "r+b") if kind == "memfd" else tempfile.TemporaryFile() as file:
        fd = os.dup(file.fileno())
    os.truncate(fd, size)
    return mmap.mmap(fd, size, mmap.MAP_PRIVATE if kind == "private-file" else mmap.MAP_SHARED)


def main() -> None:
    there: list[mmap.mmap | None] = []
    print("ready", flush=True)
    for line in sys.stdin:
        verb, *words = line.split()
        answer = "done"
        if verb == "map":
            mapping = made(words[0], int(words[1]) * PAGE)
            there.append(mapping)
            answer = f"{len(there) - 1} {ctypes.addressof(ctypes.c_char.from_buffer(mapping))}"
        elif verb == "fork":
            child = os.fork()
            if child == 0:
                for each in filter(None, there):
                    each[0] = 99
                os._exit(0)
            os.waitpid(child, 0)
        elif verb == "child":
            answer = str(subprocess.Popen(["cat"], stdin=subprocess.PIPE).pid)
        elif verb == "exec":
            os.execv("/bin/cat", ["cat"])
        else:
            found = there[int(words[0])]
            assert found is not None
            pages = range(len(found) // PAGE)
            if verb in ("fill", "write"):
                for page in pages if verb == "fill" else map(int, words[1:]):
                    found[page * PAGE] = (found[page * PAGE] + 1) % 256
            elif verb == "read":
                answer = str(sum(found[page * PAGE] for page in pages))
            elif verb == "drop":
                found.madvise(mmap.MADV_DONTNEED)
            elif verb == "huge":
                found.madvise(mmap.MADV_HUGEPAGE)
            elif verb == "unmap":
                found.close()
                there[int(words[0])] = None
        print(answer, flush=True)


main()
