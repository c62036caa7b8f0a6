"""Looking before sleeping: how often is looked, and when it is not tried."""

from __future__ import annotations

import ctypes
import time
from typing import Any

import pytest

from ipc.linux import futex
from ipc.spin import Spin

PATIENCE = 1e-3     # seconds


class Counted:
    """A word that counts who looks at it; ``after`` so many looks it is 1."""

    def __init__(self, after: int = 1 << 60) -> None:
        self.looks, self._after = 0, after

    def __getitem__(self, at: int) -> int:
        self.looks += 1
        return int(self.looks > self._after)


def looked(spin: Spin, how: str, after: int = 1 << 60) -> tuple[bool, int]:
    """(found, looks)"""
    word: Any = Counted(after)
    return (spin.until(word, 1) if how == "until" else spin.until_not(word, 0)), word.looks


@pytest.mark.parametrize("how", ["until", "until_not"])
def test_what_is_of_no_use_is_tried_less_often_and_again_at_once_where_it_is(how: str) -> None:
    """A try looks more than once, and for as long as it is patient, however fast that goes."""
    spin = Spin(PATIENCE)
    assert looked(spin, how, after=10) == (True, 11)
    began = time.perf_counter()
    found, looks = looked(spin, how)
    assert (found, looks > 1, time.perf_counter() - began >= PATIENCE) == (False, True, True)
    tried, last = [], -1
    for number in range(140):
        found, looks = looked(spin, how)
        assert not found
        if looks > 1:
            tried.append(number - last - 1)
            last = number
    assert tried == [1, 3, 7, 15, 31, 63]       # calls without a try before each
    while looked(spin, how, after=10)[1] == 1:
        pass
    assert looked(spin, how, after=0) == (True, 1)
    assert looked(spin, how)[1] > 1


def test_a_word_of_memory() -> None:
    words = (ctypes.c_uint32 * 4)(1, 2, 3, 4)
    word = futex.word(ctypes.addressof(words) + 8)
    assert word[0] == 3
    words[2] = 0xFFFF_FFFF
    assert word[0] == 0xFFFF_FFFF
