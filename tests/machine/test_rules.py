"""What a machine may be: whatever a file, an offer, a manifest or a program asks for is held to one set of rules,
and what passes them starts."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from machines import spec

from ipc.layout import MAX_SLOTS
from ipc.messages import ProgramSpec, ReplayPhase, ReplaySpec
from vmm.client.machine import Machine
from vmm.consumers import snapshot
from vmm.errors import VmmError
from vmm.machine import rules
from vmm.machine.rules import NO_TREES, RuleError, Trees, arriving, check_machine, check_new_slot
from vmm.machine.spec import MachineSpec, RamSlot, ReaperSpec, VerifySpec, decode_spec, encode_spec

GUEST = spec("idle", accel="unicorn", mib=4, milliseconds=1)
REPLAY = msgspec.structs.replace(
    GUEST, accel="replay", image="", cmdline="", params=[],
    replay=ReplaySpec([ReplayPhase("random", 100), ReplayPhase("zipf", 100, exponent=1.1)], seed=3))
PAGE = 4096
NAN, INF = math.nan, math.inf

#: (field, what no machine may have there, word of the line that says so)
WRONG: list[tuple[str, Any, str]] = [
    ("name", "../x", "machine name"), ("name", "", "machine name"),
    ("accel", "qemu", "accel"), ("vcpus", 0, "vcpus"), ("vcpus", 257, "vcpus"), ("vcpus", 10**400, "machine"),
    ("vcpus", "2", "machine"), ("vcpus", True, "machine"), ("privilege", "root", "privilege"),
    ("ring_entries", 1000, "dirty_ring_size"), ("ring_entries", 512, "dirty_ring_size"),
    ("ring_entries", 1 << 30, "dirty_ring_size"), ("ring_entries", -1024, "dirty_ring_size"),
    ("tracking", "perhaps", "tracking"), ("slots", [], "memory"),
    ("slots", [RamSlot(i, i * PAGE, PAGE) for i in range(MAX_SLOTS + 1)], "memory"),
    ("slots", [RamSlot(0, 0, 0)], "memory.0.size"), ("slots", [RamSlot(0, 0, -PAGE)], "memory.0.size"),
    ("slots", [RamSlot(0, 0, PAGE + 1)], "memory.0.size"), ("slots", [RamSlot(0, 1, PAGE)], "memory.0.gpa"),
    ("slots", [RamSlot(0, -PAGE, PAGE)], "memory.0.gpa"), ("slots", [RamSlot(0, 1 << 52, PAGE)], "memory.0.gpa"),
    ("slots", [RamSlot(0, 0, 1 << 52)], "memory.0.size"),
    ("slots", [RamSlot(0, (1 << 40) - PAGE, 2 * PAGE)], "memory.0.size"),
    ("slots", [RamSlot(-1, 0, PAGE)], "memory.0.slot"), ("slots", [RamSlot(MAX_SLOTS, 0, PAGE)], "memory.0.slot"),
    ("slots", [RamSlot(1, 0, PAGE), RamSlot(1, PAGE, PAGE)], "memory.1.slot"),
    ("slots", [RamSlot(0, 0, 2 * PAGE), RamSlot(1, PAGE, PAGE)], "overlaps memory.0"),
    ("slots", [RamSlot(0, 0xF000_0000 - PAGE, 2 * PAGE)], "overlaps the system area"),
    ("slots", [RamSlot(0, 0, PAGE, born=-1)], "born"), ("slots", [RamSlot(0, 0, PAGE, born=1 << 63)], "born"),
    ("stack_size", 3, "stack_size"), ("stack_size", 0, "stack_size"), ("stack_size", 1 << 40, "stack_size"),
    ("stack_size", 1025, "stack_size"), ("params", [-1], "guest.params"), ("params", [1 << 64], "machine"),
    ("params", [0] * 17, "guest.params"), ("cmdline", "x" * 300, "cmdline"), ("cmdline", "a\0b", "cmdline"),
    ("cmdline", "\ud800", "machine"), ("image", "", "guest.image"), ("image", "relative.elf", "guest.image"),
    ("image", "/a\0b", "guest.image"), ("image", "/" + "x" * 5000, "guest.image"),
    ("load_address", -1, "guest.address"), ("load_address", 1 << 40, "guest.address"),
    ("timeout", 0.0, "timeout"), ("timeout", -1.0, "timeout"), ("timeout", NAN, "timeout"),
    ("timeout", INF, "timeout"), ("dirty_quota", -1, "dirty_limit"), ("dirty_quota", 1 << 60, "dirty_limit"),
    *[("reaper", reaper, "reaper") for reaper in (
        ReaperSpec("sometimes"), ReaperSpec(interval=0.0), ReaperSpec(interval=NAN), ReaperSpec(min_interval=-1.0),
        ReaperSpec(min_interval=2.0), ReaperSpec(max_interval=INF), ReaperSpec(reapers=0),
        ReaperSpec(reapers=1_000_000))],
    ("verify", VerifySpec(0.0), "verify.interval"), ("verify", VerifySpec(NAN), "verify.interval"),
    ("verify", VerifySpec(inject="bugs"), "verify.inject"), ("trace", ["no_such_event"], "no such event"),
    ("trace", ["*"] * 100, "trace"), ("trace_file", "relative", "trace_file"), ("trace_file", "/a\0", "trace_file"),
    ("replay", REPLAY.replay, "replay"), ("replay_trace", "/etc/passwd", "replay"),
]

WRONG_REPLAY: list[tuple[ReplaySpec | None, str]] = [
    (None, "missing"), (ReplaySpec(), "phases or a trace"),
    (ReplaySpec([ReplayPhase("random")], trace_segment="/dev/shm/x"), "segment"),
    (ReplaySpec([ReplayPhase("spiral")]), "pattern"), (ReplaySpec([ReplayPhase("random", -1)]), "writes"),
    (ReplaySpec([ReplayPhase("random", 1 << 60)]), "writes"),
    (ReplaySpec([ReplayPhase("strided", 1, 0)]), "stride"),
    (ReplaySpec([ReplayPhase("zipf", 1, 1, 0.0)]), "exponent"),
    (ReplaySpec([ReplayPhase("zipf", 1, 1, NAN)]), "exponent"),
    (ReplaySpec([ReplayPhase("random"), ReplayPhase("random")]), "only the last"),
    (ReplaySpec([ReplayPhase("random", 1)] * 2000), "phases"),
    *[(ReplaySpec([ReplayPhase("random")], **{key: value}), key)
      for key, value in (("rate", -1.0), ("rate", NAN), ("seed", -1), ("speed", NAN))],
]


def replaced(base: MachineSpec, **changes: Any) -> MachineSpec:
    return msgspec.structs.replace(base, **changes)


def one_line(error: BaseException) -> bool:
    return str(error).isprintable() and 0 < len(str(error)) < 400


def test_what_the_tests_begin_with_may_be() -> None:
    check_machine(GUEST)
    check_machine(REPLAY)


@pytest.mark.parametrize(("field", "value", "said"), WRONG, ids=lambda v: repr(v)[:30])
def test_what_no_machine_may_be_is_refused_in_one_line(field: str, value: Any, said: str) -> None:
    with pytest.raises(VmmError, match=said) as caught:
        check_machine(replaced(GUEST, **{field: value}))
    assert one_line(caught.value)


@pytest.mark.parametrize(("value", "said"), WRONG_REPLAY, ids=lambda v: repr(v)[:30])
def test_what_cannot_be_replayed_is_refused(value: ReplaySpec | None, said: str) -> None:
    with pytest.raises(RuleError, match=said) as caught:
        check_machine(replaced(REPLAY, replay=value))
    assert one_line(caught.value)


def test_rings_and_what_needs_them() -> None:
    for change in ({"tracking": "ring"}, {"dirty_quota": 1}):
        check_machine(replaced(GUEST, **change))
        with pytest.raises(RuleError, match="dirty_ring_size"):
            check_machine(replaced(GUEST, ring_entries=0, **change))
    for change in ({"ring_entries": 0}, {"tracking": "bitmap"}, {"image": "/x"}):
        with pytest.raises(RuleError):
            check_machine(replaced(REPLAY, **change))


@pytest.mark.parametrize(("field", "value", "said"), WRONG, ids=lambda v: repr(v)[:30])
def test_a_machine_from_elsewhere_is_held_to_the_same(field: str, value: Any, said: str) -> None:
    """But for what is decided here, and for paths, which are not taken over."""
    offered = replaced(GUEST, **{field: value})
    try:
        here = arriving(offered, name="here", image=GUEST.image, accel="unicorn", linger=False)
    except VmmError as exc:
        error: VmmError | None = exc
    else:
        error = None
    decided_here = field in ("name", "accel", "image", "trace", "trace_file", "replay_trace")
    assert (error is None) == decided_here
    if error is None:
        assert here == replaced(GUEST, name="here", linger=False)


def test_nothing_that_arrives_is_a_path() -> None:
    everything = replaced(GUEST, trace=["*"], trace_file="/root/.bashrc", replay_trace="/etc/passwd",
                          image="/etc/shadow")
    everything = replaced(everything, incoming=True, links={0: "/another's"})
    here = arriving(everything, name="here", image=GUEST.image, accel="unicorn", linger=True)
    assert (here.incoming, here.links) == (False, {})       # that is for who launches it to say
    assert here.image == GUEST.image
    texts = [v for v in msgspec.to_builtins(here).values() if isinstance(v, str)]
    assert [t for t in texts if "/" in t] == [GUEST.image]


PROGRAM = ProgramSpec(path="/bin/x", args=["x"], env=[], root="/etc", files={"/data": "/root", "/one": "/etc/shadow"},
                      console="streams")
RUNNING = msgspec.structs.replace(GUEST, accel="kvm", image="", params=[], cmdline="", vcpus=2, program=PROGRAM)


@pytest.mark.parametrize(("change", "trees", "linger", "said"), [
    ({}, NO_TREES, True, "guest.root: .*give the same here"),
    ({"root": ""}, Trees("/here"), True, "guest.root: .*none"),
    ({}, Trees("/here", {"/other": "/x"}), True, "guest.files: .*no /other"),
    ({"console": "terminal"}, Trees("/here"), False, "guest.console: .*--detach")])
def test_a_program_that_arrives_has_the_files_that_it_had(change: dict[str, Any], trees: Trees, linger: bool,
                                                          said: str) -> None:
    offered = replaced(RUNNING, program=msgspec.structs.replace(PROGRAM, **change))
    with pytest.raises(RuleError, match=said):
        arriving(offered, name="here", image="/image", accel="kvm", linger=linger, trees=trees)


@pytest.mark.parametrize(("linger", "console"), [(True, "streams"), (False, "lines")])
def test_a_program_that_arrives_has_this_hosts_files(linger: bool, console: str) -> None:
    here = arriving(RUNNING, name="here", image="/image", accel="kvm", linger=linger,
                    trees=Trees("/here", {"/data": "/there"}))
    assert (here.image, here.keeps_system) == ("", False)
    assert here.program == msgspec.structs.replace(PROGRAM, root="/here", files={"/data": "/there"}, arrives=True,
                                                   console=console)


# --- memory that is plugged in ------------------------------------------------------------------------


@pytest.mark.parametrize(("slot", "said"), [
    (RamSlot(0, 1 << 30, PAGE), "slot 0: already exists"), (RamSlot(-1, 1 << 30, PAGE), r"slot: .*\(got -1\)"),
    (RamSlot(MAX_SLOTS, 1 << 30, PAGE), rf"slot: .*\(got {MAX_SLOTS}\)"), (RamSlot(10**5000, 1 << 30, PAGE), "slot: "),
    (RamSlot(1, 1 << 30, 0), "size"), (RamSlot(1, 1 << 30, PAGE - 1), "size"), (RamSlot(1, 5, PAGE), "gpa"),
    (RamSlot(1, -PAGE, PAGE), "gpa"), (RamSlot(1, 1 << 70, PAGE), "gpa"),
    (RamSlot(1, 0x4000_0000, 1 << 70), "size"),
    (RamSlot(1, PAGE * 10**5000, PAGE), "gpa"), (RamSlot(1, 0, PAGE), "slot 1: .* overlaps slot 0"),
    (RamSlot(1, 0xF000_0000, PAGE), "overlaps the system area"),
    (RamSlot(1, (1 << 36) - PAGE, 2 * PAGE), "size: ends"),
])
def test_a_new_slot_is_held_to_the_rules(slot: RamSlot, said: str) -> None:
    with pytest.raises(RuleError, match=said) as caught:
        check_new_slot(slot, GUEST.slots, mapped=True, top=1 << 36)
    assert one_line(caught.value)


def test_a_new_slot_that_may_be() -> None:
    check_new_slot(RamSlot(1, (1 << 36) - PAGE, PAGE), GUEST.slots, mapped=True, top=1 << 36)
    check_new_slot(RamSlot(499, 0xF000_0000, PAGE), GUEST.slots, mapped=False, top=0)
    full = [RamSlot(i, i * PAGE, PAGE) for i in range(MAX_SLOTS)]
    with pytest.raises(RuleError):
        check_new_slot(RamSlot(3, 1 << 30, PAGE), full, mapped=False, top=0)


# --- whatever anybody gives -----------------------------------------------------------------------------

_numbers = st.one_of(st.integers(), st.integers(-2, 70_000), st.integers(0, 1 << 66), st.just(10**400),
                     st.floats(), st.booleans())
_values = st.recursive(st.one_of(st.none(), _numbers, st.text(max_size=20), st.binary(max_size=4)),
                       lambda v: st.one_of(st.lists(v, max_size=3),
                                           st.dictionaries(st.text(max_size=8), v, max_size=3)), max_leaves=5)


def _places(document: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value within a document."""
    found = [at]
    if isinstance(document, dict | list):
        for key, value in (document.items() if isinstance(document, dict) else enumerate(document)):
            found += _places(value, (*at, key))
    return found


def _put(document: Any, at: tuple[Any, ...], value: Any) -> Any:
    if not at:
        return value
    copy: Any = dict(document) if isinstance(document, dict) else list(document)
    copy[at[0]] = _put(document[at[0]], at[1:], value)
    return copy


@st.composite
def _mutated(draw: st.DrawFn, values: st.SearchStrategy[Any]) -> dict[str, Any]:
    document: Any = msgspec.to_builtins(draw(st.sampled_from([GUEST, REPLAY])))
    for _ in range(draw(st.integers(1, 3))):
        document = _put(document, draw(st.sampled_from(_places(document)[1:])), draw(values))
    return dict(document)


@settings(max_examples=400)
@given(_mutated(_values))
def test_any_document_is_refused_or_is_a_machine(document: dict[str, Any]) -> None:
    """As an offer or a manifest brings it (decoded with types), and as a program can make it (without)."""
    for loose in (False, True):
        try:
            found = (_loose(document) if loose else msgspec.convert(document, MachineSpec))
        except (msgspec.ValidationError, TypeError):
            continue
        try:
            check_machine(found)
        except VmmError as exc:
            assert one_line(exc), repr(exc)     # noqa: PT017
            continue
        told = decode_spec(encode_spec(found))      # what its coordinator is told
        check_machine(told)
        assert 0 < sum(s.size for s in told.slots) <= MAX_SLOTS * rules.REPLAY_GPA_MAX


def _loose(document: dict[str, Any]) -> MachineSpec:
    """As a program would, that knows nothing of types."""
    made = dict(document)
    for key, kind in (("reaper", ReaperSpec), ("verify", VerifySpec), ("replay", ReplaySpec)):
        if isinstance(made.get(key), dict):
            made[key] = kind(**made[key])
    if isinstance(made["slots"], list):
        made["slots"] = [RamSlot(**s) if isinstance(s, dict) else s for s in made["slots"]]
    return MachineSpec(**made)


_seconds = st.floats(0.001, 3600.0)
_reapers = st.builds(ReaperSpec, st.sampled_from(["adaptive", "fixed"]), _seconds, st.floats(0.0005, 0.01),
                     st.floats(0.01, 5.0), st.integers(1, 64))
_verify = st.none() | st.builds(VerifySpec, st.floats(0.01, 10.0), st.sampled_from(["none", "lost", "extra"]))
_phases = st.lists(st.builds(ReplayPhase, st.sampled_from(["sequential", "strided", "random", "zipf"]),
                             st.integers(0, 5000), st.integers(1, 100), st.floats(0.01, 10.0)),
                   min_size=1, max_size=4)
_replay = st.builds(ReplaySpec, _phases, st.sampled_from([0.0, 1.0, 1e12]), st.integers(0, (1 << 63) - 1),
                    st.booleans(), st.booleans())
_slot = st.builds(lambda number, page, pages: RamSlot(number, page * PAGE, pages * PAGE, number % 2 == 0),
                  st.integers(0, MAX_SLOTS - 1), st.sampled_from([0, 64, 1 << 12, 1 << 16, 1 << 27]),
                  st.sampled_from([1, 2, 63, 65, 512, 1024]))
_slots = st.lists(_slot, min_size=1, max_size=4, unique_by=lambda slot: slot.gpa)


@st.composite
def _machines(draw: st.DrawFn) -> MachineSpec:
    """Most of them may be."""
    base = replaced(draw(st.sampled_from([GUEST, REPLAY])), vcpus=draw(st.integers(1, 4)),
                    ring_entries=draw(st.sampled_from([0, 1024, 4096, 65536])), reaper=draw(_reapers),
                    verify=draw(_verify), timeout=0.1, slots=draw(_slots))
    if base.replay is not None:
        return replaced(base, replay=draw(_replay))
    return replaced(base, privilege=draw(st.sampled_from(["user", "kernel"])),
                    tracking=draw(st.sampled_from(["", "ring", "bitmap", "uffd", "none", "auto"])),
                    stack_size=draw(st.sampled_from([1024, 4096, 16384, 1 << 20])),
                    dirty_quota=draw(st.sampled_from([0, 1, 1 << 40])),
                    params=draw(st.lists(st.integers(0, (1 << 64) - 1), max_size=16)))


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_machines())
def test_what_passes_starts_or_is_refused_in_one_line(found: MachineSpec) -> None:
    """End to end. Of a refused machine nothing is left (conftest.py)."""
    try:
        check_machine(found)
        with Machine.launch(found) as machine:
            machine.wait(30.0)
    except VmmError as exc:
        assert one_line(exc), repr(exc)         # noqa: PT017


# --- where they are asked -----------------------------------------------------------------------------


def test_a_restored_machine_never_writes_where_its_manifest_says(tmp_path: Path) -> None:
    """Not even where the machine traced to that the snapshot was taken of."""
    events = tmp_path / "events"
    traced = replaced(GUEST, trace=["*"], trace_file=str(events), params=[0], timeout=None)
    with Machine.launch(traced) as machine:
        snapshot.create(machine, tmp_path / "chain")
    assert events.exists()
    events.unlink()
    with snapshot.restore(tmp_path / "chain", machine_name="again") as machine:
        machine.register("a")
        machine.sync("a")
        assert not events.exists()


@pytest.mark.parametrize(("field", "value", "said"), [
    ("reaper", {"mode": "adaptive", "reapers": 1_000_000}, "reapers"), ("timeout", -1.0, "timeout"),
    ("reaper", {"reapers": 0}, "reapers"), ("vcpus", 0, "vcpus"), ("stack_size", 7, "stack_size"),
    ("name", "../../x", "machine name"), ("replay", {"phases": [{"pattern": "random"}]}, "replay"),
])
def test_a_manifest_is_held_to_the_rules_before_anything_is_made(field: str, value: Any, said: str, tmp_path: Path,
                                                                 runtime_dir: Path) -> None:
    with Machine.launch(replaced(GUEST, params=[0], timeout=None)) as machine:
        snapshot.create(machine, tmp_path)
    path = tmp_path / "0001" / "manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest["spec"][field] = value
    path.write_text(json.dumps(manifest))
    path.with_suffix(".sum").write_text(hashlib.blake2b(path.read_bytes(), digest_size=32).hexdigest() + "\n")
    with pytest.raises(VmmError, match=said) as caught:
        snapshot.restore(tmp_path)
    assert one_line(caught.value)


def test_memory_is_plugged_in_by_the_same_rules() -> None:
    with Machine.launch(replaced(GUEST, params=[0], timeout=None)) as machine:
        for slot, gpa, size in ((0, 1 << 30, PAGE), (1, 1 << 70, PAGE), (1, 0, PAGE), (1, 1 << 30, 7),
                                (-1, 1 << 30, PAGE)):
            with pytest.raises(VmmError) as caught:
                machine.memory_add(slot, gpa, size)
            assert one_line(caught.value)
        assert [s["id"] for s in machine.status()["slots"]] == [0]
