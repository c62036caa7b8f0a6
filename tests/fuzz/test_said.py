"""What other processes say: a migration's two ends, workers and coordinator, clients at the control socket; and what
a worker may have written into its ring."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy as np
import pytest
import xxhash
from caller import Caller
from damage import changed, damaged, odd
from hypothesis import given
from hypothesis import strategies as st
from machines import ANY, spec
from msgspec import inspect
from surface import Surface

from ipc import messages
from ipc.bitmap import Bitmap, bitmap_bytes, slot_table
from ipc.compiled import calls
from ipc.layout import MAX_SLOTS, VcpuControl, control_size, vcpu_control
from ipc.shm import Segment
from vmm.client.machine import Machine
from vmm.consumers.migration import wire
from vmm.coordinator.core import Core
from vmm.coordinator.status import _vcpu_report
from vmm.errors import VmmError
from vmm.machine import verbs
from vmm.machine.names import machine_dir, segment_name
from vmm.machine.records import log_path
from vmm.machine.spec import MachineSpec
from vmm.vcpus.handle import VcpuHandle

SPEC = spec("stamp", accel="kvm", vcpus=1)


def example(kind: type) -> Any:
    """One of the type, of plain values; with every field."""
    return plain(msgspec.inspect.type_info(kind))


def plain(kind: Any) -> Any:
    """A value of the type, as it is sent."""
    match kind:
        case inspect.Metadata():
            return plain(kind.type)
        case inspect.StructType() if kind.cls is MachineSpec:
            return msgspec.to_builtins(SPEC)
        case inspect.StructType():
            made = {field.encode_name: plain(field.type) for field in kind.fields}
            if kind.cls in (wire.Offer, wire.Commit, wire.Check):
                made["version"] = wire.VERSION
            return {kind.tag_field: kind.tag, **made} if kind.tag_field else made
        case inspect.UnionType():
            return plain(kind.types[0])
        case inspect.LiteralType():
            return kind.values[0]
        case inspect.EnumType():
            return next(iter(kind.cls)).value
        case inspect.BoolType():
            return True
        case inspect.IntType():
            return 1
        case inspect.FloatType():
            return 1.0
        case inspect.StrType():
            return "1"
        case inspect.BytesType():
            return b"\x01\x00\x00\x00"
        case inspect.ListType():
            return []
        case inspect.DictType():
            return {}
    raise AssertionError(f"no example of {kind}")


def of_union(union: Any) -> list[Any]:
    return [example(each) for each in union.__args__]


def packed(document: Any) -> bytes | None:
    try:
        return msgspec.msgpack.encode(document, enc_hook=repr)
    except (TypeError, ValueError, OverflowError, RecursionError):
        return None


def taken_by(document: Any, *readers: Callable[[], object]) -> None:
    """One of them takes it."""
    said = []
    for read in readers:
        try:
            read()
            return
        except (wire.WireError, messages.MessageError) as error:
            said.append(str(error))
    raise AssertionError(f"{document}: {said}")


def frames_like(seeds: list[Any]) -> st.SearchStrategy[bytes | None]:
    """None: of a document that no frame can hold."""
    return st.one_of(changed(seeds).map(packed), damaged([packed(each) or b"" for each in seeds]))


GUARD = 4096        # bytes before and after a bitmap


def fence(maps: Segment, size: int) -> None:
    """A bitmap of ``size`` bytes, empty, and a guard on either side."""
    maps.buf[:] = b"\xa5" * GUARD + bytes(size) + b"\xa5" * (len(maps.buf) - GUARD - size)


def check_fence(maps: Segment, size: int) -> None:
    assert maps.buf[:GUARD] == b"\xa5" * GUARD
    assert maps.buf[GUARD + size:] == b"\xa5" * (len(maps.buf) - GUARD - size)


def test_migration_messages(surface: Surface) -> None:
    """Both ends' ways of reading; the checksum is right."""
    seeds = [*of_union(wire.Message), *of_union(wire.OnStream), *of_union(wire.Answer)]
    for each in seeds:      # as they are they must be taken, or nothing behind the first look is tried
        frame = packed(each) or b""
        digest = xxhash.xxh3_64_digest(frame)
        taken_by(each, lambda frame=frame, digest=digest: wire.decode_message(frame, digest),
                 lambda frame=frame, digest=digest: wire.decode_stream(frame, digest),
                 lambda frame=frame, digest=digest: wire.decode_answer([frame, digest]))

    @surface.settings()
    @given(frames_like(seeds))
    def try_it(data: bytes | None) -> None:
        if data is None:
            return
        digest = xxhash.xxh3_64_digest(data)
        surface.read(lambda: wire.decode_message(data, digest), wire.WireError)
        surface.read(lambda: wire.decode_stream(data, digest), wire.WireError)
        surface.read(lambda: wire.decode_answer([data, digest]), wire.WireError)

    try_it()


def test_worker_messages(surface: Surface) -> None:
    union = [messages.AnyRequest, messages.AnyReply, messages.AnyNotification]
    seeds = [each for kind in union for each in of_union(kind)]
    decoders = (messages.decode_request, messages.decode_reply, messages.decode_notification)
    for each in seeds:
        taken_by(each, *(functools.partial(decode, packed(each) or b"") for decode in decoders))

    @surface.settings()
    @given(frames_like(seeds))
    def try_it(data: bytes | None) -> None:
        if data is None:
            return
        for decode in (*decoders, messages.decode_spec):
            surface.read(lambda decode=decode: decode(data), messages.MessageError)     # type: ignore[misc]

    try_it()


@pytest.mark.parametrize("tag", ["a\nb", "\x1b[2J", "x" * 10_000])
def test_a_word_of_a_message_stays_within_the_line_that_refuses_it(surface: Surface, tag: str) -> None:
    frame = msgspec.msgpack.encode({"t": tag})
    for decode in (messages.decode_request, messages.decode_reply, messages.decode_notification):
        surface.read(lambda decode=decode: decode(frame), messages.MessageError)    # type: ignore[misc]
    surface.read(lambda: wire.decode_message(frame, xxhash.xxh3_64_digest(frame)), wire.WireError)
    surface.read(lambda: wire.decode_answer([frame, b""]), wire.WireError)
    request = json.dumps({"v": verbs.CONTROL_VERSION, "id": 1, "verb": tag}).encode()
    surface.read(lambda: verbs.decode_verb(request), VmmError)
    assert surface.counts["refused"] == 6


def test_ring_entries(surface: Surface) -> None:
    """Whatever a worker writes into its ring: no bit is set but of pages that there are, and nothing beside the
    bitmaps is written to."""
    entries, pages = 16, 130
    size = bitmap_bytes(pages)
    with (Segment.create(segment_name("test-fuzz", "ring"), entries * 16) as ring,
          Segment.create(segment_name("test-fuzz", "maps"), 2 * GUARD + size) as maps):
        table = slot_table(MAX_SLOTS)
        bitmap = Bitmap(maps, GUARD, pages)     # a view: the segment is unmapped when it has gone
        table[3] = (bitmap.words_address, bitmap.summary_address, pages)
        entry = st.tuples(st.integers(0, 2**32 - 1) | st.integers(0, 3),
                          st.sampled_from([0, 3, 4, 2**16 + 3, 2**32 - 1]),
                          st.integers(0, 2**64 - 1) | st.integers(0, 200))

        @surface.settings()
        @given(st.lists(entry, min_size=entries, max_size=entries), st.integers(0, 2**64 - 1), st.integers(0, entries))
        def try_it(found: list[tuple[int, int, int]], fetch: int, limit: int) -> None:
            fence(maps, size)
            ring.buf[:entries * 16] = b"".join(struct.pack("<IIQ", *each) for each in found)
            out = np.zeros(4, np.uint64)
            surface.read(lambda: calls.harvest(ring.address, entries, fetch, limit, table.ctypes.data, MAX_SLOTS,
                                               out.ctypes.data))
            check_fence(maps, size)
            there = {offset for flags, slot, offset in found if slot == 3 and offset < pages and flags & 3}
            assert set(np.flatnonzero(bitmap.bools()).tolist()) <= there
            assert int(out[0]) <= limit

        try_it()


def test_control_blocks(surface: Surface) -> None:
    """Whatever a worker writes over its block and its ring: the coordinator's end of both takes it, and writes to
    nothing but that block and the bitmaps of pages that there are."""
    entries, pages, room = 16, 130, ctypes.sizeof(VcpuControl)
    size = bitmap_bytes(pages)
    with (Segment.create(segment_name("test-fuzz", "control"), control_size(2)) as control,
          Segment.create(segment_name("test-fuzz", "ring"), entries * 16) as ring,
          Segment.create(segment_name("test-fuzz", "maps"), 2 * GUARD + size) as maps):
        table = slot_table(MAX_SLOTS)
        bitmap = Bitmap(maps, GUARD, pages)
        table[0] = (bitmap.words_address, bitmap.summary_address, pages)
        begin = ctypes.addressof(vcpu_control(control.address, 0)) - control.address
        rest = b"\xa5" * (len(control.buf) - begin - room)
        odd_words = st.lists(st.sampled_from([0, 1, 2, 16, 17, 2**31, 2**32 - 1, 2**63, 2**64 - 1]),
                             min_size=room // 8, max_size=room // 8)
        small = odd_words.map(lambda words: struct.pack(f"<{room // 8}Q", *words))
        entry = st.tuples(st.integers(0, 3), st.sampled_from([0, 3, 2**16]), st.integers(0, 140))
        one_kind = entry.map(lambda each: [each] * entries)     # none is free, say

        @surface.settings()
        @given(st.one_of(st.binary(min_size=room, max_size=room), small),
               st.lists(entry, min_size=entries, max_size=entries) | one_kind, st.booleans())
        def try_it(found: bytes, ring_entries: list[tuple[int, int, int]], collected: bool) -> None:
            control.buf[:] = b"\xa5" * len(control.buf)
            control.buf[begin:begin + room] = found
            fence(maps, size)
            ring.buf[:entries * 16] = b"".join(struct.pack("<IIQ", *each) for each in ring_entries)
            vcpu = VcpuHandle(0, vcpu_control(control.address, 0), entries)
            vcpu.control.collected = collected

            def use() -> None:
                vcpu.ring.map_segment(ring)
                assert 0 <= vcpu.ring.harvest(table.ctypes.data) <= entries
                vcpu.ring.reported_full()
                vcpu.ring.ask_reset(vcpu.ring.outstanding if vcpu.ring.countable else 0)
                vcpu.ring.await_reset(0.0)
                vcpu.kick()
                msgspec.json.encode(_vcpu_report(cast(Core, SimpleNamespace(spec=SPEC)), vcpu))
                vcpu.mark_dead()

            surface.read(use)
            assert control.buf[:begin] == b"\xa5" * begin
            assert control.buf[begin + room:] == rest
            check_fence(maps, size)
            there = {offset for flags, slot, offset in ring_entries if slot == 0 and offset < pages and flags}
            assert set(np.flatnonzero(bitmap.bools()).tolist()) <= there

        try_it()


#: What would end the machine, or the connection's turn.
ENDING = {"stop", "release", "events"}


WARM = 400          # requests after which a coordinator has what it will have
GROWTH = 8 << 20    # bytes it may have more at the end
FILES = 16          # descriptors: a lease, a freeze, a recording, slots that were added


def held(pid: int) -> tuple[int, int]:
    """Bytes of its own memory, and descriptors, that a process has."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    private = re.findall(r"Private_\w+:\s+(\d+) kB", rollup)
    return 1024 * sum(map(int, private)), len(list(Path(f"/proc/{pid}/fd").iterdir()))


@pytest.fixture(params=ANY)
def machine(request: pytest.FixtureRequest) -> Any:
    with Machine.launch(spec("idle", accel=str(request.param), name="fuzz-control", vcpus=1, milliseconds=0,
                             timeout=None)) as launched:
        yield launched


def test_control_verbs(surface: Surface, machine: Machine) -> None:
    """An answer, or a refusal in one line; never a bug, never another coordinator; and it does not grow."""
    seeds = [{**each, "v": verbs.CONTROL_VERSION} for each in of_union(verbs.AnyVerb) if each["verb"] not in ENDING]
    pid = machine.status()["coordinator"]["pid"]
    began: list[tuple[int, int]] = []

    @surface.settings(10)
    @given(st.one_of(changed(seeds), odd))
    def try_it(document: Any) -> None:
        try:
            data = json.dumps(document, default=repr).encode()
        except (ValueError, RecursionError):
            return
        if (isinstance(document, dict) and str(document.get("verb")) in ENDING) or b"\n" in data:
            return
        with contextlib.closing(Caller(machine_dir(machine.name))) as caller:
            answer = caller.ask(data)
        surface.counts["refused" if "error" in answer else "taken"] += 1
        if sum(surface.counts.values()) == WARM:
            began.append(held(pid))
        assert "this is a bug" not in answer.get("error", ""), (data, answer)
        assert answer.get("error", "").isprintable(), (data, answer)

    try_it()
    assert machine.status()["coordinator"]["restarts"] == 0
    if began:
        (memory, files), (memory_now, files_now) = began[0], held(pid)
        assert memory_now - memory < GROWTH, f"{memory >> 10} KiB, then {memory_now >> 10} KiB"
        assert files_now - files <= FILES
    assert not re.search("Traceback", log_path(machine.name).read_text())
