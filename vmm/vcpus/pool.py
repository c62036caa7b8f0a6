"""The vCPU workers as the coordinator sees them: start, kick, ask, harvest, bury.

A worker is known by its pidfd, never by its pid: a signal to a pidfd cannot hit a stranger, and a
coordinator that replaces one that died can watch workers that are not its children.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import os
import select
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import zmq
from numpy.typing import NDArray

from ipc import sockets
from ipc.layout import MAX_SLOTS, PROTOCOL_VERSION, VcpuControl, VcpuRequest, VcpuState
from ipc.linux import futex
from ipc.linux.processid import ProcessId, identity, open_process
from ipc.messages import (
    AnyNotification,
    AnyReply,
    AnyRequest,
    Done,
    Exited,
    ExitReason,
    Failed,
    Hello,
    MessageError,
    RebuildRing,
    SendFd,
    Shutdown,
    WorkerSpec,
    decode_notification,
    decode_reply,
    encode,
)
from ipc.shm import Segment
from workers.zygote import Zygote

from ..errors import ExitCode, VmmError

__all__ = ["Shard", "Shards"]

_log = logging.getLogger(__name__)

_RING_PAGE_OFFSET = 64      # KVM_DIRTY_LOG_PAGE_OFFSET (Linux uapi/linux/kvm.h)
_IMMEDIATE_EXIT = 1         # offset of immediate_exit in struct kvm_run
_RING_RESERVE = 64 + 512    # entries the kernel keeps free: its own, and a PML buffer's on Intel
_REPLY_TIMEOUT = 30.0       # seconds; a worker that does not answer by then is taken for dead (Shards.give_up)
_KICK_TIMEOUT = 30.0
_KILL_TIMEOUT = 5.0         # seconds for a killed worker to be gone
_MISSING_TIMEOUT = 3.0      # of either, while pages are missing: it is not the worker's fault
_KICK_REPEAT_MS = 10        # an unacknowledged kick is repeated (workers/process.py says why)
_START_TIMEOUT = 30.0
_STOP_TIMEOUT = 5.0
_KICK_SIGNAL = signal.SIGUSR1
_FD_STEP = 0.1              # seconds between two looks at whether the sender of a descriptor has died
_DRAIN_SECONDS = 0.005      # of notifications at a time: a vCPU that prints without end holds nobody up
_COMPLAINTS = 10            # bad messages that are said; all are counted


_log = logging.getLogger(__name__)


class Shard:
    """One vCPU worker: its process, and its ring as the coordinator has it.

    The ring is mapped (``ring_address``) while there may be something in it. When the worker has died it is
    harvested once more (vmm/dirty/reaper.py) and unmapped; ``control.collected`` says so to a coordinator that
    takes over."""

    def __init__(self, index: int, control: VcpuControl, entries: int) -> None:
        self.index = index
        self.control = control
        self.entries = entries
        self.soft_limit = max(1, entries - _RING_RESERVE)
        self.exited: Exited | None = None
        self.process = ProcessId(0, 0)
        self.pidfd = -1
        #: Why its process has ended, where that is known.
        self.fate = ""
        self.ring_address = 0
        self._ring: Segment | mmap.mmap | None = None
        self._run: mmap.mmap | None = None
        self._immediate: ctypes.c_uint8 | None = None
        self._harvested: NDArray[np.uint64] = np.zeros(4, np.uint64)
        self._harvested_address = self._harvested.ctypes.data
        block = ctypes.addressof(control)
        self._reset_request_address = block + VcpuControl.reset_request.offset
        self._reset_done_address = block + VcpuControl.reset_done.offset
        #: A harvest found no free entry. Rings keep a reserve free, so that never happens unless entries were
        #: written over (KVM does, where it emulates CPL 0: its soft-full check does not run within a batch).
        self.overflowed = False
        #: Times in a row that the vCPU reported a full ring, and nothing was harvested from it in between.
        self.full_but_empty = 0
        self._harvested_at_full = -1

    # --- life ------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        return self.pidfd >= 0

    @property
    def running(self) -> bool:
        """The guest has not ended on this vCPU."""
        return self.alive and self.control.state != VcpuState.EXITED

    @property
    def pid(self) -> int:
        return self.process.pid

    def watch(self, pid: int) -> None:
        """A process that has just been made. Raises ProcessLookupError."""
        self.pidfd = os.pidfd_open(pid)
        try:
            self.process = identity(pid)
            signal.pidfd_send_signal(self.pidfd, 0)
        except ProcessLookupError:      # it has gone, and the pid may be another's: nobody is to look for it again
            self.process = ProcessId(pid, 0)

    def adopt(self, process: ProcessId) -> None:
        """Its process as it was written down (not as the control block has it, which the worker itself writes).
        Raises ProcessLookupError when that has gone."""
        self.process = process
        self.pidfd = open_process(process)

    def signal(self, signum: int) -> None:
        if self.pidfd >= 0:
            try:
                signal.pidfd_send_signal(self.pidfd, signum)
            except ProcessLookupError:
                pass  # its death is seen in the poll loop

    def bury(self) -> None:
        """The process is gone. Its ring stays mapped: what it logged can still be harvested."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1
        if self.control.state != VcpuState.EXITED:
            self.control.exit_reason = ExitReason.WORKER_DIED
            self.control.state = VcpuState.DEAD

    # --- ring ------------------------------------------------------------------------------------

    def map_software_ring(self, segment: Segment) -> None:
        """Not that of a worker whose last entries have been collected."""
        if self.control.collected:
            return
        self._ring = segment
        self.ring_address = segment.address

    def map_kvm(self, fd: int, run_size: int) -> None:
        """Map the kernel's ring and kvm_run through the vCPU fd; the fd is closed. Raises OSError and ValueError
        where it is not that of a vCPU."""
        self.unmap()
        try:
            self._run = mmap.mmap(fd, run_size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            anchor = ctypes.c_uint8.from_buffer(self._run, _IMMEDIATE_EXIT)
            self._immediate = ctypes.c_uint8.from_address(ctypes.addressof(anchor))
            del anchor
            if self.entries:
                self._ring = mmap.mmap(fd, self.entries * 16, mmap.MAP_SHARED,
                                       mmap.PROT_READ | mmap.PROT_WRITE,
                                       offset=_RING_PAGE_OFFSET * mmap.PAGESIZE)
                byte = ctypes.c_char.from_buffer(self._ring)
                self.ring_address = ctypes.addressof(byte)
                del byte
        finally:
            os.close(fd)

    def unmap(self) -> None:
        self._immediate = None
        self.ring_address = 0
        for mapping in (self._ring, self._run):
            if mapping is not None:
                mapping.close()
        self._ring = self._run = None

    def use_ring(self, entries: int) -> None:
        """The worker's ring is another one now, or (0) there is none; it is not mapped yet."""
        self.forget_ring()
        self.entries = entries
        self.soft_limit = max(1, entries - _RING_RESERVE)
        self.full_but_empty = 0
        self.overflowed = False

    def forget_ring(self) -> None:
        """There is nothing in it any more."""
        self.ring_address = 0
        if isinstance(self._ring, mmap.mmap):   # a software ring's segment is its maker's to close
            self._ring.close()
        self._ring = None

    @property
    def outstanding(self) -> int:
        """Entries harvested and not reset yet. Below 0 or above the ring's size: it has lost count."""
        return int(self.control.fetch_total - self.control.reset_total)

    @property
    def countable(self) -> bool:
        """Its totals are such as can be."""
        return 0 <= self.outstanding <= self.entries

    def harvest(self, table: int, pages: NDArray[np.uint64] | None = None) -> int:
        """Harvest what is there into the staging bitmaps; the number of entries.

        ``table`` is the slot table's address; ``pages`` (uint64 [entries, 3]) takes what was harvested, for
        tracing. The fetch index is stored last: a coordinator that dies before has its successor harvest the
        same entries.
        """
        if not self.ring_address:
            return 0
        from ipc import compiled

        control = self.control
        out = self._harvested
        out[2], out[3] = control.last_slot, control.last_offset
        fetch = control.fetch_total
        limit = min(max(0, self.entries - self.outstanding), self.entries)
        compiled.harvest(self.ring_address, self.entries, fetch, limit, table, MAX_SLOTS, self._harvested_address,
                        *((0, 0) if pages is None else (pages.ctypes.data, len(pages))))
        count = int(out[0])
        self.overflowed = self.overflowed or count == limit
        if count:
            control.last_slot, control.last_offset = int(out[2]), int(out[3])
            control.bad_entries += int(out[1])
            control.dirty_pages += count
            control.fetch_total = fetch + count
        return count

    def reported_full(self) -> None:
        """The vCPU had reported a full ring, and it has been reaped. (Perhaps by a reap that came before the
        report was read: then this one has found nothing, but the ring is not stuck.)"""
        harvested = int(self.control.dirty_pages)
        self.full_but_empty = self.full_but_empty + 1 if harvested == self._harvested_at_full else 0
        self._harvested_at_full = harvested

    def ask_reset(self, expected: int) -> None:
        """Have the worker reset its ring, of which ``expected`` entries have been harvested and not reset yet, and
        its vCPU go on if it waits at ring-full."""
        self.control.reset_expected = expected
        self.control.reset_request = (self.control.reset_request + 1) & 0xFFFF_FFFF
        futex.wake(self._reset_request_address, 1)

    def await_reset(self, seconds: float) -> bool:
        """It has done so; False when that takes longer."""
        done = self.control.reset_done
        if done != self.control.reset_request:
            futex.wait(self._reset_done_address, done, seconds)
        return bool(self.control.reset_done == self.control.reset_request)

    # --- kick ------------------------------------------------------------------------------------

    def kick(self) -> None:
        """Ask the vCPU out of the guest: request, immediate-exit flag, signal, in this order."""
        self.control.kick_request = (self.control.kick_request + 1) & 0xFFFF_FFFF
        self.prod()

    def prod(self) -> None:
        """The part of a kick that may be repeated."""
        if self._immediate is not None:
            self._immediate.value = 1
        self.control.immediate_exit = 1
        self.signal(_KICK_SIGNAL)

    @property
    def kick_pending(self) -> bool:
        return self.running and self.control.kick_ack != self.control.kick_request


class Shards:
    """All workers of a machine, and the two sockets they are spoken to over.

    ``zygote`` makes the workers (None: they are there already). ``on_notification`` is called for every
    notification but the set-up's, and its ``vcpu`` is one of these; ``on_death`` with a shard whose process has
    ended. Frames that are none of the protocol are counted (``dropped``) and change nothing.

    A worker that does not do in time what it is asked for is taken for dead: it is killed and buried, and whoever
    asked goes on without it. Only while pages are missing (post-copy) it is not its fault, and VmmError is raised.
    """

    def __init__(self, directory: Path, zygote: Zygote | None, on_notification: Callable[[AnyNotification], None],
                 on_death: Callable[[Shard], None]) -> None:
        self.directory = directory
        self._zygote = zygote
        self.all: list[Shard] = []
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self.notify = sockets.bind(self._context, zmq.PULL, sockets.endpoint(directory, "notify"),
                                   frame_max=sockets.FRAME_MAX)
        self._requests = sockets.bind(self._context, zmq.ROUTER, sockets.endpoint(directory, "requests"),
                                      frame_max=sockets.FRAME_MAX)
        self._bad_messages = 0
        self._fds = sockets.FdListener(directory / "fds", self._sends_fd)
        self._on_notification = on_notification
        self._on_death = on_death
        #: Not from zero: an answer to a coordinator that died must not be taken for one to this.
        self._seq = os.getpid() << 32
        self._early_fds: dict[int, int] = {}
        self._pauses = 0
        #: Post-copy: a vCPU that waits for a page may take as long as the page does.
        self.pages_missing = False

    # --- start and end -----------------------------------------------------------------------

    def spawn(self, shard: Shard, spec: WorkerSpec) -> None:
        """Start the worker's process; it reads its specification from a pipe."""
        assert self._zygote is not None
        read, write = os.pipe()
        try:
            shard.watch(self._zygote.fork(spec.accel, read))
            self.all.append(shard)
        except OSError as exc:
            os.close(write)
            raise VmmError(f"vcpu {shard.index}: its worker cannot be started: {exc.strerror or exc}",
                           ExitCode.WORKER_DIED) from None
        finally:
            os.close(read)
        with contextlib.suppress(BrokenPipeError), os.fdopen(write, "wb") as pipe:  # await_hello says that it ended
            pipe.write(msgspec.json.encode(spec))

    def await_hello(self) -> None:
        """Until every worker is set up and its ring is mapped. Raises VmmError with its reason."""
        self._end_zygote()
        waiting = {shard.index for shard in self.all}
        deadline = time.monotonic() + _START_TIMEOUT
        while waiting:
            self._poll(self.notify, deadline)
            gone = next((s for s in self.all if s.index in waiting and not s.alive), None)
            while time.monotonic() < deadline and (hello := self._notification()) is not None:
                if not isinstance(hello, Hello):
                    continue
                if hello.error:
                    raise VmmError(f"vcpu {hello.vcpu}: {hello.error}")
                if hello.version != PROTOCOL_VERSION:
                    raise VmmError(f"vcpu {hello.vcpu}: its worker speaks protocol {hello.version}, this program "
                                   f"{PROTOCOL_VERSION}")
                if hello.kvm_run_size:
                    self._receive_fd(self.all[hello.vcpu], hello.kvm_run_size)
                waiting.discard(hello.vcpu)
                gone = None
            if gone is not None:
                raise VmmError(f"vcpu {gone.index}: its worker {gone.fate or 'ended during set-up'}",
                               ExitCode.WORKER_DIED)
            if waiting and time.monotonic() > deadline:
                raise VmmError(f"vcpu {min(waiting)}: its worker was not ready after "
                               f"{_START_TIMEOUT:.0f} s", ExitCode.WORKER_DIED)

    def _end_zygote(self) -> None:
        if self._zygote is not None:
            self._zygote.close()
            self._zygote = None

    def _receive_fd(self, shard: Shard, run_size: int) -> None:
        """Map what the worker has sent, or is sending; one that sends nothing of use is given up."""
        deadline = time.monotonic() + _START_TIMEOUT
        try:
            # Workers connect in any order: an fd is kept for the shard whose index came with it.
            while shard.index not in self._early_fds:
                try:
                    index, fd = self._fds.receive(_FD_STEP)
                except TimeoutError:
                    self._poll(None, 0.0)
                    if not shard.alive:
                        return      # it has died before it could
                    if time.monotonic() > deadline:
                        raise
                    continue
                if index in self._early_fds:
                    os.close(self._early_fds[index])
                self._early_fds[index] = fd
            shard.map_kvm(self._early_fds.pop(shard.index), run_size)
        except (OSError, ValueError) as exc:
            self.give_up([shard], f"sent no vCPU that can be mapped ({exc})")

    def _sends_fd(self, pid: int, index: int) -> bool:
        """That process is the worker of this vCPU."""
        return index < len(self.all) and self.all[index].pid == pid

    def shut_down(self) -> None:
        """End every worker: asked first, killed if that does not help in time."""
        live = [s for s in self.all if s.alive]
        for shard in live:
            shard.control.stop_reason = ExitReason.STOPPED
            shard.control.request |= VcpuRequest.STOP
            shard.kick()
        deadline = time.monotonic() + _STOP_TIMEOUT
        try:
            self.request(live, lambda seq, shard: Shutdown(seq), timeout=_STOP_TIMEOUT)
            while any(s.alive for s in self.all) and time.monotonic() < deadline:
                self._poll(None, deadline)
        except VmmError:
            pass
        for shard in self.all:
            if shard.alive:
                shard.signal(signal.SIGKILL)
                shard.bury()

    def close(self) -> None:
        self._end_zygote()
        for shard in self.all:
            if shard.alive:
                shard.signal(signal.SIGKILL)
                shard.bury()
            shard.unmap()
        for fd in self._early_fds.values():
            os.close(fd)
        self._fds.close()
        self.notify.close()
        self._requests.close()
        self._context.term()

    # --- waiting ----------------------------------------------------------------------------------

    def _poll(self, sock: zmq.Socket[bytes] | None, deadline: float) -> None:
        """Until ``sock`` is readable, a worker has died, or a while (at most 10 ms) has passed."""
        poller = zmq.Poller()
        if sock is not None:
            poller.register(sock, zmq.POLLIN)
        by_fd = {s.pidfd: s for s in self.all if s.alive}
        for fd in by_fd:
            poller.register(fd, zmq.POLLIN)
        left = max(0.0, min(_KICK_REPEAT_MS, (deadline - time.monotonic()) * 1000))
        for ready, _ in poller.poll(int(left)):
            if ready in by_fd:
                self.bury(by_fd[ready])

    def bury(self, shard: Shard) -> None:
        shard.bury()
        self._on_death(shard)

    def give_up(self, shards: Iterable[Shard], fate: str) -> None:
        """These workers are of no use any more (``fate``: why, after "its worker"). Killed, they can dirty no page
        behind the coordinator's back; their vCPUs end, the machine goes on."""
        lost = [s for s in shards if s.alive]
        for shard in lost:
            _log.error("vcpu %d: its worker (process %d) %s: it is killed", shard.index, shard.pid, fate)
            shard.fate = fate
            shard.signal(signal.SIGKILL)
        deadline = time.monotonic() + _KILL_TIMEOUT
        for shard in lost:
            poller = select.poll()
            poller.register(shard.pidfd, select.POLLIN)
            poller.poll(max(0.0, deadline - time.monotonic()) * 1000)
            self.bury(shard)

    def drain_notifications(self, *, everything: bool = False) -> None:
        """What the workers have said, for a while; ``everything``: to the last that there is (nobody says anything
        any more)."""
        deadline = time.monotonic() + (_KICK_TIMEOUT if everything else _DRAIN_SECONDS)
        while time.monotonic() < deadline and (message := self._notification()) is not None:
            if not isinstance(message, Hello):
                self._on_notification(message)

    def _notification(self) -> AnyNotification | None:
        """The next one; None when there is none now."""
        while True:
            try:
                frames = self.notify.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return None
            try:
                if len(frames) != 1:
                    raise MessageError(f"a notification of {len(frames)} frames")
                message = decode_notification(frames[0])
                if not 0 <= message.vcpu < len(self.all):
                    raise MessageError(f"a notification of vCPU {message.vcpu}, of {len(self.all)}")
                return message
            except MessageError as exc:
                self._bad(exc)

    def _reply(self) -> tuple[bytes, AnyReply] | None:
        """The next one, and who has sent it; None when there is none now."""
        while True:
            try:
                frames = self._requests.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return None
            try:
                if len(frames) != 2:
                    raise MessageError(f"a reply of {len(frames)} frames")
                return frames[0], decode_reply(frames[1])
            except MessageError as exc:
                self._bad(exc)

    @property
    def dropped(self) -> int:
        """Messages and connections that were none of a worker's."""
        return self._bad_messages + self._fds.dropped

    def _bad(self, error: MessageError) -> None:
        self._bad_messages += 1
        if self._bad_messages <= _COMPLAINTS:
            _log.warning("dropped on a socket of the workers: %s", error)

    # --- requests -----------------------------------------------------------------------------------

    def request(self, shards: Iterable[Shard], make: Callable[[int, Shard], AnyRequest], *,
                timeout: float = 0.0) -> dict[int, Done]:
        """Send a request to each shard at once and gather the replies, {index: Done}.

        A worker that dies meanwhile is missing from the result, and one that does not answer in time (``timeout``
        seconds; 0: the usual). Raises VmmError when one answers with a failure.
        """
        timeout = timeout or (_MISSING_TIMEOUT if self.pages_missing else _REPLY_TIMEOUT)
        deadline = time.monotonic() + timeout
        pending: dict[int, Shard] = {}
        unsent: list[tuple[Shard, bytes]] = []
        replies: dict[int, Done] = {}
        for shard in shards:
            self._seq += 1
            pending[self._seq] = shard
            unsent.append((shard, encode(make(self._seq, shard))))
        failures: list[str] = []
        while pending:
            unsent = [(s, frame) for s, frame in unsent if s.alive and not self._send(s, frame)]
            self._poll(self._requests, deadline)
            self._fds.serve()       # some answer when their descriptor is on its way
            while time.monotonic() < deadline and (answer := self._reply()) is not None:
                sender, reply = answer
                owner = pending.get(reply.seq)
                if owner is None or sender != _identity(owner):
                    continue  # late: its request was given up
                del pending[reply.seq]
                if isinstance(reply, Failed):
                    failures.append(f"vcpu {owner.index}: {reply.error}")
                else:
                    replies[owner.index] = reply
            pending = {seq: s for seq, s in pending.items() if s.alive}
            if pending and time.monotonic() > deadline:
                self._late(list(pending.values()), f"did not answer within {timeout:.0f} s")
                break
        if failures:
            raise VmmError("; ".join(failures), ExitCode.WORKER_DIED)
        return replies

    def _late(self, shards: Sequence[Shard], what: str) -> None:
        """Raises VmmError while pages are missing, and gives the workers up otherwise."""
        if self.pages_missing:
            late = ", ".join(str(s.index) for s in shards)
            raise VmmError(f"vcpu {late}: its worker {what}: it waits for a page that is still on its way here "
                           "(post-copy)")
        self.give_up(shards, what)

    def _send(self, shard: Shard, frame: bytes) -> bool:
        """False while the worker has not connected yet (just started, or this coordinator has)."""
        try:
            self._requests.send_multipart([_identity(shard), frame], zmq.DONTWAIT)
        except zmq.ZMQError as exc:
            if exc.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                return False
            raise
        return True

    # --- kick, pause --------------------------------------------------------------------------------

    def kick_all(self, shards: Sequence[Shard] | None = None) -> None:
        """Every vCPU has been out of the guest at least once when this returns (seed:
        kvm_cpu_synchronize_kick_all)."""
        targets = [s for s in (self.all if shards is None else shards) if s.running]
        for shard in targets:
            shard.kick()
        timeout = _MISSING_TIMEOUT if self.pages_missing else _KICK_TIMEOUT
        deadline = time.monotonic() + timeout
        while True:
            waiting = [s for s in targets if s.kick_pending]
            if not waiting:
                return
            if time.monotonic() > deadline:
                self._late(waiting, f"did not leave the guest within {timeout:.0f} s")
                return
            before = time.monotonic()
            self._poll(self.notify, deadline)
            self.drain_notifications()
            if time.monotonic() - before >= _KICK_REPEAT_MS / 1000:
                for shard in waiting:
                    shard.prod()

    def pause(self, shards: Sequence[Shard]) -> None:
        """Out of the guest, and staying there: a vCPU that acknowledges the kick has seen the
        request that was set before it (workers/process.py)."""
        for shard in shards:
            shard.control.request |= VcpuRequest.PAUSE
        self.kick_all(shards)

    def resume(self, shards: Sequence[Shard]) -> None:
        for shard in shards:
            if shard.running:
                shard.control.request &= ~VcpuRequest.PAUSE & 0xFFFF_FFFF
                shard.kick()

    @property
    def paused(self) -> bool:
        return self._pauses > 0

    def pause_all(self) -> None:
        """Pauses nest: as many resume_all are needed."""
        self._pauses += 1
        if self._pauses == 1:
            try:
                self.pause(self.all)
            except VmmError:
                self.resume_all()
                raise

    def resume_all(self) -> None:
        self._pauses -= 1
        if self._pauses == 0:
            self.resume(self.all)

    @contextlib.contextmanager
    def all_paused(self) -> Iterator[None]:
        self.pause_all()
        try:
            yield
        finally:
            self.resume_all()

    def expect_paused(self) -> None:
        """Of a replacement that cannot wait for the vCPUs now: they are to stand still, as soon as they can, until
        ``resume_all``."""
        self._pauses = 1
        for shard in self.all:
            if shard.running:
                shard.control.request |= VcpuRequest.PAUSE
                shard.kick()

    def start_paused(self) -> None:
        """The workers were started with PAUSE in their control blocks."""
        self._pauses = 1

    # --- rings ------------------------------------------------------------------------------------

    def await_resets(self, shards: Iterable[Shard]) -> None:
        """Until each that was asked (``Shard.ask_reset``) has reset its ring, or died."""
        timeout = _MISSING_TIMEOUT if self.pages_missing else _REPLY_TIMEOUT
        deadline = time.monotonic() + timeout
        for shard in shards:
            while not shard.await_reset(_KICK_REPEAT_MS / 1000) and shard.alive:
                self._poll(None, 0.0)       # has it died?
                if time.monotonic() > deadline:
                    self._late([shard], f"did not reset its ring within {timeout:.0f} s")

    def rebuild_ring(self, shard: Shard) -> None:
        """A fresh ring for a shard whose count was wrong; the vCPU is paused. Raises VmmError."""
        software = isinstance(shard._ring, Segment)
        run_size = 0 if shard._run is None else len(shard._run)
        if not self.request([shard], lambda seq, s: RebuildRing(seq)):
            return      # it has died
        shard.control.fetch_total = 0
        if not software and shard.alive:
            self._receive_fd(shard, run_size)
        shard.control.ring_rebuilds += 1
        shard.full_but_empty = 0
        shard.overflowed = False

    def adopt_fds(self, shards: Sequence[Shard]) -> None:
        """A replacement coordinator maps what its predecessor had mapped."""
        replies: Mapping[int, Done] = self.request(shards, lambda seq, s: SendFd(seq))
        for shard in shards:
            reply = replies.get(shard.index)
            if reply is not None and reply.value:
                self._receive_fd(shard, reply.value)


def _identity(shard: Shard) -> bytes:
    """By which its worker is known on the requests socket."""
    return str(shard.index).encode()
