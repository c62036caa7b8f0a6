"""Mailboxes: what a worker is told, while it may not have come to what it was told before."""

from __future__ import annotations

import mmap

from ipc.programs import EVERYTHING, Answer, Mailbox, system_pages
from ipc.shm import PAGE_SIZE


def test_frames_of_an_attention_are_not_those_of_an_answer() -> None:
    box = Mailbox(mmap.mmap(-1, system_pages(1, 0) * PAGE_SIZE), 0, 1, 0)
    try:
        box.put_stale([(at, 1) for at in range(100)])
        box.answer(Answer.STALE)
        box.put_stale([(7, 2)], attention=True)
        assert box.stale() == [(at, 1) for at in range(100)]
        assert box.stale(attention=True) == [(7, 2)]
        box.put_stale([(at, 1) for at in range(1000)], attention=True)
        assert box.stale(attention=True) == [EVERYTHING]
        assert len(box.stale()) == 100
        assert box.take() == (Answer.STALE, 0)
    finally:
        box.close()
