"""All vCPU workers of a machine: started, spoken to over two sockets, kicked, paused, given up."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import select
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import zmq

from ipc import sockets
from ipc.layout import PROTOCOL_VERSION, VcpuRequest
from ipc.messages import (
    AnyNotification,
    AnyRequest,
    Done,
    ExitReason,
    Failed,
    Hello,
    RebuildRing,
    SendFd,
    Shutdown,
    WorkerSpec,
    encode,
)
from workers.zygote import Zygote

from ..errors import ExitCode, VmmError
from .handle import VcpuHandle
from .link import WorkerLink

__all__ = ["VcpuPool"]

_log = logging.getLogger(__name__)

_REPLY_TIMEOUT = 30.0       # seconds; a worker that does not answer by then is taken for dead (VcpuPool.give_up)
_KICK_TIMEOUT = 30.0
_KILL_TIMEOUT = 5.0         # seconds for a killed worker to be gone
_MISSING_TIMEOUT = 3.0      # of either, while pages are missing: it is not the worker's fault
_KICK_REPEAT_MS = 10        # an unacknowledged kick is repeated (workers/vcpu.py says why)
_START_TIMEOUT = 30.0
_STOP_TIMEOUT = 5.0
_LAST_WORDS = 1.0          # seconds that what a worker has said may come after its end (two ZeroMQ threads carry it)
_FD_STEP = 0.1              # seconds between two looks at whether the sender of a descriptor has died
_DRAIN_SECONDS = 0.005      # of notifications at a time: a vCPU that prints without end holds nothing up


class VcpuPool:
    """All workers of a machine, and the two sockets they are spoken to over.

    ``zygote`` makes the workers (None: they are there already). ``on_notification`` is called for every
    notification but the set-up's, and its ``vcpu`` is one of these; ``on_death`` with a vCPU whose process has
    ended. Frames that are not of the protocol are counted (``dropped``) and change nothing.

    A worker that does not do in time what it is asked for is taken for dead: it is killed, and the caller
    continues without it. Only while pages are missing (post-copy) is it not its fault, and VmmError is raised.
    """

    def __init__(self, directory: Path, zygote: Zygote | None, on_notification: Callable[[AnyNotification], None],
                 on_death: Callable[[VcpuHandle], None]) -> None:
        self.directory = directory
        self._zygote = zygote
        self.all: list[VcpuHandle] = []
        self._link = WorkerLink(directory)
        self.notify, self.endpoints = self._link.notify, self._link.endpoints
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

    def spawn(self, vcpu: VcpuHandle, spec: WorkerSpec) -> None:
        """Start the worker's process; it reads its specification from a pipe. Raises VmmError."""
        assert self._zygote is not None
        read, write = os.pipe()
        try:
            vcpu.watch(self._zygote.fork(spec.accel, read))
            self.all.append(vcpu)
        except OSError as exc:
            os.close(write)
            raise VmmError(f"vcpu {vcpu.index}: its worker cannot be started: {exc.strerror or exc}",
                           ExitCode.WORKER_DIED) from None
        finally:
            os.close(read)
        with contextlib.suppress(BrokenPipeError), os.fdopen(write, "wb") as pipe:  # await_hello says that it ended
            pipe.write(msgspec.json.encode(spec))

    def await_hello(self) -> None:
        """Until every worker is set up and its ring is mapped. Raises VmmError with its reason."""
        self._end_zygote()
        waiting = {vcpu.index for vcpu in self.all}
        deadline = time.monotonic() + _START_TIMEOUT
        heard_by = math.inf     # when one that has ended has said all that it will
        while waiting:
            self._poll(self.notify, deadline)
            if heard_by == math.inf and any(not s.alive for s in self.all):
                heard_by = time.monotonic() + _LAST_WORDS
            while time.monotonic() < deadline and (hello := self._link.notification(len(self.all))) is not None:
                if not isinstance(hello, Hello):
                    continue
                if hello.error:
                    raise VmmError(f"vcpu {hello.vcpu}: {hello.error}")
                if hello.version != PROTOCOL_VERSION:
                    raise VmmError(f"vcpu {hello.vcpu}: its worker speaks protocol {hello.version}, but this "
                                   f"program speaks {PROTOCOL_VERSION}")
                if hello.kvm_run_size:
                    self._receive_fd(self.all[hello.vcpu], hello.kvm_run_size)
                waiting.discard(hello.vcpu)
            gone = next((s for s in self.all if s.index in waiting and not s.alive), None)
            if gone is not None and (gone.fate or time.monotonic() > heard_by):
                raise VmmError(f"vcpu {gone.index}: its worker {gone.fate or 'ended during set-up'}",
                               ExitCode.WORKER_DIED)
            if waiting and time.monotonic() > deadline:
                raise VmmError(f"vcpu {min(waiting)}: its worker was not ready after "
                               f"{_START_TIMEOUT:.0f} s", ExitCode.WORKER_DIED)

    def _end_zygote(self) -> None:
        if self._zygote is not None:
            self._zygote.close()
            self._zygote = None

    def _receive_fd(self, vcpu: VcpuHandle, run_size: int) -> None:
        """Map what the worker has sent, or is sending; one that sends nothing of use is given up."""
        deadline = time.monotonic() + _START_TIMEOUT
        try:
            # Workers connect in any order: an fd is kept for the vCPU whose index came with it.
            while vcpu.index not in self._early_fds:
                try:
                    index, fd = self._fds.receive(_FD_STEP)
                except TimeoutError:
                    self._poll(None, 0.0)
                    if not vcpu.alive:
                        return      # it has died before it could
                    if time.monotonic() > deadline:
                        raise
                    continue
                if index in self._early_fds:
                    os.close(self._early_fds[index])
                self._early_fds[index] = fd
            vcpu.map_vcpu(self._early_fds.pop(vcpu.index), run_size)
        except (OSError, ValueError) as exc:
            self.give_up([vcpu], f"did not send a vCPU that can be mapped ({exc})")

    def _sends_fd(self, pid: int, index: int) -> bool:
        """That process is the worker of this vCPU."""
        return index < len(self.all) and self.all[index].pid == pid

    def shut_down(self) -> None:
        """End every worker: asked first, killed if that does not help in time."""
        live = [s for s in self.all if s.alive]
        for vcpu in live:
            vcpu.control.stop_reason = ExitReason.STOPPED
            vcpu.control.request |= VcpuRequest.STOP
            vcpu.kick()
        deadline = time.monotonic() + _STOP_TIMEOUT
        try:
            self.request(live, lambda seq, vcpu: Shutdown(seq), timeout=_STOP_TIMEOUT)
            while any(s.alive for s in self.all) and time.monotonic() < deadline:
                self._poll(None, deadline)
        except VmmError:
            pass
        for vcpu in self.all:
            if vcpu.alive:
                vcpu.signal(signal.SIGKILL)
                vcpu.mark_dead()

    def close(self) -> None:
        self._end_zygote()
        for vcpu in self.all:
            if vcpu.alive:
                vcpu.signal(signal.SIGKILL)
                vcpu.mark_dead()
            vcpu.unmap()
        for fd in self._early_fds.values():
            os.close(fd)
        self._fds.close()
        self._link.close()

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
                self.mark_dead(by_fd[ready])

    def mark_dead(self, vcpu: VcpuHandle) -> None:
        vcpu.mark_dead()
        self._on_death(vcpu)

    def give_up(self, vcpus: Iterable[VcpuHandle], fate: str) -> None:
        """These workers are of no further use (``fate``: why, after "its worker"). Killed, they can dirty no page
        behind the coordinator's back; their vCPUs end, the machine keeps running."""
        lost = [s for s in vcpus if s.alive]
        for vcpu in lost:
            _log.error("vcpu %d: its worker (process %d) %s: killing it", vcpu.index, vcpu.pid, fate)
            vcpu.fate = fate
            vcpu.signal(signal.SIGKILL)
        deadline = time.monotonic() + _KILL_TIMEOUT
        for vcpu in lost:
            poller = select.poll()
            poller.register(vcpu.pidfd, select.POLLIN)
            poller.poll(max(0.0, deadline - time.monotonic()) * 1000)
            self.mark_dead(vcpu)

    def drain_notifications(self, *, everything: bool = False) -> None:
        """What the workers have said, for a while; ``everything``: to the last that there is (nothing more
        will come)."""
        deadline = time.monotonic() + (_KICK_TIMEOUT if everything else _DRAIN_SECONDS)
        while time.monotonic() < deadline and (message := self._link.notification(len(self.all))) is not None:
            if not isinstance(message, Hello):
                self._on_notification(message)

    @property
    def dropped(self) -> int:
        """Messages and connections that were not a worker's."""
        return self._link.dropped + self._fds.dropped

    # --- requests -----------------------------------------------------------------------------------

    def request(self, vcpus: Iterable[VcpuHandle], make: Callable[[int, VcpuHandle], AnyRequest], *,
                timeout: float = 0.0) -> dict[int, Done]:
        """Send a request to each worker at once and gather the replies, {index: Done}.

        A worker that dies meanwhile is missing from the result, and one that does not answer in time (``timeout``
        seconds; 0: the usual). Raises VmmError when one answers with a failure.
        """
        timeout = timeout or (_MISSING_TIMEOUT if self.pages_missing else _REPLY_TIMEOUT)
        deadline = time.monotonic() + timeout
        pending: dict[int, VcpuHandle] = {}
        unsent: list[tuple[VcpuHandle, bytes]] = []
        replies: dict[int, Done] = {}
        for vcpu in vcpus:
            self._seq += 1
            pending[self._seq] = vcpu
            unsent.append((vcpu, encode(make(self._seq, vcpu))))
        failures: list[str] = []
        while pending:
            unsent = [(s, frame) for s, frame in unsent if s.alive and not self._link.send(s.index, frame)]
            self._poll(self._link.requests, deadline)
            self._fds.serve()       # some answer when their descriptor is on its way
            while time.monotonic() < deadline and (answer := self._link.reply()) is not None:
                sender, reply = answer
                owner = pending.get(reply.seq)
                if owner is None or sender != self._link.identity(owner.index):
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

    def _late(self, vcpus: Sequence[VcpuHandle], what: str) -> None:
        """Raises VmmError while pages are missing, and gives the workers up otherwise."""
        if self.pages_missing:
            late = ", ".join(str(s.index) for s in vcpus)
            raise VmmError(f"vcpu {late}: its worker {what}: it is waiting for a page that is still arriving "
                           "(post-copy)")
        self.give_up(vcpus, what)

    # --- kick, pause --------------------------------------------------------------------------------

    def kick_all(self, vcpus: Sequence[VcpuHandle] | None = None) -> None:
        """Every vCPU has been out of the guest at least once when this returns (QEMU:
        kvm_cpu_synchronize_kick_all)."""
        targets = [s for s in (self.all if vcpus is None else vcpus) if s.running]
        for vcpu in targets:
            vcpu.kick()
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
                for vcpu in waiting:
                    vcpu.repeat_kick()

    def pause(self, vcpus: Sequence[VcpuHandle]) -> None:
        """Out of the guest, and staying there: a vCPU that acknowledges the kick has seen the
        request that was set before it (workers/vcpu.py)."""
        for vcpu in vcpus:
            vcpu.control.request |= VcpuRequest.PAUSE
        self.kick_all(vcpus)

    def resume(self, vcpus: Sequence[VcpuHandle]) -> None:
        for vcpu in vcpus:
            if vcpu.running:
                vcpu.control.request &= ~VcpuRequest.PAUSE & 0xFFFF_FFFF
                vcpu.kick()

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
        for vcpu in self.all:
            if vcpu.running:
                vcpu.control.request |= VcpuRequest.PAUSE
                vcpu.kick()

    def start_paused(self) -> None:
        """The workers were started with PAUSE in their control blocks."""
        self._pauses = 1

    # --- rings ------------------------------------------------------------------------------------

    def await_resets(self, vcpus: Iterable[VcpuHandle]) -> None:
        """Until each that was asked (``RingReader.ask_reset``) has reset its ring, or died."""
        timeout = _MISSING_TIMEOUT if self.pages_missing else _REPLY_TIMEOUT
        deadline = time.monotonic() + timeout
        for vcpu in vcpus:
            while not vcpu.ring.await_reset(_KICK_REPEAT_MS / 1000) and vcpu.alive:
                self._poll(None, 0.0)       # has it died?
                if time.monotonic() > deadline:
                    self._late([vcpu], f"did not reset its ring within {timeout:.0f} s")

    def rebuild_ring(self, vcpu: VcpuHandle) -> None:
        """A fresh ring for a vCPU whose count was wrong, and which is paused. Raises VmmError."""
        if not self.request([vcpu], lambda seq, s: RebuildRing(seq)):
            return      # it has died
        vcpu.control.fetch_total = 0
        if vcpu.run_size and vcpu.alive:      # the ring is the kernel's, and another vCPU's now
            self._receive_fd(vcpu, vcpu.run_size)
        vcpu.control.ring_rebuilds += 1
        vcpu.ring.begin_anew()

    def adopt_fds(self, vcpus: Sequence[VcpuHandle]) -> None:
        """A replacement coordinator maps what its predecessor had mapped."""
        replies: Mapping[int, Done] = self.request(vcpus, lambda seq, s: SendFd(seq))
        for vcpu in vcpus:
            reply = replies.get(vcpu.index)
            if reply is not None and reply.value:
                self._receive_fd(vcpu, reply.value)
