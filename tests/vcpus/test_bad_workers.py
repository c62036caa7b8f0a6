"""What a machine hears from its workers, and from whoever else reaches their sockets and shared memory: frames that
are none of the protocol, connections that say nothing, control blocks written over, workers that stand still. None
of it ends the machine, or harms another vCPU."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import zmq
from machines import ACCELS, nothing_left, replace, spec, until
from shared import control_blocks, machine_block

from ipc import layout, sockets
from ipc import messages as m
from ipc.layout import PROTOCOL_VERSION, VcpuControl, VcpuRequest, VcpuState, control_error, control_size
from ipc.shm import Segment
from ipc.sockets import FdListener, send_fd
from vmm.client.machine import Machine
from vmm.coordinator import segments
from vmm.errors import ExitCode, VmmError
from vmm.machine.names import belongings, machine_dir, segment_name
from vmm.machine.spec import MachineSpec
from vmm.vcpus import pool as vcpus
from vmm.vcpus.handle import VcpuHandle
from vmm.vcpus.link import Endpoints
from vmm.vcpus.pool import VcpuPool
from workers import zygote
from workers.accel.base import Accelerator, Exit
from workers.process import Worker
from workers.zygote import Zygote

TIMEOUT = 60.0


@pytest.fixture(params=ACCELS)
def accel(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def busy(accel: str, **changes: Any) -> MachineSpec:
    return replace(spec("stamp", accel=accel, writes=0, spin=200, timeout=None), **changes)


def restarts(machine: Machine) -> int:
    try:
        return int(machine.status()["coordinator"]["restarts"])
    except VmmError:
        return -1


def goes_on(machine: Machine) -> None:
    """Every vCPU that lives writes, and that is logged."""
    before = [v["dirty_pages"] for v in machine.status()["vcpus"]]

    def more() -> bool:
        machine.sync("a")
        return all(v["dirty_pages"] > n or v["state"] in ("dead", "exited")
                   for v, n in zip(machine.status()["vcpus"], before, strict=True))

    until(more, "the vCPUs go on", TIMEOUT)


# --- frames -------------------------------------------------------------------------------------------------

#: For the notify socket: none of them is a notification of a vCPU that there is.
BAD_NOTIFICATIONS: list[list[bytes]] = [
    [b""], [b"\xc1"], [b"x" * 1000], [b"", b""], [m.encode(m.RingFull(0)), b"more"], [m.encode(m.RingFull(2))],
    [m.encode(m.RingFull(-1))], [m.encode(m.Exited(1 << 40, m.ExitReason.CODE))], [m.encode(m.Done(1))],
    [msgspec.msgpack.encode({"t": "exited", "vcpu": 0, "reason": "x"})],
    [msgspec.msgpack.encode({"t": "exited", "vcpu": 0, "reason": 1, "code": 1 << 40})],
    [msgspec.msgpack.encode({"t": "exited", "vcpu": 0, "reason": 1, "detail": "x" * 2000})],
    [msgspec.msgpack.encode({"t": "console", "vcpu": 0, "data": 5})],
    [msgspec.msgpack.encode({"t": "no-such", "vcpu": 0})], [msgspec.msgpack.encode([1, 2])],
]
#: For the requests socket.
BAD_REPLIES: list[list[bytes]] = [[b""], [b"\xc1"], [b"", b""], [m.encode(m.Done(1)), b"more"],
                                  [m.encode(m.RingFull(0))], [msgspec.msgpack.encode({"t": "done", "seq": "x"})]]


def test_frames_that_are_none_of_the_protocol_are_counted_and_dropped(accel: str) -> None:
    with Machine.launch(busy(accel)) as machine, zmq.Context() as context:
        machine.register("a")
        endpoints = Endpoints.of(machine_dir("t"), belongings("t").owner_pid())
        with sockets.connect(context, zmq.PUSH, endpoints.notify) as notify, \
             sockets.connect(context, zmq.DEALER, endpoints.requests, b"stranger") as requests:
            for frames in BAD_NOTIFICATIONS:
                notify.send_multipart(frames)
            for frames in BAD_REPLIES:
                requests.send_multipart(frames)
            # An answer to nothing that was asked is no error: a worker may be late.
            requests.send(m.encode(m.Done(5)))
            expected = len(BAD_NOTIFICATIONS) + len(BAD_REPLIES)

            def dropped() -> int:
                machine.pause()
                machine.log_stop(0)     # asks the workers, so their answers are read
                machine.log_start(0)
                machine.resume()
                return int(machine.status()["coordinator"]["bad_messages"])

            until(lambda: dropped() == expected, "all of them dropped", TIMEOUT)
        goes_on(machine)
        assert machine.status()["coordinator"]["restarts"] == 0
        machine.stop()
        assert machine.wait(TIMEOUT)["exit_code"] == ExitCode.STOPPED


def test_an_answer_counts_only_from_the_worker_that_was_asked(tmp_path: Path) -> None:
    """Two stand-ins for workers; one answers for the other."""
    with Segment.create(segment_name("t", "control"), control_size(2)) as control, zmq.Context() as context:
        pool = VcpuPool(tmp_path, None, lambda message: None, lambda vcpu: None)
        try:
            for index in range(2):
                vcpu = VcpuHandle(index, layout.vcpu_control(control.address, index), 0)
                vcpu.watch(os.getpid())
                pool.all.append(vcpu)
            socks = [sockets.connect(context, zmq.DEALER, Endpoints.of(tmp_path).requests,
                                     str(index).encode()) for index in range(2)]

            def answer() -> None:
                asked = m.decode_request(socks[0].recv())
                socks[1].send(m.encode(m.Failed(asked.seq, "not from me")))
                socks[1].send(m.encode(m.Done(asked.seq, 1)))
                time.sleep(0.05)    # not to synchronise: so that the wrong ones are likely to come first
                socks[0].send(m.encode(m.Done(asked.seq, 7)))

            thread = threading.Thread(target=answer)
            thread.start()
            replies = pool.request(pool.all[:1], lambda seq, s: m.GetState(seq))
            thread.join()
            assert {index: reply.value for index, reply in replies.items()} == {0: 7}
            for sock in socks:
                sock.close()
        finally:
            for vcpu in pool.all:
                os.close(vcpu.pidfd)
                vcpu.pidfd = -1
            pool.close()


def test_a_reason_that_nobody_knows_is_an_unknown_reason() -> None:
    frame = msgspec.msgpack.encode({"t": "exited", "vcpu": 0, "reason": 77})
    message = m.decode_notification(frame)
    assert isinstance(message, m.Exited)
    assert message.reason is m.ExitReason.UNKNOWN


def test_notifications_are_read_for_a_while_and_the_rest_later(tmp_path: Path) -> None:
    """A guest that prints faster than the coordinator reads keeps nobody waiting."""
    seen = 0

    def count(message: m.AnyNotification) -> None:
        nonlocal seen
        seen += 1

    total = 200_000
    with Segment.create(segment_name("t", "control"), control_size(1)) as control, zmq.Context() as context:
        pool = VcpuPool(tmp_path, None, count, lambda vcpu: None)
        try:
            pool.all.append(VcpuHandle(0, layout.vcpu_control(control.address, 0), 0))
            with context.socket(zmq.PUSH) as notify:
                notify.sndhwm = notify.linger = 0
                notify.connect(Endpoints.of(tmp_path).notify)
                frame = m.encode(m.Console(0, b"x\n"))
                for _ in range(total):
                    notify.send(frame)
                assert pool.notify.poll(TIMEOUT * 1000)
                pool.drain_notifications()
                assert 0 < seen < total // 2
                calls = 1
                while seen < total:
                    assert pool.notify.poll(TIMEOUT * 1000)
                    pool.drain_notifications()
                    calls += 1
                assert calls > 2
        finally:
            pool.close()


def test_everything_is_read_when_nobody_prints_any_more(accel: str, tmp_path: Path) -> None:
    """The last line of a guest that ends after a flood."""
    image = tmp_path / "flood.bin"
    # mov dx, 0x3f8; mov ecx, 20000; mov al, '\n'; out dx, al; dec ecx; jnz back to the out; xor eax, eax; exit
    image.write_bytes(bytes.fromhex("66baf803 b9204e0000 b00a ee ffc9 75fb 31c0 e7f4".replace(" ", "")))
    machine_spec = spec("", accel=accel, image=image, load_address=0x10_0000, params=[], vcpus=1, mib=4)
    with Machine.launch(machine_spec, start=False) as machine:
        lines = 0
        ended = []
        machine.start()
        for event in machine.events(TIMEOUT):
            lines += event["event"] == "console"
            if event["event"] == "ended":
                ended.append(lines)
        assert machine.wait(TIMEOUT)["exit_code"] == 0
    assert lines <= 20000
    assert ended == [lines]     # nothing comes behind the end


# --- descriptors --------------------------------------------------------------------------------------------


@contextmanager
def connection(path: Path, *packets: tuple[bytes, list[int]]) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(TIMEOUT)
        sock.connect(str(path))
        for data, fds in packets:
            socket.send_fds(sock, [data], fds)
        yield sock


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[FdListener]:
    made = FdListener(tmp_path / "fds")
    yield made
    made.close()


def same_file(fd: int, path: Path) -> bool:
    found = os.fstat(fd)
    wanted = path.stat()
    os.close(fd)
    return (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino)


def test_a_descriptor_comes_whoever_else_is_connected(listener: FdListener, tmp_path: Path) -> None:
    """Silent connections, closed ones, junk: they are dropped, and nobody waits for them."""
    (tmp_path / "file").touch()
    with ExitStack() as stack:
        stack.enter_context((tmp_path / "file").open())
        own = stack.enter_context((tmp_path / "file").open()).fileno()
        for _ in range(3):
            stack.enter_context(connection(listener.path))
        for packets in ([(b"", [])], [(b"\0\0\0\0", [])], [(b"short"[:2], [own])], [(b"\0" * 5, [own])],
                        [(struct.pack("<I", 1), [own, own])]):
            stack.enter_context(connection(listener.path, *[p for p in packets if p[0]]))
        with connection(listener.path):
            pass
        send_fd(str(listener.path), 7, own, TIMEOUT)
        index, fd = listener.receive(TIMEOUT)
        assert index == 7
        assert same_file(fd, tmp_path / "file")
        assert listener.dropped == 5        # the empty packet was not sent: a connection that is silent


def test_no_descriptor_is_a_timeout_however_many_connect(listener: FdListener) -> None:
    with ExitStack() as stack:
        for _ in range(600):
            stack.enter_context(connection(listener.path))
            listener.serve()
        with pytest.raises(TimeoutError):
            listener.receive(0.2)
        assert len(listener._waiting) <= 2 * layout.MAX_VCPUS


def test_a_descriptor_is_taken_only_from_whom_it_is_expected(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def known(pid: int, index: int) -> bool:
        seen.append((pid, index))
        return index == 2

    listener = FdListener(tmp_path / "fds", known)
    with Path("/dev/null").open() as null:
        for index in range(3):
            send_fd(str(listener.path), index, null.fileno(), TIMEOUT)

        index, fd = listener.receive(TIMEOUT)
        assert same_file(fd, Path("/dev/null"))
        assert (index, listener.dropped) == (2, 2)
        assert seen == [(os.getpid(), i) for i in range(3)]
    listener.close()


@pytest.mark.kvm
def test_strangers_at_the_descriptor_socket_hold_nobody_up() -> None:
    """Neither a switch of tracking nor a coordinator that takes over: both have every vCPU's descriptor sent."""
    stop = threading.Event()
    with Machine.launch(busy("kvm")) as machine, Path("/dev/null").open() as null:
        machine.register("a")
        path = machine_dir("t") / "fds"

        def bother() -> None:
            with ExitStack() as stack:
                while not stop.wait(0.002):
                    try:
                        stack.enter_context(connection(path))
                        with connection(path):
                            pass
                        send_fd(str(path), 0, null.fileno(), TIMEOUT)
                        send_fd(str(path), 99, null.fileno(), TIMEOUT)
                    except OSError:     # a coordinator is being replaced
                        stack.close()

        bothering = threading.Thread(target=bother)
        bothering.start()
        try:
            machine.set_tracking("bitmap")
            machine.set_tracking("ring")
            until(lambda: machine.status()["coordinator"]["bad_messages"] > 0, "some dropped", TIMEOUT)
            os.kill(machine.status()["coordinator"]["pid"], signal.SIGKILL)
            until(lambda: restarts(machine) == 1, "another coordinator", TIMEOUT)
            machine.set_tracking("bitmap")
            machine.set_tracking("ring")
        finally:
            stop.set()
            bothering.join()
        goes_on(machine)
        assert [v["state"] for v in machine.status()["vcpus"]].count("dead") == 0


# --- control blocks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["state", "exit_reason", "tracking"])
def test_a_number_that_names_nothing_is_reported_as_such(accel: str, field: str) -> None:
    with Machine.launch(busy(accel)) as machine, control_blocks("t") as blocks:
        machine.register("a")
        machine.pause()

        def is_reported() -> bool:
            """A vCPU that has just been kicked may still be on its way to sleep, and write where it is."""
            setattr(blocks[1], field, 77)
            return field == "tracking" or bool(machine.status()["vcpus"][1][field] == "unknown")

        until(is_reported, "it is reported", TIMEOUT)
        os.kill(machine.status()["coordinator"]["pid"], signal.SIGKILL)
        until(lambda: restarts(machine) == 1, "another coordinator", TIMEOUT)
        machine.resume()
        goes_on(machine)
        assert machine.status()["vcpus"][1]["state"] in ("running", "waiting", "ring-full")
        machine.stop()
        machine.wait(TIMEOUT)


#: Whoever takes over finds the workers by it: it is theirs that must hold (tests of the journal).
SPARED = range(VcpuControl.pid.offset, VcpuControl.pid.offset + VcpuControl.pid.size)


@pytest.mark.parametrize("seed", range(4))
def test_a_block_written_over_harms_that_vcpu_alone(accel: str, seed: int) -> None:
    """Whatever is in it: the coordinator answers, so does one that takes over, and the other vCPU loses nothing."""
    chance = random.Random(seed)
    with Machine.launch(busy(accel)) as machine, control_blocks("t") as blocks:
        machine.register("a")
        address = ctypes.addressof(blocks[1])
        for _ in range(3):
            for offset in range(ctypes.sizeof(VcpuControl)):
                if offset not in SPARED:
                    ctypes.c_uint8.from_address(address + offset).value = chance.randrange(256)
            machine.status()
            machine.sync("a")
        os.kill(machine.status()["coordinator"]["pid"], signal.SIGKILL)
        until(lambda: restarts(machine) == 1, "another coordinator", TIMEOUT)
        n = machine.status()["vcpus"][0]["dirty_pages"]
        until(lambda: machine.sync("a").pages >= 0 and machine.status()["vcpus"][0]["dirty_pages"] > n,
              "the other vCPU goes on", TIMEOUT)
        machine.stop()
        report = machine.wait(TIMEOUT)
        assert report["vcpus"][0]["exit_reason"] == "stopped"


def test_enumerations_of_others_take_every_number() -> None:
    for kind in (VcpuState, layout.Tracking, layout.ReaperState, m.ExitReason):
        assert kind(12345) is kind["UNKNOWN"]
        assert kind(kind["UNKNOWN"]) is kind["UNKNOWN"]
        with pytest.raises(ValueError, match="x"):
            kind("x")


# --- versions -----------------------------------------------------------------------------------------------


def test_a_control_segment_says_whose_it_is() -> None:
    with Segment.create(segment_name("t", "control"), control_size(2)) as segment:
        block = layout.machine_control(segment.address)
        assert "not made by this program" in control_error(segment.address, segment.size)
        block.magic, block.version, block.vcpu_count = layout.CONTROL_MAGIC, PROTOCOL_VERSION + 1, 2
        assert control_error(segment.address, segment.size) == (
            f"it was started by another version of this program (protocol {PROTOCOL_VERSION + 1}, here "
            f"{PROTOCOL_VERSION})")
        block.version = PROTOCOL_VERSION
        assert control_error(segment.address, segment.size) == ""
        assert "bytes for 2 vCPUs" in control_error(segment.address, segment.size - 4096)
        assert "bytes" in control_error(segment.address, 100)


def test_a_coordinator_of_another_version_does_not_take_over(accel: str, capfd: pytest.CaptureFixture[str]) -> None:
    machine = Machine.launch(busy(accel))
    try:
        with machine_block("t") as block:
            block.version = PROTOCOL_VERSION + 1
        os.kill(machine.status()["coordinator"]["pid"], signal.SIGKILL)
        until(nothing_left, "the machine's end", TIMEOUT)
    finally:
        machine.close()


# --- workers on their own -----------------------------------------------------------------------------------


@contextmanager
def workers(machine_spec: MachineSpec, **changes: Any) -> Iterator[tuple[VcpuPool, list[int]]]:
    """Real ones, without a coordinator, and who of them has died. ``changes``: what they are told differently."""
    died: list[int] = []
    directory = machine_dir(machine_spec.name)
    with ExitStack() as stack:
        for made in (directory.parent, directory):
            made.mkdir(mode=0o700)
            stack.callback(made.rmdir)
        segments.make_pipes(machine_spec, directory)
        stack.callback((directory / "ring-full").unlink)
        null = stack.enter_context(Path("/dev/null").open("wb"))
        read, write = os.pipe()
        stack.callback(os.close, write)
        stack.callback(os.close, read)
        process, sock = zygote.start(read, null.fileno())
        stack.callback(process.wait, TIMEOUT)
        stack.callback(process.terminate)
        parts = segments.make_parts(machine_spec, machine_spec.asked_tracking)
        stack.callback(parts.close)
        pool = VcpuPool(directory, Zygote(sock.detach()), lambda message: None,
                      lambda vcpu: died.append(vcpu.index))
        stack.callback(lambda: [Path(each.removeprefix("ipc://")).unlink(missing_ok=True) for each in pool.endpoints])
        stack.callback(pool.close)
        for vcpu in segments.make_handles(parts):
            told = segments.worker_spec(parts, vcpu.index, directory, pool.endpoints, read)
            pool.spawn(vcpu, msgspec.structs.replace(told, **changes))
        pool.start_paused()
        yield pool, died


def test_workers_of_another_version_are_refused_in_one_line(accel: str) -> None:
    told = PROTOCOL_VERSION + 1
    with workers(spec("idle", accel=accel, milliseconds=0), version=told) as (pool, _), \
         pytest.raises(VmmError, match=rf"vcpu \d: was asked to speak protocol {told}"):
        pool.await_hello()


def test_a_hello_of_another_version_is_refused(tmp_path: Path) -> None:
    with Segment.create(segment_name("t", "control"), control_size(1)) as control, zmq.Context() as context:
        pool = VcpuPool(tmp_path, None, lambda message: None, lambda vcpu: None)
        try:
            vcpu = VcpuHandle(0, layout.vcpu_control(control.address, 0), 0)
            vcpu.watch(os.getpid())
            pool.all.append(vcpu)
            with sockets.connect(context, zmq.PUSH, Endpoints.of(tmp_path).notify) as notify:
                notify.send(m.encode(m.Hello(0, os.getpid(), PROTOCOL_VERSION + 1)))
                with pytest.raises(VmmError, match=f"its worker speaks protocol {PROTOCOL_VERSION + 1}"):
                    pool.await_hello()
        finally:
            os.close(vcpu.pidfd)
            vcpu.pidfd = -1
            pool.close()


def test_why_a_worker_ended_in_its_set_up_is_heard_after_its_end(tmp_path: Path) -> None:
    """What it said last comes through two ZeroMQ threads; that it has ended is known at once."""
    with Segment.create(segment_name("t", "control"), control_size(1)) as control, zmq.Context() as context, \
         sockets.connect(context, zmq.PUSH, Endpoints.of(tmp_path).notify) as notify:
        worker = subprocess.Popen(["true"])
        pool = VcpuPool(tmp_path, None, lambda message: None,
                        lambda vcpu: notify.send(m.encode(m.Hello(vcpu.index, worker.pid, error="no such thing"))))
        try:
            vcpu = VcpuHandle(0, layout.vcpu_control(control.address, 0), 0)
            vcpu.watch(worker.pid)
            pool.all.append(vcpu)
            with pytest.raises(VmmError, match="vcpu 0: no such thing"):
                pool.await_hello()
        finally:
            worker.wait(TIMEOUT)
            pool.close()


def stopped(pid: int) -> bool:
    """Every thread of the process is (proc_pid_stat(5))."""
    threads = Path(f"/proc/{pid}/task").glob("*/stat")
    return all(stat.read_text().rpartition(")")[2].split()[0] == "T" for stat in threads)


@pytest.mark.parametrize("what", ["kick", "request", "reset"])
def test_a_worker_that_stands_still_is_given_up_and_the_others_go_on(
        accel: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With less patience than a machine has (30 s)."""
    with workers(spec("idle", accel=accel, milliseconds=0)) as (pool, died):
        pool.await_hello()
        monkeypatch.setattr(vcpus, "_KICK_TIMEOUT", 4.0)
        monkeypatch.setattr(vcpus, "_REPLY_TIMEOUT", 4.0)
        still, other = pool.all
        still.signal(signal.SIGSTOP)
        until(lambda: stopped(still.pid), "all of its threads stand still", TIMEOUT)
        if what == "kick":
            pool.kick_all()
        elif what == "request":
            assert set(pool.request(pool.all, lambda seq, s: m.GetState(seq))) == {other.index}
        else:
            for vcpu in pool.all:
                vcpu.ring.ask_reset(0)
            pool.await_resets(pool.all)
        assert died == [still.index]
        assert not still.alive
        assert still.control.state == VcpuState.DEAD
        assert "within 4 s" in still.fate
        assert set(pool.request([other], lambda seq, s: m.GetState(seq))) == {other.index}
        pool.shut_down()


def test_how_a_vcpu_has_ended_is_in_its_state_before_anybody_has_heard_of_it(accel: str) -> None:
    """What it says by itself is not read here: that it is over is seen in its control block, as by a pause."""
    with workers(spec("idle", accel=accel, milliseconds=0)) as (pool, _):
        def exits() -> list[Any]:
            replies = pool.request(pool.all, lambda seq, s: m.GetState(seq))
            return [replies[vcpu.index].data.get("exit") for vcpu in pool.all]

        pool.await_hello()
        assert exits() == [None, None]
        for vcpu in pool.all:
            vcpu.control.stop_reason = m.ExitReason.TIMEOUT
            vcpu.control.request |= VcpuRequest.STOP
            vcpu.kick()
        until(lambda: {vcpu.control.state for vcpu in pool.all} == {VcpuState.EXITED}, "they have ended", TIMEOUT)
        assert exits() == [{"reason": m.ExitReason.TIMEOUT, "code": 0, "detail": ""}] * 2
        pool.shut_down()


def test_while_pages_are_missing_nobody_is_given_up(accel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with workers(spec("idle", accel=accel, milliseconds=0)) as (pool, died):
        pool.await_hello()
        monkeypatch.setattr(vcpus, "_MISSING_TIMEOUT", 0.5)
        pool.pages_missing = True
        pool.all[0].signal(signal.SIGSTOP)
        until(lambda: stopped(pool.all[0].pid), "all of its threads stand still", TIMEOUT)
        with pytest.raises(VmmError, match=r"vcpu 0: .*post-copy"):
            pool.kick_all()
        assert not died
        pool.all[0].signal(signal.SIGCONT)
        pool.pages_missing = False
        pool.kick_all()
        pool.shut_down()


@pytest.mark.kvm
def test_a_descriptor_that_is_no_vcpu_is_the_end_of_that_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    with workers(spec("idle", accel="kvm", milliseconds=0)) as (pool, died):
        pool.await_hello()
        with Path("/dev/null").open() as null:
            pool._early_fds[0] = os.dup(null.fileno())
            pool.adopt_fds(pool.all[:1])
        assert died == [0]
        assert "did not send a vCPU that can be mapped" in pool.all[0].fate
        pool.shut_down()


class Failing:
    """In place of an accelerator: it has a fault."""

    def clear_immediate_exit(self) -> None:
        pass

    def interrupt(self) -> None:
        pass

    def run(self) -> Exit:
        raise ZeroDivisionError("of its own")

    def get_state(self) -> object:
        raise TypeError("of its own")


def test_a_fault_of_the_worker_itself_is_the_end_of_that_vcpu_or_of_that_request(tmp_path: Path) -> None:
    """Its threads live on."""
    with Segment.create(segment_name("t", "control"), control_size(1)) as control, zmq.Context() as context, \
         context.socket(zmq.PULL) as notify, context.socket(zmq.ROUTER) as requests:
        notify.bind(Endpoints.of(tmp_path).notify)
        requests.bind(Endpoints.of(tmp_path).requests)
        worker = Worker(m.WorkerSpec(
            machine="t", belongings="t", index=0, vcpu_count=1, accel="", slots=[], fd_socket="",
            control_segment=control.name,
            system_slot=m.SlotSpec(layout.SYSTEM_SLOT, 0, 4096, ""), boot={},
            request_endpoint=Endpoints.of(tmp_path).requests,
            notify_endpoint=Endpoints.of(tmp_path).notify))
        worker.vcpu.accel = cast(Accelerator, Failing())
        threads = [threading.Thread(target=worker.vcpu.run), threading.Thread(target=worker.service.serve)]
        for thread in threads:
            thread.start()
        try:
            assert notify.poll(TIMEOUT * 1000)
            ended = m.decode_notification(notify.recv())
            assert isinstance(ended, m.Exited)
            assert (ended.reason, ended.detail) == (m.ExitReason.INTERNAL_ERROR,
                                                    "its worker failed: ZeroDivisionError: of its own")
            assert worker.vcpu.control.state == VcpuState.EXITED
            until(lambda: _asked(requests, m.GetState(1)), "it has connected", TIMEOUT)
            assert requests.poll(TIMEOUT * 1000)
            answer = m.decode_reply(requests.recv_multipart()[1])
            assert answer == m.Failed(1, "its worker failed: TypeError: of its own")
            worker.vcpu.control.state = 77       # written over: its writer puts it right, at the next kick
            worker.vcpu.control.kick_request += 1
            worker.vcpu.wake_up()
            until(lambda: worker.vcpu.control.state == VcpuState.EXITED, "the state is right again", TIMEOUT)
        finally:
            requests.send_multipart([b"0", b"\xc1"])       # is no request: nor does that end anything
            requests.send_multipart([b"0", m.encode(m.Shutdown(2))])
            for thread in threads:
                thread.join(TIMEOUT)
        assert m.decode_reply(requests.recv_multipart()[1]) == m.Done(2)
        worker.close()


def _asked(requests: zmq.Socket[bytes], request: m.Request) -> bool:
    requests.setsockopt(zmq.ROUTER_MANDATORY, 1)
    try:
        requests.send_multipart([b"0", m.encode(request)])
    except zmq.ZMQError:
        return False
    return True
