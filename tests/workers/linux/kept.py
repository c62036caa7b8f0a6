"""A system that can become data at any time, and go on from that over a copy of its memory."""

from __future__ import annotations

import ctypes
import errno
import itertools
from collections.abc import Sequence, Sized
from typing import Any

import msgspec
from system import FIRST, Ram
from twice import Console, Out, laid_out

from workers.linux.abi import number_of
from workers.linux.blocked import Again, Blocked, Ended
from workers.linux.chance import Chance
from workers.linux.frames import Frames
from workers.linux.processes import FileTable, Process, Thread
from workers.linux.space import PAGE, SegmentationFault, Space
from workers.linux.state import Saving
from workers.linux.system import System
from workers.linux.tables import Tables
from workers.linux.vdso import Vdso
from workers.linux.vfs import FileSystem

__all__ = ["FRAMES", "SECOND", "Machine", "packed"]

FRAMES = 700
SECOND = 10**9
_SCRATCH = 40           # pages
_TABLES = 400


def packed(saved: Any) -> Any:
    """As it is after a journey."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(saved))


class Launcher:
    """Of vCPUs there are enough, and they do nothing."""

    def __init__(self) -> None:
        self._word = ctypes.create_string_buffer(PAGE)

    def free_vcpus(self) -> int:
        return 1

    def launch(self, thread: Thread, registers: Sequence[int], fs_base: int) -> None:
        thread.registers = list(registers)

    def look_at(self, thread: Thread) -> None: ...

    def forget_space(self, space: Space) -> None:
        space.take_stale()

    def wrote(self, frame: int) -> None: ...

    def forget_tables(self) -> None: ...

    def host_address(self, frame: int, offset: int) -> int:
        return ctypes.addressof(self._word) + offset // 4 * 4


class Machine:
    """``now``: of its host's clocks, which go on by ``pass_time`` only; ``ahead``: how much more the monotonic one says
    on the host that it is on."""

    def __init__(self, *, console: Any = None, frames: int = FRAMES, tree: Any = None, program: bytes = b"") -> None:
        """``program``: of that tree."""
        self.now, self.ahead, self.count = 1000 * SECOND, 0, frames
        self.ram, pool, tables = Ram(), Frames(FIRST, frames), new_tables()
        files = FileSystem(self.ram, pool, clock=self.realtime, random=Chance(1), blocks=frames)
        if tree is not None:
            files.attach("root", tree)
            files.import_tree(files.root, "root")
        vdso = Vdso(self.ram, pool, monotonic=self.monotonic, realtime=self.realtime)
        self.system = System(self.ram, pool, tables, files, console or Console(), realtime=self.realtime,
                             monotonic=self.monotonic, threads_max=8, vdso=vdso)
        self.system.launcher = Launcher()
        if program:
            thread, _ = self.system.spawn(program, [b"program"], [b"A=1"])
            thread.registers = [0] * 18
            self.scratch = thread.process.space.map(0, _SCRATCH * PAGE, 3)
            return
        space = self.system.new_space()
        files.root.keep()
        process = Process(self.system.new_id(), 0, space, FileTable(1), files.root, mask=0, group=1, session=1)
        self.system.processes[process.pid] = process
        self.system.new_thread(process, b"first", process.pid).registers = [0] * 18
        self.scratch = space.map(0, _SCRATCH * PAGE, 3)
        vdso.map(space)
        space.set_heap(0x1000)

    def realtime(self) -> int:
        return 10**18 + self.now

    def monotonic(self) -> int:
        return self.now + self.ahead

    @property
    def thread(self) -> Thread:
        return self.system.threads[1]

    def call(self, name: str, *arguments: int | bytes | Out, tid: int = 1) -> Any:
        """What it gives, and what is then in each ``Out``; or how else it ends."""
        thread = self.system.threads[tid]
        space = thread.process.space
        try:
            values, outs = laid_out(space, self.scratch, arguments)
        except SegmentationFault:
            return "no memory"
        result = self.make(thread, name, values)
        if not isinstance(result, int) or result < 0 or thread.ended:
            return errno.errorcode[-result] if isinstance(result, int) and result < 0 else result
        try:
            return result, [space.read(*out) for out in outs]
        except SegmentationFault:
            return result

    def make(self, thread: Thread, name: str, values: Sequence[int]) -> Any:
        try:
            return self.system.call(thread, number_of(name), [*values, *[0] * (6 - len(values))])
        except Blocked as blocked:
            return "blocked", blocked.deadline and blocked.deadline - self.system.monotonic()
        except Ended:
            return "ended"
        except Again:
            return "again"

    def interrupt(self, tid: int) -> None:
        """The call that it is blocked in is over."""
        thread = self.system.threads[tid]
        thread.awaited = 0
        if thread.saved_mask is not None:
            thread.blocked, thread.saved_mask = thread.saved_mask, None
        self.system.give_up(thread)

    def pass_time(self, nanoseconds: int) -> None:
        self.now += nanoseconds
        self.system.expire()

    # --- as data ---------------------------------------------------------------------------------------------------

    def journey(self, ahead: int = 0, console: Any = None) -> None:
        """To a host whose monotonic clock says ``ahead`` more than the last one did."""
        saved = self.system.save()
        data = packed(saved)
        assert data == saved == self.system.save()
        before = self.system
        memory = {frame: bytes(each) for frame, each in self.ram.frames.items()}
        self.ram = Ram()
        for frame, each in memory.items():
            if any(each):
                self.ram.of(frame)[:] = each
        self.ahead += ahead
        self.system = System.load(data, self.ram, Frames(FIRST, self.count), new_tables(), console or Console(),
                                  realtime=self.realtime, monotonic=self.monotonic,
                                  sources=before.files.store.sources)
        self.system.launcher = Launcher()
        for tid, thread in self.system.threads.items():
            thread.registers = list(before.threads[tid].registers)
        again = self.system.save()
        assert again == saved, difference(again, saved)
        self.check_like(before)
        self.check_frames()

    def check_like(self, before: System) -> None:
        """Frames have their users, and entries say what they said."""
        now = self.system
        assert before.frames.free == now.frames.free
        assert before.frames._uses == now.frames._uses
        for pid, process in now.processes.items():
            old = before.processes[pid].space
            new = process.space
            assert (old.users, old.promised, old.heap, shapes(old)) == (new.users, new.promised, new.heap, shapes(new))
            for mapping in old.mappings:
                for page in range(mapping.start, mapping.end):
                    assert old._tables.get(old.root, page) == process.space._tables.get(process.space.root, page)
        for one, other in zip(objects(before), objects(now), strict=True):
            assert plain(one) == plain(other), (one, difference(plain(one), plain(other)))
        for number, inode in before.files.store.inodes.items():
            assert before.files.name_of(inode) == now.files.name_of(now.files.store.inodes[number])

    def check_frames(self) -> None:
        """Those that are free hold zeros."""
        frames = self.system.frames
        for frame, each in self.ram.frames.items():
            assert frames.uses(frame) or not any(each)

    def seen(self) -> Any:
        """Its state without which frames it is in."""
        saved = self.system.save()
        for inode in saved["files"]["inodes"]:
            for key in ("frames", "reserved"):
                if key in inode:
                    inode[key] = [self._contents(run) for run in inode[key]]
                    inode[key] = list(itertools.chain.from_iterable(inode[key]))
        for cut in saved["files"]["cut"]:
            cut[3] = cut[3] and len(cut[3])
        for space in saved["spaces"]:
            space["pages"] = list(itertools.chain.from_iterable(self._contents(run) for run in space["pages"]))
        del saved["vdso"]
        return saved

    def _contents(self, run: Sequence[int]) -> list[Any]:
        page, frame, count, *rest = run
        return [(page + at, bytes(self.ram.of(frame + at)).rstrip(b"\0"), *rest) for at in range(count)]


def new_tables() -> Tables:
    return Tables(memoryview(bytearray(_TABLES * PAGE)).cast("Q"), 1 << 40)


def objects(system: System) -> list[Any]:
    """What it consists of, in an order of its own."""
    saving = Saving(system)
    for process in system.processes.values():
        process.save(saving)
    system.network.save(saving)
    for table in saving.tables:
        table.save(saving)
    left = list(saving.files.values())
    while left:
        known = len(saving.files)
        for each in left:
            each.save_links(saving)
        left = list(saving.files.values())[known:]
    files = [saving.files[each] for each in sorted(saving.files)]
    return [*system.files.store.inodes.values(), *files, *saving.pipes, *saving.tables, *saving.spaces,
            *system.processes.values(), *system.threads.values(), system.network, system]


#: Of one machine, or of a call that is being made.
_OTHERS = {"root", "registers", "jumps", "new_space", "xsave"}
_PLAIN = (int, bytes, bytearray, str, type(None))


def plain(found: Any) -> dict[str, Any]:
    """All that it has and that is no other object."""
    names = {name for each in type(found).__mro__ for name in getattr(each, "__slots__", ())}
    names |= getattr(found, "__dict__", {}).keys()
    values = {name: getattr(found, name) for name in names - _OTHERS if hasattr(found, name)}
    return {"type": type(found).__name__, "names": sorted(values)} | {
        name: value if isinstance(value, _PLAIN) else len(value) if isinstance(value, Sized) else None
        for name, value in values.items() if name not in ("stale", "visitors", "notified", "_answers")}


def shapes(space: Space) -> list[Any]:
    return [(each.start, each.end, each.prot, each.shared, each.offset, each.name, each.grows)
            for each in space.mappings]


def difference(one: Any, other: Any, path: str = "") -> str:
    """Where two of them part."""
    if type(one) is not type(other):
        return f"{path}: {one!r:.300} {other!r:.300}"
    if isinstance(one, dict):
        for key in one.keys() | other.keys():
            if one.get(key) != other.get(key):
                return difference(one.get(key), other.get(key), f"{path}.{key}")
    if isinstance(one, (list, tuple)):
        for at, (left, right) in enumerate(zip(one, other, strict=False)):
            if left != right:
                return difference(left, right, f"{path}[{at}]")
        return f"{path}: {len(one)} {len(other)}"
    return f"{path}: {one!r:.300} {other!r:.300}"
