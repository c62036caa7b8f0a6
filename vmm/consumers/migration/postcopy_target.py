"""Post-copy, the target's side: the guest runs, and what is missing is asked for and filled in as it comes
(vmm/consumers/missing.py has the holes)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import zmq

from ...client.machine import Machine
from ...errors import VmmError
from ..missing import MissingPages, Wanted
from .arrivals import Arrivals
from .pages import CHUNK_PAGES, unpack, want
from .peers import LOOK_EVERY, Gone, Peers, ReceiveError
from .wire import Buffer, Commit, Pages, WireError

__all__ = ["fetch"]

_ASK_AGAIN = 2.0            # seconds without pages after which missing ones are asked for


def fetch(machine: Machine, pages: MissingPages, peers: Peers, arrivals: Arrivals, total: Callable[[int], int],
          again: Callable[[], None], lack: Callable[[int], None]) -> None:
    """Until every page is here, however long the source is away in between. ``total``: pages of a slot, or WireError;
    ``again`` says how it is to a source that asks, ``lack`` is told how many pages are missing, now and then. Raises
    ReceiveError when the machine has ended."""
    for fd in pages.faults:
        peers.poller.register(fd, zmq.POLLIN)
    came = looked = time.monotonic()
    while pages.left:
        with contextlib.suppress(Gone):
            heard = None
            # A peer that sends nonsense is ignored: the machine is here alone by now.
            with contextlib.suppress(WireError):
                heard = peers.hear(LOOK_EVERY)
            while (arrived := arrivals.next()) is not None:
                if _put(pages, *arrived, total):
                    came = time.monotonic()
            with contextlib.suppress(VmmError):     # of a connection that has ended: what it has not brought is
                arrivals.check()                    # asked for
            if isinstance(heard, Commit):           # Running was lost, or another process takes over
                again()
                _ask(pages.ask_again(), peers, arrivals)
            _ask([each for fd in pages.faults for each in pages.wanted(fd)], peers, arrivals)
            if time.monotonic() - came > _ASK_AGAIN:
                came = time.monotonic()
                _ask(pages.some(CHUNK_PAGES), peers, arrivals)
        if not pages.left or time.monotonic() - looked > LOOK_EVERY:
            looked = time.monotonic()
            lack(pages.left)
            if machine.status()["state"] == "ended":
                raise ReceiveError("the machine was stopped before all of its memory had arrived")
    for fd in pages.faults:
        peers.poller.unregister(fd)
    pages.finish()


def _put(pages: MissingPages, message: Pages, data: Buffer, total: Callable[[int], int]) -> bool:
    """False for pages that are damaged, or not this machine's."""
    try:
        numbers, content, intact = unpack(message, data, total(message.slot))
    except WireError:
        return False
    if intact and message.slot in pages.slots:
        pages.put(message.slot, numbers, content)
    return intact


def _ask(wanted: list[Wanted], peers: Peers, arrivals: Arrivals) -> None:
    """Raises Gone; they are asked for again when the source is back."""
    for slot in {w.slot for w in wanted}:
        numbers = sorted(w.page for w in wanted if w.slot == slot)
        for at in range(0, len(numbers), CHUNK_PAGES):
            message = want(slot, numbers[at:at + CHUNK_PAGES])
            if not arrivals.ask(message):
                peers.say(message)
