"""What is beneath a program, without a machine: frames as byte arrays, tables in an array."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

from workers.linux.frames import Frames, Run
from workers.linux.space import PAGE, Space
from workers.linux.tables import Tables

__all__ = ["FIRST", "File", "Ram", "System"]

FIRST = 1000        # frame


class Ram:
    """Frames as a bytearray each; ``log``: of those that were written to."""

    def __init__(self) -> None:
        self.frames: dict[int, bytearray] = {}
        self.log: set[int] = set()

    def of(self, frame: int) -> bytearray:
        return self.frames.setdefault(frame, bytearray(PAGE))

    def read(self, frame: int, offset: int, count: int) -> bytes:
        return bytes(self.of(frame)[offset:offset + count])

    def write(self, frame: int, offset: int, data: bytes | memoryview) -> None:
        self.of(frame)[offset:offset + len(data)] = data
        self.log.add(frame)

    def copy(self, source: int, target: int) -> None:
        self.of(target)[:] = self.of(source)
        self.log.add(target)

    def clear(self, runs: list[Run], visitors: Iterable[int] = ()) -> None:
        for first, count in runs:
            for frame in range(first, first + count):
                self.of(frame)[:] = bytes(PAGE)
                self.log.add(frame)


@dataclass(eq=False)
class File:
    """Its pages are in frames of the same memory, each used once by the file itself."""

    frames: list[int]
    contents: bytes
    mapped: int = 0

    @property
    def size(self) -> int:
        return len(self.contents)

    def frame(self, page: int) -> int:
        if page >= len(self.frames):
            raise IndexError
        return self.frames[page]

    def keep_mapped(self) -> None:
        self.mapped += 1

    def let_go_mapped(self) -> None:
        self.mapped -= 1

    def read(self, offset: int, count: int) -> bytes:
        return self.contents[offset:offset + count]


@dataclass
class System:
    """And an address space."""

    frames: int = 96
    tables: int = 64        # pages
    limit: int = 1 << 40
    ram: Ram = field(default_factory=Ram)

    def __post_init__(self) -> None:
        self.page_tables = Tables(memoryview(array("Q", bytes(self.tables * PAGE))), 1 << 40)
        self.pool = Frames(FIRST, self.frames)
        self.space = Space(self.ram, self.pool, self.page_tables, self.limit)

    def file(self, contents: bytes) -> File:
        taken = [frame for first, count in self.pool.take(-(-len(contents) // PAGE))
                 for frame in range(first, first + count)]
        for index, frame in enumerate(taken):
            self.ram.write(frame, 0, contents[index * PAGE:(index + 1) * PAGE])
        return File(taken, contents)
