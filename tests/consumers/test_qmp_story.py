"""QMP without a machine: values out of a stream, and events out of what happens."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.consumers.migration.report import Report
from vmm.consumers.qmp.story import Story
from vmm.consumers.qmp.wire import Splitter, TooLong, decode_request, encode

documents = st.recursive(st.none() | st.booleans() | st.integers() | st.text(),
                         lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


@settings(max_examples=50)
@given(st.lists(st.dictionaries(st.text(), documents), max_size=5), st.sampled_from(["", " ", "\r\n", "\t\n"]),
       st.booleans(), st.lists(st.integers(0, 200), max_size=8))
def test_values_are_the_same_however_they_are_sent(sent: list[Any], between: str, readable: bool,
                                                   cuts: list[int]) -> None:
    """The oracle is what was encoded."""
    text = between.join(json.dumps(each, indent=2 if readable else None, ensure_ascii=not readable)
                        for each in sent).encode()
    splitter, found, at = Splitter(), list[bytes | None](), 0
    for cut in [*sorted(cut for cut in cuts if cut < len(text)), len(text)]:
        found += splitter.feed(text[at:cut])
        at = cut
    assert [json.loads(each or b"") for each in found] == sent


PIECES = [b'{"execute": "stop"}', b'"', b"{", b"}", b"\\", b'{"id": [1], "x": 2}']


@given(st.lists(st.binary() | st.sampled_from(PIECES)))
def test_whatever_is_sent_is_a_request_or_said_to_be_none(sent: list[bytes]) -> None:
    splitter = Splitter()
    for piece in sent:
        for text in splitter.feed(piece):
            if text is not None:
                request, _, wrong = decode_request(text)
                assert (request is None) == bool(wrong)
                assert wrong.isprintable()


def test_a_control_character_begins_anew() -> None:
    splitter = Splitter()
    assert splitter.feed(b'{"execute": "qu\x01') == [None]
    assert splitter.feed(b'{"a": [\x00{"b": 1}\xff') == [None, b'{"b": 1}', None]
    assert splitter.feed(b'"}{"') == [b'"}{"']


@given(st.text() | st.integers())
def test_what_is_said_is_ascii(text: str | int) -> None:
    """As QEMU's own is (docs/interop/qmp-spec): a client may read bytes."""
    line = encode({"return": {"text": text}, "id": text})
    assert max(line) < 0x80
    assert json.loads(line) == {"return": {"text": text}, "id": text}


def test_a_value_without_end_is_given_up() -> None:
    splitter = Splitter()
    with pytest.raises(TooLong):
        splitter.feed(b"[" * (2 << 20))


RUNNING, PAUSED, READY = ({"state": state} for state in ("running", "paused", "ready"))


def names(told: list[Any]) -> list[str]:
    return [name for name, _ in told]


def said(*events: dict[str, Any], at_first: dict[str, Any] = RUNNING) -> list[str]:
    story = Story(at_first)
    return names([told for event in events for told in story.heard(event)])


@pytest.mark.parametrize(("reasons", "code", "reason", "guest"), [
    (["code", "code"], 0, "guest-shutdown", True), (["code", "triple-fault"], 4, "guest-panic", True),
    (["stopped", "triple-fault"], 4, "guest-panic", True), (["stopped", "code"], 8, "host-signal", False),
    (["worker-died", "stopped"], 6, "host-error", False), (["worker-died", "triple-fault"], 6, "guest-panic", True),
    (["timeout"], 5, "host-error", False), ([None], 8, "host-signal", False), ([], 6, "host-error", False)])
def test_why_it_ended(reasons: list[str | None], code: int, reason: str, guest: bool) -> None:
    """Whether a vCPU's end was heard of or not (its coordinator may have died with it)."""
    report = {"exit_code": code, "vcpus": [{"exit_reason": each} for each in reasons]}
    exits = [{"event": "exit", "vcpu": 0, "reason": each, "code": 0, "detail": ""} for each in reasons if each]
    for heard in (exits, []):
        story = Story(RUNNING)
        told = [each for event in heard for each in story.heard(event)] + story.ended(report)
        assert names(told) == ["GUEST_PANICKED"] * (reason == "guest-panic") + ["SHUTDOWN"]
        assert told[-1][1] == {"guest": guest, "reason": reason}
    story.quit = True
    assert story.ended(report)[-1] == ("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})


def test_an_end_without_a_report_of_vcpus_is_an_error() -> None:
    assert Story(RUNNING).ended({"exit_code": 6}) == [("SHUTDOWN", {"guest": False, "reason": "host-error"})]


def test_a_pause_is_told_once_however_often_it_is_heard() -> None:
    """A coordinator that takes over says again what is so."""
    paused, resumed = {"event": "paused", "by": "the user"}, {"event": "resumed"}
    assert said(paused, paused, resumed, resumed, paused) == ["STOP", "RESUME", "STOP"]
    assert said(paused, resumed, at_first=PAUSED) == ["RESUME"]
    assert said(paused, {"event": "started", "held_by": ""}, paused) == ["STOP", "RESUME", "STOP"]
    assert said(paused, {"event": "started", "held_by": "the user"}, resumed) == ["STOP", "RESUME"]
    assert said({"event": "started", "held_by": ""}, at_first=READY) == ["RESUME"]
    assert said({"event": "started", "held_by": "the user"}, resumed, at_first=READY) == ["RESUME"]


def test_what_was_not_heard_is_made_up_for_by_a_look() -> None:
    story = Story(RUNNING)
    assert names(story.looked(PAUSED)) == ["STOP"]
    assert names(story.heard({"event": "paused", "by": ""})) == []
    assert names(story.looked(PAUSED)) == []
    assert names(story.looked(RUNNING)) == ["RESUME"]
    assert names(story.looked({"state": "ended"})) == []


def passed(*looks: tuple[str, int]) -> list[Any]:
    """(status, rounds done), as they were seen; the numbers are passes."""
    story, told = Story(RUNNING), []
    for status, rounds in looks:
        report = Report("id", "t", "there", status=status)
        report.ram.dirty_sync_count = rounds
        told += [data.get("status") or data["pass"] for _, data in story.migration(report.as_dict())]
    return told


@pytest.mark.parametrize(("looks", "told"), [
    ([("setup", 0), ("active", 0), ("active", 2), ("device", 3), ("completed", 4)],
     ["setup", "active", 1, 2, 3, "device", 4, "completed"]),
    ([("completed", 3)], ["setup", "active", 1, 2, 3, "device", "completed"]),
    ([("active", 1), ("cancelled", 1)], ["setup", "active", 1, 2, "cancelling", "cancelled"]),
    ([("failed", 0)], ["setup", "failed"]),
    ([("active", 0), ("handed-over", 1), ("postcopy-active", 1), ("completed", 1)],
     ["setup", "active", 1, "device", "postcopy-active", "completed"]),
    ([("device", 1), ("active", 1)], ["setup", "active", 1, "device", "active", 2])])
def test_states_of_a_migration_are_told_in_order(looks: list[tuple[str, int]], told: list[Any]) -> None:
    """None that it went through is left out, however seldom somebody looked."""
    assert passed(*looks) == told
