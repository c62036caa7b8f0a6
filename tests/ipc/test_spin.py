"""Looking before sleeping: how often is looked, and when it is not tried."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from ipc.linux import futex
from ipc.spin import Spin


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
    spin = Spin()
    assert looked(spin, how, after=100) == (True, 101)
    _, whole = looked(spin, how)
    assert whole > 1000
    tried, last = [], -1
    for number in range(140):
        found, looks = looked(spin, how)
        assert not found
        assert looks in (1, whole)
        if looks == whole:
            tried.append(number - last - 1)
            last = number
    assert tried == [1, 3, 7, 15, 31, 63]       # calls without a try before each
    while looked(spin, how, after=50)[1] == 1:
        pass
    assert looked(spin, how, after=0) == (True, 1)
    assert looked(spin, how) == (False, whole)


def test_a_word_of_memory() -> None:
    words = (ctypes.c_uint32 * 4)(1, 2, 3, 4)
    word = futex.word(ctypes.addressof(words) + 8)
    assert word[0] == 3
    words[2] = 0xFFFF_FFFF
    assert word[0] == 0xFFFF_FFFF
