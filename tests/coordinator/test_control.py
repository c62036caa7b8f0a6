"""The control socket: whatever is sent there gets an answer, and nobody gets in another's way."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import resource
import select
import signal
import socket
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from caller import Caller
from hypothesis import given
from hypothesis import strategies as st
from machines import spec, until

from ipc.bitmap import word_count
from ipc.layout import MachineControl
from ipc.lines import LINE_MAX, LineListener, connect_lines
from vmm.client.connection import ControlClient
from vmm.client.machine import Machine
from vmm.coordinator import events as events_module
from vmm.coordinator.consoles import Consoles
from vmm.coordinator.events import EventLog
from vmm.coordinator.server import ControlServer, Handler
from vmm.errors import ExitCode, VmmError
from vmm.machine import verbs as control
from vmm.machine.runtime import machine_dir

V = control.CONTROL_VERSION


def request(verb: str, number: int = 1, **fields: Any) -> bytes:
    return json.dumps({"v": V, "id": number, "verb": verb, **fields}).encode()


# --- of a machine --------------------------------------------------------------------------------


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine.launch(spec("idle", accel="kvm", vcpus=1, milliseconds=0, timeout=None), name="t") as machine:
        yield machine


BAD = [b"", b"\0", b"null", b"[]", b"{", b"{}", b"\xff\xfe", b'{"v": 2, "id": "x", "verb": "status"}',
       b"[" * 99_999, b'{"v":' * 50_000, b'{"v": 2, "verb": "\xff"}', b"\x01\0",
       request("status", 1 << 80), request("status", v=1 << 80), request("no-such-verb"),
        request("status", extra=1),
       *(request(verb, owner_start=start, **fields)
         for start in (-1, 1, 1 << 40, 1 << 70, "me")
         for verb, fields in (("pause", {"token": "a"}), ("register", {"client": "c"}), ("record-start", {}),
                              ("dirty-limit", {"pages_per_s": 1, "token": "a"}),
                              ("take-lease", {"token": "a", "kind": "snapshot"}))),
       request("memory-add", slot=1, gpa=1 << 70, size=4096, log=True),
       request("memory-add", slot=1, gpa=0, size=-(1 << 70), log=True), request("memory-remove", slot=1 << 64),
       request("sync", client="nobody"), request("sync", client=["x"]), request("dirty-limit", pages_per_s=1 << 70),
       request("mark", slot=99, first=0, count=1), request("mark", slot=0, first=-1, count=1 << 62),
       request("mark-for", client="nobody", slot=0, word=0, bits="eJw="),
       request("set-tracking", tracking="never"), request("log-start", slot=-1), request("thaw", token="nobody"),
       request("set-state", vcpus=[{}]), request("events", after="x")]


@pytest.mark.kvm
def test_every_bad_request_gets_an_answer_and_the_machine_runs_on(machine: Machine) -> None:
    """On one connection: what was bad is over when the answer has come."""
    caller = Caller(machine_dir("t"))
    before = machine.status()["coordinator"]
    for bad in BAD:
        answer = caller.ask(bad)
        assert answer["error"], bad
        assert len(answer["error"].splitlines()) == 1, bad
        assert answer["code"] != ExitCode.BUG, (bad, answer)
    assert caller.ask(request("status", 77))["id"] == 77
    caller.close()
    after = machine.status()["coordinator"]
    assert (after["pid"], after["restarts"]) == (before["pid"], 0)


@pytest.mark.kvm
def test_pages_that_are_marked_for_a_client_are_its_alone(machine: Machine) -> None:
    machine.register("a")
    machine.register("b")
    pages = machine.status()["slots"][0]["pages"]
    words = np.zeros(word_count(pages), np.uint64)
    words[0], words[-1] = 1 << 63, 1
    machine.mark_for("a", 0, words)
    machine.mark_for("a", 0, words)
    assert machine.sync("b").slots == {0: []}
    assert machine.sync("a").slots == {0: [(63, 1), (64 * (len(words) - 1), 1)]}
    assert machine.sync("a").slots == {0: []}
    beyond = words.copy()
    beyond[-1] = 1 << 63
    with pytest.raises(VmmError, match="has no such pages"):
        machine.mark_for("a", 0, beyond)
    caller = Caller(machine_dir("t"))
    too_much = base64.b64encode(zlib.compress(bytes(9 << 20))).decode()
    for fields in ({"slot": 9}, {"word": -1}, {"word": len(words)}, {"word": 1 << 62}, {"bits": ""}, {"bits": "x"},
                   {"bits": base64.b64encode(zlib.compress(b"x")).decode()}, {"bits": too_much}):
        good = {"slot": 0, "word": 0, "bits": base64.b64encode(zlib.compress(bytes(8))).decode()}
        answer = caller.ask(request("mark-for", client="a", **{**good, **fields}))
        assert answer["error"], fields
        assert answer["code"] != ExitCode.BUG, (fields, answer)
    caller.close()
    assert machine.sync("a").slots == {0: []}


@pytest.mark.kvm
def test_another_version_is_refused_in_one_line(machine: Machine) -> None:
    caller = Caller(machine_dir("t"))
    for version in (0, V - 1, V + 1):
        answer = caller.ask(json.dumps({"v": version, "id": 5, "verb": "status", "new": {}}).encode())
        assert answer["id"] == 5
        assert f"speaks version {V}" in answer["error"]
        assert f"the request is version {version}" in answer["error"]
        assert answer["code"] == ExitCode.BAD_INPUT
    caller.close()


@pytest.mark.kvm
def test_connections_are_bounded_and_those_that_idle_cost_nobody_else(machine: Machine) -> None:
    """Three hundred, where the coordinator may have 256 descriptors, ended the machine once."""
    pid = machine.status()["coordinator"]["pid"]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (256, 256))
    idle: list[Caller] = []
    with contextlib.ExitStack() as stack:
        refused = 0
        for _ in range(300):
            caller = Caller(machine_dir("t"))
            stack.callback(caller.close)
            idle.append(caller)
        for caller in idle[-50:]:
            with contextlib.suppress(EOFError):
                answer = caller.answer()
                assert "connections" in answer["error"]
                refused += 1
        assert refused > 0
        assert machine.status()["coordinator"]["restarts"] == 0     # its own connection is served
    with Machine.attach("t") as other:      # the others have hung up: there is room again
        assert other.status()["coordinator"]["pid"] == pid


@pytest.mark.kvm
def test_clients_of_the_dirty_log_are_bounded(machine: Machine) -> None:
    """Each costs memory, and a descriptor where it goes with a process."""
    for n in range(64):
        machine.register(f"c{n}", mine=n % 2 == 0)
    with pytest.raises(VmmError, match="already has 64 dirty-log clients"):
        machine.register("one_more")
    machine.register("c0", mine=True)       # it is there: that is no new one
    machine.unregister("c0")
    machine.register("one_more")


@pytest.mark.kvm
def test_who_asks_again_after_a_death_in_between_asks_once(machine: Machine) -> None:
    """A coordinator that died while nothing was asked of it has lost no request."""
    machine.status()
    os.kill(machine.status()["coordinator"]["pid"], signal.SIGKILL)
    other = Machine.attach("t")
    until(lambda: other.status()["coordinator"]["restarts"] == 1, "another coordinator")
    machine.memory_add(1, 0x400_0000, 4096)     # once more would be an error
    other.detach()


# --- the server by itself ------------------------------------------------------------------------


class Served:
    """A server in this process, whose turns a test makes."""

    def __init__(self, directory: Path, verbs: dict[type[control.Verb], Handler]) -> None:
        self.events = EventLog(MachineControl())
        self.asker = 0
        self.server = ControlServer("t", directory, verbs, self._before, self.events)

    def _before(self, asker: int) -> None:
        self.asker = asker

    def turn(self) -> int:
        """As the coordinator's loop does it; the number of descriptors that were ready."""
        self.server.answer_waiting()
        poller = zmq.Poller()
        for fd, wanted in self.server.interests().items():
            poller.register(fd, wanted)
        ready = dict(poller.poll(0))
        self.server.serve(ready)
        return len(ready)


Serve = Callable[[dict[type[control.Verb], Handler]], Served]


@pytest.fixture
def serve(runtime_dir: Path) -> Iterator[Serve]:
    """Makes a server in the runtime directory."""
    with contextlib.ExitStack() as stack:
        def make(verbs: dict[type[control.Verb], Handler]) -> Served:
            served = Served(runtime_dir, verbs)
            stack.callback(served.server.close)
            return served

        yield make
    assert not (runtime_dir / "control").exists()


def test_a_verb_that_fails_is_answered_and_the_next_is_served(serve: Serve, runtime_dir: Path) -> None:
    def bug(verb: Any) -> None:
        raise KeyError("left")

    def full(verb: Any) -> None:
        raise OSError(28, "No space left on device", "/run/x")

    def unanswerable(verb: Any) -> dict[str, Any]:
        return {"x": object()}

    served = serve({control.Pause: bug, control.Resume: full, control.Stop: unanswerable,
                                control.Status: lambda v: {"pid": served.asker}})
    caller = Caller(runtime_dir, served.turn)
    for verb, code, said in [("pause", ExitCode.BUG, "KeyError: 'left' (this is a bug; see vmm logs t"),
                             ("resume", ExitCode.BAD_INPUT, "No space left on device"),
                             ("stop", ExitCode.BUG, "TypeError")]:
        answer = caller.ask(request(verb, 3))
        assert (answer["id"], answer["code"]) == (3, code)
        assert said in answer["error"]
        assert len(answer["error"].splitlines()) == 1
    assert caller.ask(request("status"))["result"] == {"pid": os.getpid()}
    caller.close()


def test_one_client_cannot_keep_the_others_waiting(serve: Serve, runtime_dir: Path) -> None:
    """Each is served in its turn, however much one has asked for."""
    order = []
    served = serve({control.Sync: lambda v: order.append(v.client)})
    first, second = Caller(runtime_dir, served.turn), Caller(runtime_dir, served.turn)
    served.turn()
    first.send((request("sync", client="many") + b"\n") * 500)
    served.turn()
    served.turn()
    before = len(order)
    assert before < 500
    second.ask(request("sync", client="one"))
    assert order.index("one") <= before + 2
    for caller in (first, second):
        caller.close()


def test_a_turn_has_an_end_however_much_was_asked_for(serve: Serve, runtime_dir: Path) -> None:
    """The reaper, SIGTERM and the timeout are due meanwhile."""
    served_count = [0]

    def slow(verb: Any) -> None:
        served_count[0] += 1
        until(lambda: True, "")
        threading.Event().wait(0.02)    # stands for a verb that takes longer than a turn may

    served = serve({control.Status: slow})
    callers = [Caller(runtime_dir, served.turn) for _ in range(5)]
    served.turn()
    for caller in callers:
        caller.send(request("status") + b"\n")
    served.turn()
    assert served_count[0] < 5
    assert served.server.behind
    while served_count[0] < 5:
        served.turn()
    served.turn()
    assert not served.server.behind
    for caller in callers:
        caller.answer()
        caller.close()


def test_a_client_that_does_not_read_is_not_read_from(serve: Serve, runtime_dir: Path) -> None:
    """What waits for it is one answer, not all that it has asked for; the others go on."""
    count = [0]

    def large(verb: Any) -> dict[str, Any]:
        count[0] += 1
        return {"x": "y" * (4 << 20)}

    served = serve({control.Status: large})
    deaf, other = Caller(runtime_dir, served.turn), Caller(runtime_dir, served.turn)
    deaf.send((request("status") + b"\n") * 20)
    while served.turn():
        pass
    assert count[0] == 1
    assert other.ask(request("status"))["id"] == 1
    for _ in range(20):
        deaf.answer()
    assert count[0] == 21
    deaf.close()
    other.close()


def test_a_line_without_an_end_is_refused(serve: Serve, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ipc.lines.LINE_MAX", 100_000)
    served = serve({})
    caller = Caller(runtime_dir, served.turn)
    caller.send(b"x" * 150_000)
    assert str(LINE_MAX) in caller.answer()["error"]
    with pytest.raises(EOFError):
        caller.answer()
    caller.close()


def test_who_hangs_up_is_forgotten(serve: Serve, runtime_dir: Path) -> None:
    """In the middle of a request, of an answer, of waiting for events."""
    served = serve({control.Status: lambda v: {"x": "y" * (4 << 20)}})
    fds = len(os.listdir("/proc/self/fd"))
    for data in (b'{"v": 2, "i', request("status") + b"\n", request("events", after=0) + b"\n"):
        caller = Caller(runtime_dir, served.turn)
        caller.send(data)
        while served.turn():
            pass
        caller.close()
        until(lambda: not served.turn(), "nothing to do any more")
    assert len(os.listdir("/proc/self/fd")) == fds
    assert served.server.interests().keys() == {served.server._listener.fileno()}


def test_without_descriptors_connections_are_turned_away(serve: Serve, runtime_dir: Path) -> None:
    """And the listening socket is not ready for ever: that would be a busy loop."""
    served = serve({control.Status: lambda v: None})
    caller = Caller(runtime_dir, served.turn)
    assert caller.ask(request("status"))["id"] == 1
    waiting = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(5)]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(fd) for fd in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest, limits[1]))
    try:
        held = []
        with contextlib.suppress(OSError):
            while True:
                held.append(os.dup(0))
        for sock in waiting:
            sock.connect(str(runtime_dir / "control"))
        until(lambda: not served.turn(), "nothing to do any more")
        assert caller.ask(request("status"))["id"] == 1
        assert all(sock.recv(1) == b"" for sock in waiting)
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    later = Caller(runtime_dir, served.turn)
    assert later.ask(request("status"))["id"] == 1
    for sock in (*waiting, caller, later):
        sock.close()


def test_a_verb_that_kills_each_coordinator_is_given_up(runtime_dir: Path) -> None:
    """The client does not ask the successors of those that died of it for ever."""
    done = threading.Event()

    def die() -> None:
        while not done.is_set():
            listener = LineListener(runtime_dir / "control")
            while not done.is_set():
                if select.select([listener], [], [], 0.02)[0]:
                    connection = listener.accept()
                    assert connection is not None
                    while not connection.lines:
                        select.select([connection], [], [], 1.0)
                        connection.receive()
                    connection.close()
                    break
            listener.close()

    thread = threading.Thread(target=die)
    thread.start()
    client = ControlClient(runtime_dir, "t", lambda: True, lambda: None, after=0)
    with pytest.raises(VmmError, match="coordinators died while handling this request") as caught:
        client.ask(control.Status)
    assert caught.value.exit_code is ExitCode.WORKER_DIED
    client.close()
    done.set()
    thread.join()


# --- verbs, events, consoles ---------------------------------------------------------------------


@given(st.one_of(st.binary(max_size=200),
                 st.dictionaries(st.sampled_from(["v", "id", "verb", "owner_start", "slot", "client", "after"]),
                                 st.one_of(st.integers(), st.text(max_size=5), st.none(), st.lists(st.integers()),
                                           st.sampled_from(["status", "pause", "sync", "events"])))
                 .map(lambda d: json.dumps(d).encode())))
def test_any_bytes_are_a_verb_or_an_error(data: bytes) -> None:
    error = None
    try:
        assert control.decode_verb(data).v == V
    except VmmError as exc:
        error = exc
    assert error is None or isinstance(error.request_id, int)  # type: ignore[attr-defined]


def numbers(answer: dict[str, Any] | None) -> list[int]:
    assert answer is not None
    return [json.loads(bytes(event))["n"] for event in answer["events"]]


def test_events_are_bounded_and_what_was_dropped_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_module, "_EVENTS", 10)
    log = EventLog(MachineControl())
    assert log.since(0) is None
    assert log.since(-1) == {"events": [], "next": 0, "dropped": 0}
    for n in range(25):
        log.add({"n": n})
    answer = log.since(0)
    assert numbers(answer) == list(range(15, 25))
    assert answer is not None
    assert (answer["next"], answer["dropped"]) == (25, 15)
    assert numbers(log.since(20)) == list(range(20, 25))
    assert log.since(25) is None
    assert log.since(-1) == {"events": [], "next": 25, "dropped": 0}
    assert log.since(1 << 40) == {"events": [], "next": 25, "dropped": 0}


def test_events_are_bounded_in_bytes_and_an_answer_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_module, "_BYTES", 100_000)
    monkeypatch.setattr(events_module, "_ANSWER", 5_000)
    log = EventLog(MachineControl())
    for n in range(1000):
        log.add({"n": n, "x": "y" * 1000})
    assert log._bytes <= 100_000
    after, seen, dropped = 0, [], 0
    while (answer := log.since(after)) is not None:
        assert sum(len(bytes(e)) for e in answer["events"]) <= 5_000
        seen += numbers(answer)
        after, dropped = answer["next"], dropped + answer["dropped"]
    assert seen == list(range(dropped, 1000))
    log.add({"n": 0, "x": "y" * 1_000_000})     # alone it is more than all may be
    assert numbers(log.since(1000)) == [0]


def test_a_coordinator_that_takes_over_counts_on() -> None:
    block = MachineControl()
    first = EventLog(block)
    for n in range(5):
        first.add({"n": n})
    second = EventLog(block)
    second.add({"n": 5})
    answer = second.since(3)
    assert numbers(answer) == [5]
    assert answer is not None
    assert answer["dropped"] == 2


@given(st.lists(st.tuples(st.integers(0, 2), st.text(alphabet="aä漢\U0001f600\n", max_size=30)), max_size=20),
       st.randoms(use_true_random=False))
def test_consoles_give_whole_lines_of_whole_characters(parts: list[tuple[int, str]], random: Any) -> None:
    """However the bytes were cut on their way here."""
    written: dict[int, bytes] = {}
    for vcpu, text in parts:
        written[vcpu] = written.get(vcpu, b"") + text.encode()
    seen: dict[int, list[str]] = {vcpu: [] for vcpu in written}
    consoles = Consoles(lambda vcpu, text: seen[vcpu].append(text))
    left = dict(written)
    while any(left.values()):
        vcpu = random.choice([v for v, data in left.items() if data])
        cut = random.randint(1, 7)
        consoles.write(vcpu, left[vcpu][:cut])
        left[vcpu] = left[vcpu][cut:]
    assert all(text.endswith("\n") for texts in seen.values() for text in texts)
    for vcpu in written:
        consoles.write(vcpu, b"", final=True)
    assert {vcpu: "".join(texts) for vcpu, texts in seen.items()} == {v: t.decode() for v, t in written.items()}


def test_a_line_without_an_end_comes_in_pieces() -> None:
    seen: list[str] = []
    consoles = Consoles(lambda vcpu, text: seen.append(text))
    for _ in range(100):
        consoles.write(0, b"x" * 1000)
    assert len(seen) == 100_000 // 8192
    consoles.write(0, b"\n")
    assert "".join(seen) == "x" * 100_000 + "\n"


def test_connecting_where_nobody_listens_leaves_nothing_open(runtime_dir: Path) -> None:
    fds = os.listdir("/proc/self/fd")
    with pytest.raises(FileNotFoundError):
        connect_lines(runtime_dir / "control")
    assert os.listdir("/proc/self/fd") == fds
