"""Against sets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm import distinct as module
from vmm.distinct import Distinct, distinct

VALUES = st.lists(st.integers(0, (1 << 64) - 1) | st.integers(0, 9), max_size=40)


@given(VALUES)
def test_each_value_is_there_once_and_they_ascend(values: list[int]) -> None:
    found = distinct(np.array(values, np.uint64))
    assert found.dtype == np.uint64
    assert found.tolist() == sorted(set(values))


@pytest.mark.parametrize("fresh", [1, 1 << 20])
@given(st.lists(VALUES, max_size=8))
def test_they_are_kept_whenever_they_are_joined(fresh: int, parts: list[list[int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_FRESH", fresh)
        kept: Any = Distinct(np.uint64)
        for part in parts:
            kept.add(np.array(part, np.uint64))
        assert kept.values().dtype == np.uint64
        assert kept.values().tolist() == sorted({value for part in parts for value in part})
