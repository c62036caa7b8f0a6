"""The two sockets over which a machine's workers are spoken to (docs/protocol.md): what comes through them is
checked here, and what is not of the protocol is counted and changes nothing."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import NamedTuple

import zmq

from ipc import sockets
from ipc.messages import AnyNotification, AnyReply, MessageError, decode_notification, decode_reply

__all__ = ["Endpoints", "WorkerLink"]

_COMPLAINTS = 10            # bad messages that are said; all are counted

_log = logging.getLogger(__name__)


class Endpoints(NamedTuple):
    """Where the workers of a machine connect, again and again while its coordinator is replaced. Their names have that
    of the keeper in them: workers that have lost both connect to no machine that has their machine's name by now, whose
    own workers they would be taken for."""

    notify: str
    requests: str

    @classmethod
    def of(cls, directory: Path, keeper: int | None = None) -> Endpoints:
        """``keeper``: its pid; None: it is the parent of this process."""
        number = os.getppid() if keeper is None else keeper
        return cls(*(sockets.endpoint(directory, f"{kind}{number:x}") for kind in "nr"))


class WorkerLink:
    """``notify``: readable when a worker has said something by itself; ``requests``: when one has answered.
    ``dropped``: messages that were not a worker's."""

    def __init__(self, directory: Path) -> None:
        """Raises ZMQError."""
        self.endpoints = Endpoints.of(directory)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self.notify = sockets.bind(self._context, zmq.PULL, self.endpoints.notify,
                                   frame_max=sockets.FRAME_MAX)
        self.requests = sockets.bind(self._context, zmq.ROUTER, self.endpoints.requests,
                                     frame_max=sockets.FRAME_MAX)
        self.dropped = 0

    def notification(self, vcpus: int) -> AnyNotification | None:
        """The next one, of one of that many vCPUs; None when there is none now."""
        while True:
            try:
                frames = self.notify.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return None
            try:
                if len(frames) != 1:
                    raise MessageError(f"a notification with {len(frames)} frames")
                message = decode_notification(frames[0])
                if not 0 <= message.vcpu < vcpus:
                    raise MessageError(f"a notification from vCPU {message.vcpu}, but there are {vcpus} vCPUs")
                return message
            except MessageError as exc:
                self._bad(exc)

    def reply(self) -> tuple[bytes, AnyReply] | None:
        """The next one, and who has sent it (``identity``); None when there is none now."""
        while True:
            try:
                frames = self.requests.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return None
            try:
                if len(frames) != 2:
                    raise MessageError(f"a reply with {len(frames)} frames")
                return frames[0], decode_reply(frames[1])
            except MessageError as exc:
                self._bad(exc)

    def _bad(self, error: MessageError) -> None:
        self.dropped += 1
        if self.dropped <= _COMPLAINTS:
            _log.warning("dropped an invalid message on a worker socket: %s", error)

    @staticmethod
    def identity(vcpu: int) -> bytes:
        """By which the worker of this vCPU is known on the requests socket."""
        return str(vcpu).encode()

    def send(self, vcpu: int, frame: bytes) -> bool:
        """A request. False while the worker has not connected yet (just started, or this coordinator has)."""
        try:
            self.requests.send_multipart([self.identity(vcpu), frame], zmq.DONTWAIT)
        except zmq.ZMQError as exc:
            if exc.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                return False
            raise
        return True

    def close(self) -> None:
        """Idempotent."""
        self.notify.close()
        self.requests.close()
        self._context.term()
