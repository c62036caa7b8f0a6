"""Messages: what is encoded is decoded, and nothing else is."""

from __future__ import annotations

import contextlib
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc import messages as m

SLOT = m.SlotSpec(3, 0x1000, 0x2000, "/segment", True, "/log")
REQUESTS = [m.SetMemslot(2, SLOT), m.SetMemslots(12, [SLOT]), m.RemoveMemslot(3, 7), m.GetLog(4, 1),
            m.ClearLog(5, 1),
            m.RebuildRing(6), m.SetTracking(11, "bitmap", 0, "", {3: "/log", 499: "/other"}),
            m.SetTracking(12, "ring", 4096, "/ring", {}), m.SendFd(7), m.GetState(8),
            m.SetState(9, {"regs": {"rax": 2**64 - 1}}), m.Userfault(13, "/run/x/userfault"), m.Userfault(14, ""),
            m.ProgramMaps(15, {0: m.BitmapPlace("/bits", 4096)}), m.ProgramTrace(16, "me", True, -1),
            m.Shutdown(10)]
REPLIES = [m.Done(1, 2**40), m.Done(2, 0, {"xsave": b"\0\1"}), m.Failed(3, "why")]
NOTIFICATIONS = [m.Hello(0, 99, 1, 12288, 4096), m.Hello(0, 99, 1, error="no"), m.RingFull(1),
                 m.KickAck(2, 2**32 - 1), m.Console(3, b"\xff\n"),
                 m.ProgramCalls(4, 1000, {"membarrier": 2}),
                 m.Exited(4, m.ExitReason.EXCEPTION, -1, "#UD", {"rip": 2**63})]
GROUPS = [(m.decode_request, m.AnyRequest, REQUESTS), (m.decode_reply, m.AnyReply, REPLIES),
          (m.decode_notification, m.AnyNotification, NOTIFICATIONS)]
SPEC = m.WorkerSpec(machine="t", index=1, vcpu_count=2, accel="kvm", slots=[SLOT], system_slot=SLOT,
                    control_segment="/c", belongings="t", request_endpoint="ipc://r",
                    notify_endpoint="ipc://n", fd_socket="/f", boot={"rip": 0x10_0000},
                    replay=m.ReplaySpec([m.ReplayPhase("zipf", 5, exponent=1.1)], rate=2.5))


@pytest.mark.parametrize(("decode", "sample"), [(decode, sample) for decode, _, samples in GROUPS
                                                for sample in samples])
def test_round_trip(decode: Any, sample: Any) -> None:
    found = decode(m.encode(sample))
    assert found == sample
    assert type(found) is type(sample)


@pytest.mark.parametrize(("union", "samples"), [(union, samples) for _, union, samples in GROUPS])
def test_there_is_a_sample_of_each_message(union: Any, samples: list[Any]) -> None:
    assert {type(sample) for sample in samples} == set(get_args(union))


def test_a_worker_specification_makes_the_round_trip() -> None:
    assert m.decode_spec(msgspec.json.encode(SPEC)) == SPEC


@given(st.binary(max_size=200))
def test_any_other_bytes_are_a_message_error(frame: bytes) -> None:
    """Random bytes are hardly ever a message; if they are, it is one that could have been sent."""
    for decode, union, _ in GROUPS:
        with contextlib.suppress(m.MessageError):
            assert isinstance(decode(frame), get_args(union))
    with contextlib.suppress(m.MessageError):
        assert isinstance(m.decode_spec(frame), m.WorkerSpec)


def documents(samples: list[Any]) -> list[dict[str, Any]]:
    return [msgspec.msgpack.decode(m.encode(sample)) for sample in samples]


#: In place of a field's own value: each is of a wrong type for all of them, but for the one that it equals.
_WRONG = ({"a": "map"}, 1.5, [[]], None)


@pytest.mark.parametrize(("decode", "document"), [
    pytest.param(decode, document, id=f"{document['t']}-{number}") for decode, _, samples in GROUPS
    for number, document in enumerate(documents(samples))])
def test_a_message_with_a_field_of_a_wrong_type_or_without_one_is_refused(
        decode: Any, document: dict[str, Any]) -> None:
    """Each field in turn; what is left of the document stays as it was."""
    assert decode(msgspec.msgpack.encode(document)) is not None
    for name, value in document.items():
        for wrong in _WRONG:
            if isinstance(value, dict) and isinstance(wrong, dict):
                continue
            if name in ("data", "registers") and wrong is None:     # nothing to tell
                continue
            with pytest.raises(m.MessageError, match=r"bad (request|reply|notification)"):
                decode(msgspec.msgpack.encode({**document, name: wrong}))
    for name in {"t", "seq", "vcpu"} & set(document):       # of every message of its kind
        with pytest.raises(m.MessageError):
            decode(msgspec.msgpack.encode({k: v for k, v in document.items() if k != name}))


@pytest.mark.parametrize("name", sorted(SPEC.__struct_fields__))
def test_a_specification_with_a_field_of_a_wrong_type_is_refused(name: str) -> None:
    document = msgspec.json.decode(msgspec.json.encode(SPEC))
    for wrong in ({"slots": "map"}, 1.5, [[]]):
        if name == "replay" and isinstance(wrong, dict):
            wrong = {"phases": "map"}       # all of its fields may be left out
        with pytest.raises(m.MessageError, match="bad worker specification"):
            m.decode_spec(msgspec.json.encode({**document, name: wrong}))


@pytest.mark.parametrize("document", [
    {"t": "get-log", "seq": 1},                         # its own field missing
    {"t": "set-tracking", "seq": 1, "tracking": "ring", "ring_entries": 0, "ring_segment": ""},
    {"t": "userfault", "seq": 1},
    {"t": "set-memslot", "seq": 1, "slot": {"id": 1, "gpa": 0}},    # one of a struct within
    {"t": "no-such", "seq": 1},                         # an unknown tag
    {"t": "done", "seq": 1},                            # a reply
    {"seq": 1},
    ["get-log", 1, 1],
    "get-log",
])
def test_documents_that_are_no_request_are_refused(document: object) -> None:
    with pytest.raises(m.MessageError):
        m.decode_request(msgspec.msgpack.encode(document))


def test_an_unknown_field_is_ignored_for_a_newer_peer() -> None:
    frame = msgspec.msgpack.encode({"t": "ring-full", "vcpu": 1, "colour": "red"})
    assert m.decode_notification(frame) == m.RingFull(1)
