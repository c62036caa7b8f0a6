"""The hand-over, as the source's machine keeps it: where it went, and what another process must know to finish it.

The moment at which a machine changes hands lies in its coordinator here, which is asked to keep it paused for good
(``Machine.hand_over``). Before, any end of the source's process lets the guest go on here; from then on it is the
target's, and Commit is repeated until the target says that it runs. Should the source's process be killed in
between, the coordinator starts another, which finds what it needs in this record
(vmm/consumers/migration/recoverer.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import msgspec

from ipc.messages import UNREADABLE

from ...errors import VmmError
from ...machine.runtime import machine_dir
from .report import Options

__all__ = ["HandOver", "load_hand_over", "save_hand_over", "uninterrupted"]

_FILE = "handed-over.json"


class HandOver(msgspec.Struct, frozen=True):
    """``token`` names the migration at its target, ``id`` to the user. ``finished``: the target has said that it runs
    the machine, and what is here is a copy that is kept (``Options.keep_source``)."""

    id: str
    token: str
    address: str
    options: Options
    finished: bool = False
    certificate: bytes = b""    # the target's (tls.py)
    upgrade: str = ""           # Options.upgrade

    @property
    def where(self) -> str:
        """For a person."""
        return f"{self.address} (migration {self.id})"


def save_hand_over(machine: str, record: HandOver) -> None:
    """Before the machine is handed over, and when it is kept here afterwards. It holds a secret: the machine's
    directory is the user's alone. Raises VmmError."""
    path = machine_dir(machine) / _FILE
    options = record.options
    record = msgspec.structs.replace(record, options=dataclasses.replace(
        options, key=os.path.abspath(options.key) if options.key else "",
        peer=os.path.abspath(options.peer) if options.peer else ""))
    try:
        aside = path.with_suffix(".new")
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(msgspec.json.encode(record))
        aside.rename(path)
    except OSError as exc:
        raise VmmError(f"{path}: cannot be written: {exc.strerror}") from None


def load_hand_over(machine: str) -> HandOver:
    """Raises VmmError when the machine was not handed over."""
    path = machine_dir(machine) / _FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=HandOver)
    except FileNotFoundError:
        raise VmmError(f"machine '{machine}' has not been handed over to a target") from None
    except (OSError, *UNREADABLE) as exc:
        raise VmmError(f"{path}: cannot be read: {exc}") from None


@contextlib.contextmanager
def uninterrupted(told: Callable[[int], None]) -> Iterator[None]:
    """Meanwhile SIGINT and SIGTERM end nothing; ``told`` hears of each. Where a thread other than the main one
    migrates, signals are the main thread's affair anyway."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(signum: int, frame: FrameType | None) -> None:
        told(signum)

    before = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
