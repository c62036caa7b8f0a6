"""Messages: what is encoded is decoded, and nothing else is."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc import messages as m

SLOT = m.SlotSpec(3, 0x1000, 0x2000, "/segment", True, "/log")
REQUESTS = [m.SetMemslot(2, SLOT), m.RemoveMemslot(3, 7), m.GetLog(4, 1), m.ClearLog(5, 1),
            m.RebuildRing(6), m.SendFd(7), m.GetState(8), m.SetState(9, {"regs": {"rax": 2**64 - 1}}),
            m.Shutdown(10)]
REPLIES = [m.Done(1, 2**40), m.Done(2, 0, {"xsave": b"\0\1"}), m.Failed(3, "why")]
NOTIFICATIONS = [m.Hello(0, 99, 1, 12288, 4096), m.RingFull(1), m.KickAck(2, 2**32 - 1),
                 m.Console(3, b"\xff\n"), m.Exited(4, m.ExitReason.EXCEPTION, -1, "#UD", {"rip": 2**63})]


@pytest.mark.parametrize(("decode", "sample"),
                         [(m.decode_request, r) for r in REQUESTS] + [(m.decode_reply, r) for r in REPLIES]
                         + [(m.decode_notification, n) for n in NOTIFICATIONS])
def test_round_trip(decode, sample) -> None:  # type: ignore[no-untyped-def]
    assert decode(m.encode(sample)) == sample


@given(st.binary(max_size=200))
def test_any_other_bytes_are_a_message_error(frame: bytes) -> None:
    for decode in (m.decode_request, m.decode_reply, m.decode_notification, m.decode_spec):
        with contextlib.suppress(m.MessageError):
            decode(frame)


@pytest.mark.parametrize("document", [
    {"t": "reset", "seq": "one", "expected": 1},        # a wrong type
    {"t": "reset", "seq": 1},                           # a field missing
    {"t": "no-such", "seq": 1},                         # an unknown tag
    {"seq": 1},                                         # no tag
])
def test_wrong_documents_are_refused(document: dict[str, object]) -> None:
    with pytest.raises(m.MessageError):
        m.decode_request(msgspec.msgpack.encode(document))


def test_an_unknown_field_is_ignored_for_a_newer_peer() -> None:
    frame = msgspec.msgpack.encode({"t": "ring-full", "vcpu": 1, "colour": "red"})
    assert m.decode_notification(frame) == m.RingFull(1)
