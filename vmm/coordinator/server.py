"""The coordinator's end of the control socket (vmm/control.py has the protocol and the client's end)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import zmq

from ipc import channel
from ipc.shm import SegmentError
from ipc.steps import step

from .. import control
from ..errors import ExitCode, VmmError

__all__ = ["ControlServer", "Handler"]

Handler = Callable[[Any], dict[str, Any] | None]


class ControlServer:
    """``before`` is called before each verb. ``verbs``: what is called with it; it gives the answer's result (None:
    an empty one), or raises VmmError or SegmentError. ``Follow`` is this class's own."""

    def __init__(self, directory: Path, verbs: dict[type[control.Verb], Handler],
                 before: Callable[[], None]) -> None:
        self._verbs = verbs
        self._before = before
        #: Process id of whoever asks, while a verb is carried out: of the peer of the socket, seen from here. 0: it
        #: is in a PID namespace that is not seen from here.
        self.asker = 0
        self._followers: set[bytes] = set()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self.socket = channel.bind(self._context, zmq.ROUTER, channel.endpoint(directory, "control"))

    def tell(self, event: dict[str, Any]) -> None:
        """To every follower; one that lags too far behind loses events, never holds the machine."""
        frame = msgspec.json.encode(event)
        for follower in list(self._followers):
            try:
                self.socket.send_multipart([follower, frame], zmq.DONTWAIT)
            except zmq.ZMQError as exc:
                if exc.errno == zmq.EHOSTUNREACH:
                    self._followers.discard(follower)

    def serve(self) -> None:
        """Whatever has come."""
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.DONTWAIT, copy=False)
            except zmq.Again:
                return
            if len(frames) != 2:
                continue  # not from a client of ours
            client, frame = (f.bytes for f in frames)
            self.asker = _peer_pid(frames[1])
            answer = self._answer(client, frame)
            step("verb-carried-out")
            try:
                self.socket.send_multipart([client, msgspec.json.encode(answer)], zmq.DONTWAIT)
            except zmq.ZMQError:
                pass  # the client has gone

    def _answer(self, client: bytes, frame: bytes) -> dict[str, Any]:
        number = 0
        try:
            verb = control.decode_verb(frame)
            number = verb.id
            if isinstance(verb, control.Follow):
                self._followers.add(client)
                return {"id": number, "result": {}}
            self._before()
            return {"id": number, "result": self._verbs[type(verb)](verb) or {}}
        except VmmError as exc:
            return {"id": getattr(exc, "request_id", number), "error": str(exc), "code": int(exc.exit_code)}
        except SegmentError as exc:
            return {"id": number, "error": str(exc), "code": int(ExitCode.BAD_INPUT)}

    def close(self) -> None:
        self.socket.close()
        self._context.term()


def _peer_pid(frame: zmq.Frame) -> int:
    """libzmq puts SO_PEERCRED of an ipc connection into ``Peer-Address``: ``host:uid:gid:pid``."""
    try:
        return int(str(frame.get("Peer-Address")).rpartition(":")[2])
    except (zmq.ZMQError, ValueError):
        return 0
